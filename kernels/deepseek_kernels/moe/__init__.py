"""Operators of the mixture of experts."""
