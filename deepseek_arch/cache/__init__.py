"""Caches of latent attention, growing and static."""
