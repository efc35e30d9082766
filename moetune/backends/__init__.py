"""Kernels that can be tuned."""
