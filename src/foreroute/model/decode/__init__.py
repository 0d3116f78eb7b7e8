"""What makes decoding quicker, where a model's bits need not be transformers': norms, attention, whole layers."""
