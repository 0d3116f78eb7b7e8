"""Who moves experts: the order of requests, and the threads that read files into slots.

numpy copies, threads read; torch is imported by copier.py alone, and by an arena that is made.
"""

from foreroute.transfer.base import Completion, Transfer
from foreroute.transfer.disk import DiskTransfer
from foreroute.transfer.memory import allocate_slots
from foreroute.transfer.queue import TransferQueue

__all__ = ["Completion", "DiskTransfer", "Transfer", "TransferQueue", "allocate_slots"]
