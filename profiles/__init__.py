"""Profiles measured for release, packaged read-only; see README.md."""
