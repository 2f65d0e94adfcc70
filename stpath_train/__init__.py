"""STPath in PyTorch: the reference that every engine is held to."""

from .checkpoint import load_checkpoint, save_checkpoint
from .model import STPath

__all__ = ["STPath", "load_checkpoint", "save_checkpoint"]
