"""The backend of FlashInfer's `cutlass_fused_moe`."""
