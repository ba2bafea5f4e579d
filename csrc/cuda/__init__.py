"""CUDA C++ device code: what ``flowops.cuda_runtime`` compiles and launches."""
