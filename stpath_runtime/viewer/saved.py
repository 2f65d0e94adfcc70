"""A prediction as one HTML file that needs no server: the page, the standardised embeddings, and the head of its genes.

    float16 n [N, d]    standardised embeddings, less their mean over the spots
    A [G, d]            weights of the head: float16, or 8 bits with a scale a gene
    c [G], q [G]        the expression at the mean, and the sum of squares about it over all spots
    S [d, d]            sum of products of n, float32

The page decodes genes, and computes regions and correlations, as `statistics` does.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OptionError, PredictionError
from ..files import written_whole
from .app import PAGE, describe
from .shown import Shown
from .statistics import Embedded, Floats
from .tissue import TILE, Tissue

MODULES = ("colours.js", "files.js", "map.js", "search.js", "stage.js", "state.js", "tables.js")  # what is imported
MOST_HALF = 4_000  # genes whose weights are kept in float16; of more in 8 bits
MOST_SPOTS = 50_000  # that a browser takes as one page
PICTURE = 2_048  # pixels of the tissue's longer side, at most
POLICY = "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:"


def save_page(shown: Shown, path: Path, genes: Sequence[str] | None = None) -> float:
    """Write a prediction as one HTML file, and return how far its genes are from the engine's, relative L2.

    Parameters
    ----------
    genes
        Names of those to keep; None means all.

    Raises
    ------
    InputError
        If the prediction has no embeddings or too many spots, a gene is unknown, or the file cannot be written.
    """
    if not isinstance(shown.expression, Embedded):
        raise PredictionError(f"{shown.path}: --save needs embeddings and --engine; predict it with --embeddings")
    if len(shown) > MOST_SPOTS:
        raise OptionError(f"{shown.path}: {len(shown):,} spots; a saved page takes {MOST_SPOTS:,}: serve it instead")
    chosen = [shown.genes.find(name) for name in dict.fromkeys(genes)] if genes is not None else range(len(shown.genes))
    columns = np.unique(np.asarray(chosen, np.int64))
    arrays, stored, error = _arrays(shown.expression, columns)
    known = shown.genes.vocabulary
    names = [[shown.genes.names[gene], known.ensembl_ids[gene], *known.aliases[gene]] for gene in columns.tolist()]
    texts = {"names": names, "spots": list(shown.spot_names)}
    info = describe(shown) | {"genes": len(columns), "weights": stored, "error": error}
    if info["first"] not in {name for name, *_ in names}:
        info["first"] = names[0][0]
    jpeg = _picture(shown.tissue) if shown.tissue is not None else b""
    if shown.tissue is not None:
        side = max(shown.tissue.size)
        info["tissue"] = {"width": side, "height": side, "levels": 1, "tile": side}
    arrays["coords"] = np.ascontiguousarray(shown.coords, "<f4")
    with written_whole(path) as partial:
        partial.write_text(_page(info, texts, arrays, jpeg), encoding="utf-8")
    return error


def _arrays(expression: Embedded, columns: npt.NDArray[np.int64]) -> tuple[dict[str, npt.NDArray[Any]], str, float]:
    """What the page computes with, how the weights are kept, and how far its genes are from exact, relative L2."""
    n = expression.standardised()  # [N, d]
    mean = n.mean(axis=0, dtype=np.float64)
    centred = (n - mean).astype("<f2")
    kept = centred.astype(np.float32)
    weights, offsets = expression.head.weights[columns], expression.head.offsets[columns]
    at_mean = weights @ mean.astype(np.float32) + offsets
    arrays: dict[str, npt.NDArray[Any]] = {"embedding": centred}
    if len(columns) <= MOST_HALF:
        stored, arrays["weights"] = "float16", weights.astype("<f2")
        found = arrays["weights"].astype(np.float32)
    else:
        scale = np.maximum(np.abs(weights).max(axis=1), np.finfo(np.float32).tiny) / 127
        stored, arrays["weights"] = "int8", np.round(weights / scale[:, None]).astype(np.int8)
        arrays["scale"] = scale.astype("<f4")
        found = arrays["weights"].astype(np.float32) * scale[:, None]
    products = kept.T @ kept
    arrays["products"] = products.astype("<f4")
    arrays["offsets"] = at_mean.astype("<f4")
    arrays["squares"] = np.einsum("gi,gi->g", found @ products, found).astype("<f4")
    return arrays, stored, _error(n, kept, weights, offsets, found, at_mean)


def _error(n: Floats, kept: Floats, weights: Floats, offsets: Floats, found: Floats, at_mean: Floats) -> float:
    """Relative L2 of the expression that the page decodes, over all spots and genes, a part of the genes at a time."""
    off, whole = 0.0, 0.0
    for start in range(0, len(weights), 1_024):
        part = slice(start, start + 1_024)
        exact = n @ weights[part].T + offsets[part]
        off += float(np.square(kept @ found[part].T + at_mean[part] - exact).sum(dtype=np.float64))
        whole += float(np.square(exact).sum(dtype=np.float64))
    return (off / whole) ** 0.5 if whole else 0.0


def _picture(tissue: Tissue) -> bytes:
    """The tissue as one square JPEG, from (0, 0) of level 0 on."""
    from PIL import Image

    level = next(level for level in range(tissue.levels) if max(tissue.size) <= PICTURE << level)
    side = -(-max(tissue.size) // (1 << level))
    whole = Image.new("RGB", (side, side), "white")
    for x in range(-(-tissue.size[0] // (TILE << level))):
        for y in range(-(-tissue.size[1] // (TILE << level))):
            square = tissue.picture.square(x * TILE << level, y * TILE << level, TILE << level)
            whole.paste(Image.fromarray(square), (x * TILE, y * TILE))
    written = io.BytesIO()
    whole.save(written, "JPEG", quality=80)
    return written.getvalue()


def _page(
    info: Mapping[str, Any], texts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]], jpeg: bytes
) -> str:
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    imports = {f"page/{name}": _data("text/javascript", _script(name).encode()) for name in MODULES}
    parts = [f'<script type="importmap">{_json({"imports": imports})}</script>']
    parts += [f'<script type="application/json" id="data-{name}">{_json(value)}</script>' for name, value in
              {"info": info, **texts}.items()]  # fmt: skip
    for name, content in (*((name, array.tobytes()) for name, array in arrays.items()), ("tissue", jpeg)):
        parts.append(f'<script type="text/plain" id="data-{name}">{base64.b64encode(content).decode()}</script>')
    for name in ("saved.js", "main.js"):
        parts.append(f'<script type="module">{_script(name)}</script>')
    page = re.sub(r'<link rel="stylesheet"[^>]*>', lambda _: f"<style>{style}</style>", page)
    page = re.sub(r"<title>.*?</title>", lambda _: f"<title>{html.escape(str(info['name']))}</title>", page)
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{POLICY}">')  # fmt: skip  # noqa: E501
    page = re.sub(r'<script type="module" src="page/main.js"></script>\n', "", page)
    return page.replace("</body>", "\n".join(parts) + "\n</body>")


def _script(name: str) -> str:
    """A module that imports others by the names of the import map: those in data URLs have no place to start from."""
    return (PAGE / name).read_text(encoding="utf-8").replace('from "./', 'from "page/')


def _json(value: object) -> str:
    """JSON that ends no script element: names come from files."""
    return json.dumps(value).replace("<", "\\u003c")


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
