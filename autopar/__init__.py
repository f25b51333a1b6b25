"""Plans and runs the parallel training of a plain PyTorch model on a measured cluster."""
