"""What the GPU tier is worth, on one GPU in ten minutes: python -m benchmarks.gpu."""
