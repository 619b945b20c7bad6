"""Decoder layers, main model, language model, multi-token prediction."""
