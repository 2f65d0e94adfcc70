"""What numbers depend on beside the code: the machine, the libraries, and the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

from ...machine import cores, cpu_features, cpu_name, installed, memory_of_host, nvidia_gpus

LIBRARIES = (
    *("stpath-engine", "numpy", "scipy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt"),
    *("tensorrt-rtx-cu13", "torch", "torch_geometric"),
)


def machine() -> dict[str, Any]:
    """The CPU, cores that this process may use, memory and GPUs."""
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "features": cpu_features(),
        "memory_bytes": memory_of_host(),
        "gpus": nvidia_gpus(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that are installed."""
    return {name: found for name in LIBRARIES if (found := installed(name)) is not None}


def commit() -> str | None:
    """The commit of the checkout that this package is of, marked -dirty where files differ; None outside of one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # not the checkout that an environment happens to lie in
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None
