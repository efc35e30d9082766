"""FlashInfer's `cutlass_fused_moe` on Hopper."""
