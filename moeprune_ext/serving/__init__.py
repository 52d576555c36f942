"""Other people's runtimes."""
