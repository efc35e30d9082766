"""One HTML page, one CSV and one short table from several profiles. Imports no torch."""
