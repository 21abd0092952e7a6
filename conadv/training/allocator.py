"""Keep freed memory in the process on Linux: activations of one step are the activations of the
next.

glibc gives large freed blocks back to the system and gets them again page by page, every step. For
convolutional networks on a CPU that costs time in every step (docs/experiments.md).
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**31 - 1  # mallopt takes an int
_LARGEST_OLD = 32 * 2**20  # the limit of the mmap threshold in glibc before 2.35


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 2 GiB for later use; True if it agreed, False
    without glibc.

    The process's memory then stays at its peak. Meant for programs that train, at their start.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    kept = mallopt(_M_MMAP_THRESHOLD, _LARGE) or mallopt(_M_MMAP_THRESHOLD, _LARGEST_OLD)
    return bool(kept and mallopt(_M_TRIM_THRESHOLD, _LARGE))
