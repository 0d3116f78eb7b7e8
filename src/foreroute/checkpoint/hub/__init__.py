"""Which files of a hub repository are a checkpoint? Chooses them, and has huggingface_hub download them."""
