"""A plan to a checkpoint on disk, and back."""
