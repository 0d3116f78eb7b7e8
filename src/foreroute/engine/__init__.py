"""Who composes it? The loader that wires the parts together, and the step that a token takes through them."""
