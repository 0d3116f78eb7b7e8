"""Families whose experts do not go through transformers' shared experts interface: an adapter for each."""
