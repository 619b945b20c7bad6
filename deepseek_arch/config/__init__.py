"""Configuration of a model: fields, presets, and the config.json of published checkpoints."""
