"""Shows profiles, plans and lists in a terminal. Does not import torch."""
