"""`python -m moeprune_ext.cli`, as torchrun wants it."""

from moeprune_ext.cli.main import main

if __name__ == "__main__":
    main()
