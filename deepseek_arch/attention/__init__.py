"""Multi-head latent attention and its masks."""
