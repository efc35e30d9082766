"""Inside a running engine: FlashInfer's ops are tuned for a regime while the engine warms up."""
