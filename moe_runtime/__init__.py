"""Mixture-of-Experts models that start from dense checkpoints, on a kernel-backed PyTorch runtime."""
