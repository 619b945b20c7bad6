"""Building blocks without attention or routing: linear layers, norms, rotary embeddings, MLP."""
