"""Floor 1 on the GPU: Triton kernels, one file an op, over arrays, sizes and strides.

``OPS`` names the ops that have a kernel here; ``flowops.dispatch`` reads it without importing
Triton. No op has one in this version.
"""

OPS: frozenset[str] = frozenset()
