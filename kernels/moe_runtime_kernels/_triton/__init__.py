"""Triton kernels, imported by the first launch of an operation and by nothing before it."""
