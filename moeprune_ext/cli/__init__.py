"""The `moeprune` command."""
