"""The viewer in a notebook."""

from __future__ import annotations

import atexit
import tempfile
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..engine import Engine
from ..results.output import write_h5ad
from .server import require_starlette, served
from .shown import open_shown

if TYPE_CHECKING:
    from anndata import AnnData

# What may show the page in a frame: Jupyter on this machine, and Visual Studio Code.
NOTEBOOKS = "http://localhost:* http://127.0.0.1:* https://localhost:* https://127.0.0.1:* vscode-webview:"


class View:
    """A viewer that runs until it is closed, or the process ends; a notebook shows its page.

    Attributes
    ----------
    address
        Of the page, token included.
    """

    def __init__(self, address: str, height: int, kept: ExitStack) -> None:
        self.address, self._height, self._kept = address, height, kept

    def __repr__(self) -> str:
        return f"View({self.address!r})"

    def _repr_html_(self) -> str:
        return (
            f'<iframe src="{escape(self.address)}" width="100%" height="{self._height}" allow="clipboard-write" '
            'style="border: 0"></iframe>'
        )

    def close(self) -> None:
        """End the viewer."""
        self._kept.close()


def view(
    prediction: AnnData | str | Path,
    engine: Engine | str | Path | None = None,
    *,
    image: str | Path | None = None,
    height: int = 700,
) -> View:
    """Show a prediction in a notebook: the page of `stpath view`, served to this machine until the kernel ends.

    Parameters
    ----------
    prediction
        What `Engine.predict` gave, or a file of it; with `embeddings=True` and its engine any gene can be shown.
    engine
        What predicted it, or its folder; None: the genes that the prediction holds.
    image
        The slide image, to show below the spots.
    height
        Pixels of the frame.

    Raises
    ------
    InputError
        If it is no prediction, another engine predicted it, or the viewer's libraries are not installed.

    Examples
    --------
    >>> shown = view(embedded_path, engine)
    >>> shown.address.startswith("http://127.0.0.1:")
    True
    >>> shown.close()
    """
    require_starlette()
    loaded = Engine.load(engine) if isinstance(engine, str | Path) else engine
    with ExitStack() as opening:
        if isinstance(prediction, str | Path):
            path = Path(prediction)
        else:
            path = Path(opening.enter_context(tempfile.TemporaryDirectory())) / "prediction.h5ad"
            write_h5ad(prediction, path)
        shown = opening.enter_context(open_shown(path, loaded, Path(image) if image is not None else None))
        address = opening.enter_context(served(shown, ancestors=NOTEBOOKS))
        kept = opening.pop_all()
    atexit.register(kept.close)
    return View(address, height, kept)
