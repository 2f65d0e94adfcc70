"""How much memory a device has to give, and how much this process took."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import OptionError

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def available_on_host() -> int:
    """Bytes that this process may still take: what the system has available, within the limit of its cgroup."""
    found = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        found.append(int(match[1]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text) - int(used.read_text()))
    return min(found) if found else memory_of_host()


def memory_of_host() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_of_process(field: str = "VmHWM") -> int:
    """Bytes that this process takes of the machine's memory ("VmRSS") or took at the most ("VmHWM").

    Not ru_maxrss: a child's starts at what its parent held when it forked.
    """
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, f"Linux tells {field} of every process"
    return int(match[1]) * 1024


def parse_bytes(text: str) -> int:
    """Bytes from '6G', '500M', '1.5 GB' or a plain number; K, M, G and T are powers of 1,024.

    Raises
    ------
    InputError
        If it is none of these, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise OptionError(f"memory {text!r} is no size; give a number with K, M, G or T, such as 6G")
    return size
