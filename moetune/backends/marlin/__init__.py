"""The backend of vLLM's Marlin MoE kernel, `moe_wna16_marlin_gemm`, for weights of 4 bits."""
