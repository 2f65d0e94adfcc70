"""Runs STPath engines: slide features in, predicted gene expression out, without torch.

>>> from stpath_runtime import Engine, read_slide
>>> engine = Engine.load(engine_path)
>>> adata = engine.predict(read_slide(slide_path, organ="Kidney", technology="Visium"), genes=["GENE1", "GENE2"])
"""

from typing import TYPE_CHECKING, Any

from .encoding.attention import Attention
from .engine import Engine
from .errors import InputError, InputWarning, ParityError
from .flow_engine import FlowEngine
from .moved import keep_old_paths
from .readers import read_slide
from .slides.context import Context
from .slides.slide import Slide

if TYPE_CHECKING:
    from .viewer.lazy import open_lazy
    from .viewer.notebook import view

__all__ = ["Attention", "Context", "Engine", "FlowEngine", "InputError", "InputWarning", "ParityError", "Slide"]
__all__ += ["open_lazy", "read_slide", "view"]
__version__ = "0.1.0"

keep_old_paths()


def __getattr__(name: str) -> Any:
    """What looks at predictions is imported when it is asked for: predicting does without."""
    if name == "open_lazy":
        from .viewer.lazy import open_lazy

        return open_lazy
    if name == "view":
        from .viewer.notebook import view

        return view
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
