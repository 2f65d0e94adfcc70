"""STPath in PyTorch: the reference that every engine is held to, its training and its evaluation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_checkpoint, save_checkpoint
    from .model import STPath

__all__ = ["STPath", "load_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import torch only when it is asked for: `stpath --help` loads this package's commands."""
    if name == "STPath":
        from .model import STPath

        return STPath
    if name in ("load_checkpoint", "save_checkpoint"):
        from . import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
