"""One small file a kernel: the jitted code, and one plain function that launches it into tensors that are handed in."""
