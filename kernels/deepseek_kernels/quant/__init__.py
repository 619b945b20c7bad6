"""Quantization to block-scaled FP8."""
