"""The batched Triton GEMM, which vLLM runs on the expert-major rows of DeepEP low latency and NIXL."""
