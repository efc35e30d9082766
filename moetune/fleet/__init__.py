"""Spreads the buckets of many questions over the GPUs of a cluster."""
