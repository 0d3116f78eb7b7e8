"""The step that computes one MoE layer, and the pool of experts it uses."""
