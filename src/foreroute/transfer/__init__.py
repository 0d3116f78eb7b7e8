"""Move experts into slots: the queue of requests, and the threads that read files.

numpy copies and threads read; only copier.py, and making an arena, import torch.
"""

from foreroute.transfer.base import Completion, Transfer
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from foreroute.transfer.queue import TransferQueue

__all__ = ["Completion", "DiskTransfer", "Transfer", "TransferQueue", "allocate_slots"]
