"""Many plans to scores in one pass."""
