"""Matrix products: dense, FP8, grouped FP8, FP8 weights."""
