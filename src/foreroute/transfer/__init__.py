"""Move experts into slots: the queue of requests, and the threads that read files.

numpy copies and threads read; only copier.py, and making an arena, import torch.
"""
