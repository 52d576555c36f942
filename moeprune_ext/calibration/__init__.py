"""Text to statistics to scores."""
