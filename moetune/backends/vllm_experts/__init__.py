"""Rivals that run vLLM's own experts classes: DeepGEMM's kernels for fp8 blocks, and vLLM's CUTLASS kernels for fp8."""
