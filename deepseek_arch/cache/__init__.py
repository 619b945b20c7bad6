"""Latent caches."""
