"""How time is taken."""
