"""Decoding: plain, with drafts, compiled."""
