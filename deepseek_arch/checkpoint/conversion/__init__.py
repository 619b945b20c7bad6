"""Conversion of checkpoints between formats, resumable."""
