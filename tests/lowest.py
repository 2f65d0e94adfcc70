"""Prints what the runtime needs as pip's requirements: the lowest versions that pyproject.toml allows, of all extras.

With --all-but-numpy: what it needs on a CPU, for an environment whose numpy another package holds down.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

EXTRAS = ("cpu", "wsi", "view", "openvino", "plot", "spatialdata", "remote", "ray")  # those that run without a GPU


def needed(extras: Sequence[str]) -> list[str]:
    """Each requirement of the runtime and of extras."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


def lowest() -> list[str]:
    """Each requirement of the runtime and of its extras, at its lower bound."""
    lines = needed(EXTRAS)
    return [re.sub(r">=([\w.]+).*", r"==\1", line) for line in lines]


if __name__ == "__main__":
    without_numpy = [line for line in needed(["cpu"]) if not line.startswith("numpy")]
    print("\n".join(without_numpy if "--all-but-numpy" in sys.argv else lowest()))  # noqa: T201
