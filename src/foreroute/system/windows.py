"""The one call of Windows that Python has no name for: opening a file past its cache."""

import errno
import os
from typing import Any

from foreroute.system.modules import optional

_GENERIC_READ = 0x80000000
_SHARE_READ_WRITE_DELETE = 0x1 | 0x2 | 0x4
_OPEN_EXISTING = 3
_FILE_FLAG_NO_BUFFERING = 0x20000000
# ERROR_INVALID_FUNCTION, ERROR_NOT_SUPPORTED, ERROR_INVALID_PARAMETER: of file systems that cannot.
_REFUSALS = (1, 50, 87)


def is_here() -> bool:
    """Whether this is Windows."""
    return os.name == "nt"


def open_unbuffered(path: str) -> int:
    """Open a file with FILE_FLAG_NO_BUFFERING; return a descriptor for Python's own reads.

    Raises:
        OSError: it cannot be opened; with EINVAL, its file system has no such reads.
    """
    # Some milliseconds that every other system is spared.
    import ctypes

    native: Any = ctypes
    create = native.WinDLL("kernel32", use_last_error=True).CreateFileW
    create.restype = ctypes.c_void_p
    create.argtypes = [
        ctypes.c_wchar_p,
        *[ctypes.c_uint32] * 2,
        ctypes.c_void_p,
        *[ctypes.c_uint32] * 2,
        ctypes.c_void_p,
    ]
    handle = create(path, _GENERIC_READ, _SHARE_READ_WRITE_DELETE, None, _OPEN_EXISTING, _FILE_FLAG_NO_BUFFERING, None)
    if handle == ctypes.c_void_p(-1).value:
        code = native.get_last_error()
        if code in _REFUSALS:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
        # Windows' own Python makes the errno of it.
        raise OSError(errno.EIO, native.FormatError(code), path, code)
    fd: int = optional("msvcrt").open_osfhandle(handle, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    return fd
