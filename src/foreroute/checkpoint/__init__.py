"""Where are the bytes? Checkpoint files and packed stores: which range of which file holds an expert."""
