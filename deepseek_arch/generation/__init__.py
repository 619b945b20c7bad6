"""Decoding: plain, with drafts, compiled; sampling; routing of what was generated."""
