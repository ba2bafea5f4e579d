"""Triton kernels, one module an op. They know arrays, sizes and strides, and no autograd."""
