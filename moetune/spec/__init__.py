"""What is asked: layer, regime, ladder, tactic, environment. Pure data, no torch."""
