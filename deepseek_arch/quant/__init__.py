"""Block-scaled FP8: layers that keep it, conversion, training."""
