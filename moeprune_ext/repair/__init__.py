"""What pruning broke, repaired without gradients."""
