"""Defines layer, regime, ladder, tactic and environment: pure data. Does not import torch."""
