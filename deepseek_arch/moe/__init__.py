"""Mixture of experts: router, experts, balancing, recorded routing, placement."""
