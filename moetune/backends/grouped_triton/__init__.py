"""The Triton grouped GEMM of vLLM's and SGLang's parametrization."""
