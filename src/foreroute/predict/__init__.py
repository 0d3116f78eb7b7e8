"""What comes next? Predictors that guess the next MoE layer's experts, and how they are scored."""
