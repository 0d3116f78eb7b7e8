"""The Triton backend: experts computed on a GPU, read through their slots."""
