"""The compute backend for block-quantised weights: ggml's CPU kernels on our slots, called through ctypes."""
