"""Build a transformers model without its experts: configs, names, dense weights, the map to stored bytes."""
