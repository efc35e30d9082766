"""Runs a real MoE block with attention DP over one or more ranks, and measures its tokens/s with different tactics."""
