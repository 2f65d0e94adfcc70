"""What a failed proof leaves behind: one case that misses its bar, to be repeated elsewhere.

bundle/
  inputs.npz    the case: slide, context, genes; `stpath verify --slide` takes it
  outputs.npz   embedding [N, d] and expression [N, G]: the reference, the engine, and PyTorch in the same precision
  bundle.json   the comparison, the command, versions, hashes, the machine
  README.md     how to repeat it

No array holds a pickle.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stpath_runtime.errors import FileError
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide

from .proof import Case, Floats, describe

INPUTS, OUTPUTS, ABOUT, README = "inputs.npz", "outputs.npz", "bundle.json", "README.md"

TEXT = """\
# A comparison that misses its bar

{comparison}.

It was found by

    {command}

and is repeated, beside the whole proof, by

    {repeat}

with exit code 3 for as long as it fails.

- `inputs.npz`: the case. coords [N, 2], features [N, F], barcodes, organ and technology; where it has a context its
  context_ids, context_counts (raw) and context_genes; and genes, those decoded (all, where there is no such array).
- `outputs.npz`: embedding [N, d] and expression [N, G] of the reference in float64, of the engine, and of PyTorch in
  the engine's precision.
- `bundle.json`: versions, hashes of the engine and the checkpoint, the machine.

NumPy reads the arrays with `allow_pickle=False`.
"""


def write_bundle(
    folder: Path,
    case: Case,
    outputs: Mapping[str, tuple[Floats, Floats]],
    row: Mapping[str, Any],
    about: dict[str, Any],
) -> None:
    """Write a bundle into a folder that is there.

    Parameters
    ----------
    outputs
        (embedding, expression) of "reference", "engine" and "pytorch".
    row
        The comparison, as the proof has it.
    about
        The commands ("command", and "repeat"), versions, hashes and the machine.
    """
    np.savez_compressed(folder / INPUTS, **_arrays(case))
    arrays: dict[str, Any] = {
        f"{who}_{what}": output
        for who, pair in outputs.items()
        for what, output in zip(("embedding", "expression"), pair, strict=True)
    }
    np.savez_compressed(folder / OUTPUTS, **arrays)
    (folder / ABOUT).write_text(json.dumps(plain({"comparison": row, **about}), indent=1) + "\n", encoding="utf-8")
    text = TEXT.format(comparison=describe(row), **about)
    (folder / README).write_text(text, encoding="utf-8", errors="backslashreplace")


def read_case(path: Path) -> Case:
    """Read the case of a bundle's inputs.npz.

    Raises
    ------
    InputError
        If it is missing, damaged, no such file, or holds a slide that `Slide` refuses.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        case, slide_name, organ, technology = (str(arrays[key]) for key in ("case", "slide", "organ", "technology"))
        coords, features, barcodes = (arrays[key] for key in ("coords", "features", "barcodes"))
        given = bool(arrays["given"])
        context = None
        if "context_ids" in arrays:
            genes = arrays["context_genes"].tolist()
            context = Context(arrays["context_ids"].tolist(), arrays["context_counts"], genes)
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; expected the {INPUTS} of a bundle") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        what = f"no {error} in it" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise FileError(f"{path}: not the {INPUTS} of a bundle, or damaged ({what})") from error
    slide = Slide(coords, features, barcodes.tolist(), organ or None, technology or None, slide_name)
    genes = arrays["genes"].tolist() if "genes" in arrays else None
    return Case(f"{case} ({path})", slide, context, genes, given)


def plain(value: Any) -> Any:
    """A value as JSON has it: what is not finite is null."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _arrays(case: Case) -> dict[str, Any]:
    slide, context = case.slide, case.context
    arrays = {
        "case": case.name,
        "given": case.given,
        "slide": slide.name,
        "organ": slide.organ or "",
        "technology": slide.technology or "",
        "coords": slide.coords,
        "features": slide.features,
        "barcodes": np.array(slide.obs_names),
    }
    if context is not None:
        arrays |= {
            "context_ids": np.asarray(context.ids),
            "context_counts": np.asarray(context.counts, np.float32),
            "context_genes": np.array(context.genes),
        }
    return arrays | ({"genes": np.array(case.genes)} if case.genes is not None else {})
