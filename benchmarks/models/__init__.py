"""Whole models, FP8 weights and conversion against transformers and torch."""
