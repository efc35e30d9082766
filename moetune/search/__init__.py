"""Which tactic next. Pure: yields batches, receives times, never measures. No torch."""
