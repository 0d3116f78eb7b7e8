"""Track which expert is in which slot, and choose what to evict.

Pure Python: no torch, no threads, no clock.
"""
