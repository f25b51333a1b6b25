"""One op a file: plain reference, Triton kernel, launcher, autograd."""
