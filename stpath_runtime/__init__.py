"""Runs STPath engines: slide features in, predicted gene expression out, without torch.

>>> from stpath_runtime import Engine, read_slide
>>> engine = Engine.load("engine/")
>>> adata = engine.predict(read_slide("INT2.h5", organ="Kidney", technology="Visium"), genes=["GATA3", "ERBB2"])
"""

from .context import Context
from .engine import Engine
from .errors import InputError, InputWarning, ParityError
from .readers import read_slide
from .slide import Slide

__all__ = ["Context", "Engine", "InputError", "InputWarning", "ParityError", "Slide", "read_slide"]
__version__ = "0.1.0"
