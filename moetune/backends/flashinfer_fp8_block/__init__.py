"""The rival of FlashInfer's `cutlass_fused_moe` for e4m3 weights in blocks of 128×128, which takes no tactic."""
