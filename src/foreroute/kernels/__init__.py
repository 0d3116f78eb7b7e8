"""Compute experts, one or many, on the CPU and on the GPU."""
