"""Fuzz targets: each reader of moetune is given mutated inputs, and may raise moetune's own errors only.

`python -m tests.fuzz` runs them for long; `test_fuzz.py` runs each for a moment.
"""
