"""Plans of training and serving over many devices, from a config and a layout alone; needs no PyTorch."""
