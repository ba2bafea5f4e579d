"""Throughput benchmarks, each against the same algorithm in plain PyTorch, and the demo."""
