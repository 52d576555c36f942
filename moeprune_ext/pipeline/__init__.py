"""The whole way in one run: from a model directory and text to the best pruned checkpoint, measured."""
