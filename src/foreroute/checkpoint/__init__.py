"""Where are the bytes? Finds which range of which file, checkpoint or packed store, holds an expert."""
