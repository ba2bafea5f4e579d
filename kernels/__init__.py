"""Floor 1 on the GPU: Triton kernels, one file an op, over arrays, sizes and strides. None yet."""
