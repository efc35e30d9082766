"""Computes and samples the load that one rank's kernel receives."""
