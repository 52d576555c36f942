"""One loaded model, taken apart and changed."""
