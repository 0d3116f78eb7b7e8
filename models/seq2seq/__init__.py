"""The encoder-decoder model that ships: its rows, its fast training form, its figures."""
