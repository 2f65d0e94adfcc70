"""The command `stpath`."""

from .app import main

__all__ = ["main"]
