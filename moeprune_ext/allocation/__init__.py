"""Scores to a plan: methods side by side on one budget."""
