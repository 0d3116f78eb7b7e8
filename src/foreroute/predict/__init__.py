"""Which experts come next? Predictors of the next MoE layer's experts, and how they are scored."""
