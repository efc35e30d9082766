"""Inside a running engine: its ops run what is tuned for a regime, from the store or by a warm-up."""
