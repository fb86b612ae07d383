"""The CUDA backend's kernels: Triton, proven in its interpreter. Nothing here is imported on a machine without torch and triton."""
