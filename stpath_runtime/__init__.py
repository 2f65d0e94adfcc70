"""Runs STPath engines: slide features in, predicted gene expression out, without torch.

>>> from stpath_runtime import Engine, read_slide
>>> engine = Engine.load(engine_path)
>>> adata = engine.predict(read_slide(slide_path, organ="Kidney", technology="Visium"), genes=["GENE1", "GENE2"])
"""

from .encoding.attention import Attention
from .engine import Engine
from .errors import InputError, InputWarning, ParityError
from .moved import keep_old_paths
from .readers import read_slide
from .slides.context import Context
from .slides.slide import Slide

__all__ = ["Attention", "Context", "Engine", "InputError", "InputWarning", "ParityError", "Slide", "read_slide"]
__version__ = "0.1.0"

keep_old_paths()
