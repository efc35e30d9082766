"""Plain PyTorch algorithms of one MoE layer, on any machine."""
