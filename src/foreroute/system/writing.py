"""Files that are written: room for them, and bytes that are on the disk before the next ones are."""

import errno
import os
import shutil
from pathlib import Path

# Windows writes text without O_BINARY.
WRITE_FLAGS: int = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
# To sync a file Windows wants it open for writing.
SYNC_FLAGS: int = os.O_RDWR if os.name == "nt" else os.O_RDONLY


def moves_open_files() -> bool:
    """Whether a file that is open can be renamed and removed."""
    return os.name != "nt"


def reserve(fd: int, nbytes: int, folder: Path) -> None:
    """Make an open file of `folder` `nbytes` long, with room on the disk for all of them.

    Where the system cannot allocate, room is looked for once: another program may still take it.

    Raises:
        OSError: with ENOSPC, there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
        return
    if shutil.disk_usage(folder).free < nbytes - os.fstat(fd).st_size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(fd, nbytes)


def sync_bytes(fd: int) -> None:
    """Return when what was written to a file is on its disk; its times may be written later."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def allocated_bytes(path: Path) -> int:
    """Bytes that a file takes of its disk; its length where the system does not say."""
    status = path.stat()
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else blocks * 512
