"""Move experts into slots: the queue of requests, and the threads that read files.

Threads read, and numpy copies: torch only makes an arena, and copies from it.
"""
