"""Prints the lowest versions of what the runtime needs that pyproject.toml allows, as pip's requirements."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

EXTRAS = ("cpu", "openvino", "plot", "spatialdata", "remote", "ray")  # those that run without a GPU


def lowest() -> list[str]:
    """Each requirement of the runtime and of its extras, at its lower bound."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return [re.sub(r">=([\w.]+).*", r"==\1", line) for line in lines]


if __name__ == "__main__":
    print("\n".join(lowest()))  # noqa: T201
