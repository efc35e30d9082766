"""Measures how long tactics take, in worker processes, and describes the machine."""
