"""Parsing and rendering, nothing else."""
