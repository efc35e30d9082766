"""Inside a running engine: its own warm-up asks moetune."""
