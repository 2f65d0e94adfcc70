"""Where results go: names, formats, and files that must not be overwritten."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import OutputError
from ..files import require_writable
from .output import LARGE, Format, is_prediction, require_spatialdata


def choose_targets(slides: Sequence[Path], out: str | Path, form: Format | None) -> list[tuple[Path, Format | None]]:
    """The output of each slide, and its format; None: by its size, see `sized`.

    Parameters
    ----------
    out
        A .h5ad or .zarr, or a folder, which a name that ends in "/" always is.

    Raises
    ------
    InputError
        If `out` has no name, does not fit the format or the number of slides, or two slides would share an output.
    """
    if form is Format.SPATIALDATA:
        require_spatialdata()
    folder = str(out).endswith("/") or Path(out).is_dir()
    out = Path(out)
    if re.match(r"\w+:/", str(out)):  # Path has made one slash of two
        raise OutputError(f"--out {out}: a URL; give a path, or run the slides with stpath run, which writes to URLs")
    if out.name in ("", ".h5ad", ".zarr"):
        raise OutputError(f"--out {str(out)!r}: no name; give a .h5ad or .zarr, or a folder")
    if out.suffix == ".zarr" or (out.suffix == ".h5ad" and not folder):
        if len(slides) > 1:
            raise OutputError(f"--out {out}: one file for {len(slides)} slides; give a folder")
        if form is not None and form.suffix != out.suffix:
            raise OutputError(f"--out {out}: --format {form} is written to a name that ends in {form.suffix}")
        return [(out, form or Format(out.suffix[1:]))]
    if re.fullmatch(r"\.[^\W\d]\w*", out.suffix) and not folder:  # results_2026.11.26 is no file of the type 26
        raise OutputError(f"--out {out}: give a name that ends in .h5ad or .zarr, or a folder")
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: a file is there; give a folder")
    targets = [out / f"{slide_name(slide)}{(form or Format.H5AD).suffix}" for slide in slides]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            first = slides[targets.index(target)]
            raise OutputError(f"{first} and {slides[i]} would both be written to {target}; run them into two folders")
    return [(target, form) for target in targets]


def slide_name(slide: str | Path) -> str:
    """The name of a slide's outputs: that of its file without its endings."""
    return Path(str(slide).rstrip("/")).name.removesuffix(".zip").rsplit(".", 1)[0]


def sized(target: Path, form: Format | None, shape: tuple[int, int], dtype: npt.DTypeLike) -> tuple[Path, Format]:
    """The output and its format, by its size where nothing else is said: h5ad, or zarr for large ones."""
    if form is not None:
        return target, form
    form = Format.ZARR if shape[0] * shape[1] * np.dtype(dtype).itemsize > LARGE else Format.H5AD
    return target.with_suffix(form.suffix), form


def require_target(target: Path, inputs: Sequence[Path]) -> None:
    """Check that a result may be written at `target`.

    Raises
    ------
    InputError
        If it is an input, something that stpath did not write, or cannot be written.
    """
    if any(target.resolve() == path.resolve() for path in inputs):
        raise OutputError(f"--out: {target} would overwrite an input; choose another name or folder")
    if target.exists() and not is_prediction(target):
        raise OutputError(f"--out: {target} exists and is not a prediction by stpath; choose another name or folder")
    require_writable(target)
