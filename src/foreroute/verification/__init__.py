"""Compare the engine with the resident model, layer by layer and bit for bit."""
