"""Reads what people write: model names, config.json files, launch lines, options."""
