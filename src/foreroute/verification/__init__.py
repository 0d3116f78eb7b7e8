"""Is it the same? The engine compared with the resident model, layer by layer and bit for bit."""
