"""Training runs: a small model from nothing, FP8 against BF16."""
