"""Pieces that operators share."""
