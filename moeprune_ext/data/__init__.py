"""Text to tokens, and task files to examples."""

from moeprune_ext.data.batches import load_batches, load_domains

__all__ = ["load_batches", "load_domains"]
