"""How is one MoE layer computed? The step that a token takes, and the pool of experts that it takes them from."""
