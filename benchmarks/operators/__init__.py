"""Operators against torch's built-ins at the shapes of published models."""
