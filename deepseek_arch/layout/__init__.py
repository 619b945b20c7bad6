"""Facts that follow from a config alone: tensors, names, sizes."""
