"""What this machine is: its memory, CPU and GPUs, and the packages that are installed."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import OptionError, first_line

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
CGROUPS = Path("/sys/fs/cgroup")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def available_on_host() -> int:
    """Bytes that this process can still allocate: what the system has available, within the limits of its cgroups."""
    meminfo = Path("/proc/meminfo")
    match = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    of_system = int(match[1]) * 1024 if match else memory_of_host()
    return max(0, min([of_system, *available_in_cgroups()]))


def available_in_cgroups(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that each memory cgroup of this process has left: its own and those around it, versions 1 and 2.

    Cached file pages that the kernel can drop at once (inactive_file of memory.stat) count as free.

    Parameters
    ----------
    root
        Where cgroups are mounted: of version 2, or the folder with `memory` of version 1.
    membership
        The file that lists the cgroups of this process.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, mount = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mount = root / "memory"
        else:
            continue
        inside = mount / path.lstrip("/")
        # In a container the path may be the host's, which is not mounted: then the root is the container's own.
        for folder in dict.fromkeys([inside, *inside.parents, mount]):
            if folder == mount or mount in folder.parents:
                free += _free_of(folder, *names)
    return free


def _free_of(folder: Path, limit: str, used: str, inactive: str) -> list[int]:
    """Bytes that one cgroup has left; an empty list if it has no limit."""
    try:
        text, taken = (folder / limit).read_text().strip(), int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [int(text) - taken + int(stat.get(inactive, 0))] if text.isdigit() else []


def memory_of_host() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def memory_of_process(field: str = "VmHWM") -> int:
    """Memory that this process uses now ("VmRSS") or used at its peak ("VmHWM"), in bytes.

    Not ru_maxrss: in a child process that starts at what its parent held when it forked.
    """
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, f"Linux tells {field} of every process"
    return int(match[1]) * 1024


def give_back_memory() -> None:
    """Give memory that is free within this process back to the system, where the C library can (malloc_trim)."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def parse_bytes(size: int | str) -> int:
    """Bytes from "6G", "500M", "1.5 GB" or a number; K, M, G and T are powers of 1,024.

    Raises
    ------
    InputError
        If it is none of these, or not above 0.

    Examples
    --------
    >>> parse_bytes("1.5 GB")
    1610612736
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(size), re.IGNORECASE | re.ASCII)
    number = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if number <= 0:
        raise OptionError(f"memory {size!r} is not a size; give a number with K, M, G or T, such as 6G")
    return number


def network_setting_at_fault(error: BaseException) -> str | None:
    """How to fix an environment variable that keeps connections from starting; None if there is none.

    Either a certificate file that does not exist, or a proxy of a kind that the HTTP library does not support.
    """
    for name in CERTIFICATES:
        if (path := os.environ.get(name)) and not Path(path).exists():
            return f"{name} names {path}, which is not there: unset it, or give a file of certificates"
    chain, text = error, ""
    while chain is not None and len(text) < 10_000:
        text, chain = f"{text} {type(chain).__name__} {chain}", chain.__cause__ or chain.__context__  # type: ignore[assignment]
    if re.search("prox|socks", text, re.IGNORECASE):
        for name in PROXIES:
            if value := os.environ.get(name) or os.environ.get(name.lower()):
                fix = "pip install 'httpx[socks]', or unset it" if value.startswith("socks5") else "correct or unset it"
                return f"the proxy of {name}={value} cannot be used ({first_line(error)}): {fix}"
    return None


def cores() -> int:
    """CPU cores that this process may use; two threads of one core count once, as they share what multiplies."""
    allowed = sorted(os.sched_getaffinity(0))
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    if not all(path.exists() for path in siblings):
        return len(allowed)
    return len({path.read_text() for path in siblings})


def cpu_features() -> list[str]:
    """Which of CPU_FEATURES this machine's CPU has."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    return [feature for feature in CPU_FEATURES if feature in flags]


def cpu_name() -> str:
    """The CPU's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def nvidia_gpus() -> list[str]:
    """Names and memory of the NVIDIA GPUs, from the driver; empty if there is no driver or no GPU.

    Source: https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__DEVICE.html.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
        driver.cuDeviceGet(ctypes.byref(device), index)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        found.append(f"{name.value.decode(errors='replace')}, {memory.value // 2**20} MiB")
    return found


def installed(package: str) -> str | None:
    """The version of an installed package, by its name on the package index; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
