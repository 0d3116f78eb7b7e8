"""Small files of experts, and reads of them, for the tests of this folder."""

import os
import random

import xxhash

from foreroute.transfer.memory import allocate_slots
from foreroute.types import Copy, Read

SLOT_BYTES = 16384


def write_file(path, num_bytes, seed=0):
    """Random bytes in a file: (path as text, the bytes)."""
    content = random.Random(seed).randbytes(num_bytes)
    path.write_bytes(content)
    return os.fspath(path), content


def flat(nbytes, src_offset=0, dst_offset=0):
    """A plain copy."""
    return Copy(src_offset, dst_offset, 1, nbytes, 1, nbytes, 1)


def whole(path, offset, nbytes, checksum=None):
    """One range that goes to the slot's start as it is."""
    return Read(path, offset, nbytes, (flat(nbytes),), checksum)


def digest(content):
    return xxhash.xxh3_64_intdigest(content)


def make_slots(num_slots=4, slot_bytes=SLOT_BYTES):
    return allocate_slots(num_slots, slot_bytes)[1]
