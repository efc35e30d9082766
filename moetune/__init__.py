"""moetune measures which kernel tactic is fastest for the MoE load that each expert-parallel rank will really see."""
