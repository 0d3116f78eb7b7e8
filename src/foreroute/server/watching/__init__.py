"""Monitoring: the live page, its feed, and metrics."""
