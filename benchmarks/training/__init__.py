"""Training of small models: an example to start from, its measurements, and FP8 against BF16."""
