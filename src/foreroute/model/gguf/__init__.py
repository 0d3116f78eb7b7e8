"""Read a GGUF file as a model of transformers: its settings, the names of its tensors, and what else differs."""
