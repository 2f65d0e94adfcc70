"""What the viewer answers: the page, and numbers of the prediction as JSON and float32 (docs/viewer.md)."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from ..errors import GeneError, InputError, OptionError, PredictionError, code_of
from .guard import Guard
from .lazy import PredictionStore
from .regions import spots_within
from .shown import SPREAD, Shown
from .statistics import Contrast, Spots
from .tissue import TILE

PAGE = Path(__file__).parent / "page"
MOST_BYTES = 32 << 20  # of a request's body: a million spots by number, and some
MOST_GENES = 1_000  # that one request may name
MOST_FOUND = 1_000  # that a search may ask for
MOST_REGIONS = 200
LISTED = 50  # genes of a region, where none are named
CSV_ROWS = 10_000
STATUS = {GeneError.code: 404, PredictionError.code: 409}  # others: 400


def create_app(shown: Shown, token: str, hosts: frozenset[str], beyond: bool = False, **how: Any) -> Starlette:
    """The viewer of one prediction, as an ASGI application.

    Parameters
    ----------
    token, hosts, beyond, how
        As `Guard` takes them.
    """
    viewer = Viewer(shown)
    return Starlette(
        routes=[
            Route("/", lambda _: FileResponse(PAGE / "index.html")),
            Mount("/page", StaticFiles(directory=PAGE)),
            Route("/api/info", viewer.info),
            Route("/api/genes", viewer.search),
            Route("/api/spots", viewer.spots),
            Route("/api/spot/{position:int}", viewer.spot),
            Route("/api/gene/{name:path}", viewer.gene),
            Route("/api/region", viewer.region, methods=["POST"]),
            Route("/api/regions", viewer.keep_regions, methods=["PUT"]),
            Route("/api/coexpression/{name:path}", viewer.coexpression),
            Route("/api/export.csv", viewer.export),
            Route("/zarr/{key:path}", viewer.zarr),
            Route("/tile/{level:int}/{x:int}/{y:int}", viewer.tile),
        ],
        middleware=[Middleware(Guard, token=token, hosts=hosts, beyond=beyond, **how)],
        exception_handlers={InputError: _refused},
    )


def _refused(_: Request, error: Exception) -> Response:
    code = code_of(error)
    return JSONResponse({"error": str(error), "code": code}, STATUS.get(code, 400))


class Viewer:
    """Answers about one prediction. A method takes a request, and raises InputError where it is wrong."""

    def __init__(self, shown: Shown) -> None:
        self.shown = shown
        self.named: dict[str, Spots] = {}  # regions that the page has named, for exports

    def info(self, _: Request) -> Response:
        """What is shown."""
        self.shown.require_unchanged()
        return JSONResponse(describe(self.shown))

    def search(self, request: Request) -> Response:
        """Names of genes for a text."""
        limit = _whole_number(request, "limit", 20, MOST_FOUND)
        return JSONResponse(self.shown.search(request.query_params.get("search", ""), limit))

    def spots(self, _: Request) -> Response:
        """Coordinates, float32 [N, 2]."""
        return _binary(self.shown.coords)

    def spot(self, request: Request) -> Response:
        """The name of a spot."""
        position, spots = request.path_params["position"], len(self.shown)
        if position >= spots:
            raise OptionError(f"spot {position}: there are {spots:,}, from 0 to {spots - 1}")
        return JSONResponse({"name": self.shown.spot_names[position]})

    def gene(self, request: Request) -> Response:
        """Values of a gene, float32 [N]."""
        self.shown.require_unchanged()
        return _binary(self.shown.values(request.path_params["name"])[1])

    def zarr(self, request: Request) -> Response:
        """A file of the prediction as an AnnData in zarr, with all genes."""
        key = request.path_params["key"]
        size = self.store.size(key)
        if size is None:
            return PlainTextResponse("", 404)
        if request.method == "HEAD":
            return Response(headers={"Content-Length": str(size)}, media_type="application/octet-stream")
        return Response(self.store.content(key), media_type="application/octet-stream")

    def tile(self, request: Request) -> Response:
        """A tile of the tissue, JPEG."""
        if self.shown.tissue is None:
            raise OptionError("there is no picture of the tissue; give --image")
        place = request.path_params
        jpeg = self.shown.tissue.tile(place["level"], place["x"], place["y"])
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    @cached_property
    def store(self) -> PredictionStore:
        """The prediction as zarr."""
        return PredictionStore(self.shown)

    async def region(self, request: Request) -> Response:
        """A region's genes against others."""
        asked = await _body(request)
        return await run_in_threadpool(self._region, asked)

    def _region(self, asked: dict[str, Any]) -> Response:
        self.shown.require_unchanged()
        if unknown := asked.keys() - {"polygon", "inside", "against", "genes"}:
            raise OptionError(f"region: {sorted(unknown)[0]!r} is none of polygon, inside, against, genes")
        inside, others = self._spots(asked), self._others(asked.get("against", "rest"))
        against = len(self.shown) - len(inside) if others is None else len(others)
        if not len(inside):
            raise OptionError("region: no spot is inside")
        if not against:
            raise OptionError("region: no spot is left to hold it against")
        contrast = self.shown.expression.contrast(inside, others)
        genes = self._chosen(asked.get("genes"), contrast)
        found = [_row(self.shown.genes.names[gene], gene, contrast) for gene in genes]
        return JSONResponse({"spots": len(inside), "against": against, "genes": found})

    def _others(self, against: object) -> Spots | None:
        """The spots that a region is held against; None: the rest."""
        if against == "rest":
            return None
        if isinstance(against, dict) and against.keys() == {"polygon"}:
            return spots_within(self.shown.coords, against["polygon"])
        return _positions(against, "against", len(self.shown))

    def _spots(self, asked: dict[str, Any]) -> Spots:
        if ("polygon" in asked) == ("inside" in asked):
            raise OptionError("region: give either polygon, its corners, or inside, the positions of its spots")
        if "polygon" in asked:
            return spots_within(self.shown.coords, asked["polygon"])
        return _positions(asked["inside"], "inside", len(self.shown))

    def _chosen(self, names: object, contrast: Contrast) -> list[int]:
        if names is None:
            size = np.nan_to_num(np.abs(contrast.effect), nan=-1.0)
            return [int(gene) for gene in np.argsort(-size, kind="stable")[:LISTED]]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise OptionError('region: genes is a list of names, such as ["ERBB2"]')
        _require_few(names)
        return [self.shown.genes.find(name) for name in names]

    async def keep_regions(self, request: Request) -> Response:
        """Keep the page's named regions, in the place of those before."""
        asked = await _body(request)
        if len(asked) > MOST_REGIONS:
            raise OptionError(f"regions: {len(asked):,}; give at most {MOST_REGIONS}")
        coords = self.shown.coords
        self.named = {name: await run_in_threadpool(spots_within, coords, part) for name, part in asked.items()}
        return JSONResponse({name: len(spots) for name, spots in self.named.items()})

    def coexpression(self, request: Request) -> Response:
        """The genes that vary most alike with a gene."""
        self.shown.require_unchanged()
        top = _whole_number(request, "top", 20, MOST_FOUND)
        gene = self.shown.genes.find(request.path_params["name"])
        r = self.shown.expression.correlations(gene)
        r[gene] = np.nan  # itself
        order = np.argsort(-np.nan_to_num(r, nan=-2.0), kind="stable")[:top]
        names = self.shown.genes.names
        return JSONResponse([{"name": names[i], "r": float(r[i])} for i in order if not math.isnan(r[i])])

    def export(self, request: Request) -> Response:
        """Spots, coordinates, genes and regions as CSV."""
        self.shown.require_unchanged()
        names = [name for name in request.query_params.get("genes", "").split(",") if name]
        _require_few(names)
        found = [self.shown.values(name) for name in names]
        rows = _csv(self.shown, [name for name, _ in found], [values for _, values in found], dict(self.named))
        headers = {"Content-Disposition": 'attachment; filename="spots.csv"'}
        return StreamingResponse(rows, media_type="text/csv", headers=headers)


def describe(shown: Shown) -> dict[str, Any]:
    """What /api/info answers."""
    tissue = None
    if shown.tissue is not None:
        width, height = shown.tissue.size
        tissue = {"width": width, "height": height, "levels": shown.tissue.levels, "tile": TILE}
    facts = {name: value for name, value in shown.facts.items() if isinstance(value, str | int | float | dict)}
    return {
        "spots": len(shown),
        "genes": len(shown.genes),
        "name": shown.path.name,
        "decoded": shown.decoded,
        "spread": SPREAD if shown.deviation is not None else None,
        "first": shown.genes.names[_first_gene(shown)],
        "units": str(shown.facts.get("units", "values of the file")),
        "spot": shown.spot,
        "microns_a_pixel": shown.microns_a_pixel,
        "tissue": tissue,
        "provenance": json.loads(json.dumps(facts, default=str)),
        "context": np.flatnonzero(shown.context).tolist() if shown.context is not None else [],
    }


def _first_gene(shown: Shown) -> int:
    """A gene to begin with: of those that people know, the first that there is."""
    for name in ("EPCAM", "COL1A1", "KRT18", "PTPRC"):
        with suppress(GeneError):
            return shown.genes.find(name)
    return 0


def _row(name: str, gene: int, contrast: Contrast) -> dict[str, Any]:
    numbers = {
        "inside": contrast.inside[gene],
        "against": contrast.against[gene],
        "difference": contrast.difference[gene],
        "effect": contrast.effect[gene],
    }
    return {"name": name} | {key: float(value) if np.isfinite(value) else None for key, value in numbers.items()}


def _csv(
    shown: Shown, genes: list[str], values: list[npt.NDArray[np.float32]], regions: dict[str, Spots]
) -> Iterator[str]:
    member = {name: np.isin(np.arange(len(shown)), spots) for name, spots in regions.items()}
    written = io.StringIO()
    writer = csv.writer(written)
    writer.writerow(["spot", "x", "y", *map(_as_text, genes), "region"])
    for start in range(0, len(shown), CSV_ROWS):
        for i in range(start, min(start + CSV_ROWS, len(shown))):
            inside = "; ".join(name for name, is_member in member.items() if is_member[i])
            numbers = (f"{value[i]:.6g}" for value in values)
            x, y = (f"{number:.10g}" for number in shown.coords[i].tolist())
            writer.writerow([_as_text(shown.spot_names[i]), x, y, *numbers, _as_text(inside)])
        yield written.getvalue()
        written.seek(0)
        written.truncate()


def _as_text(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@", "\t", "\r") else name


def _binary(array: npt.NDArray[Any]) -> Response:
    return Response(np.ascontiguousarray(array, "<f4").tobytes(), media_type="application/octet-stream")


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises
    ------
    InputError
        If it is none, or too large; it is not read any further then.
    """
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise OptionError(f"the request is larger than {MOST_BYTES >> 20} MiB; name fewer spots")
    try:
        asked = await run_in_threadpool(partial(json.loads, bytes(content)))
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the request is not JSON ({str(error)[:100]})") from error
    if not isinstance(asked, dict):
        raise OptionError('the request is not a JSON object, such as {"polygon": [[0, 0], [9, 0], [9, 9]]}')
    return asked


def _positions(asked: object, name: str, spots: int) -> Spots:
    """Positions of spots, each once."""
    if not isinstance(asked, list) or not all(type(i) is int for i in asked):
        raise OptionError(f"region: {name} is a list of positions of spots{', or rest' * (name == 'against')}")
    outside = next((i for i in asked if not 0 <= i < spots), None)
    if outside is not None:
        raise OptionError(f"region: {name} names spot {outside}; there are {spots:,}, from 0 to {spots - 1}")
    return np.unique(np.asarray(asked, np.int64))


def _whole_number(request: Request, name: str, otherwise: int, most: int) -> int:
    text = request.query_params.get(name, str(otherwise))
    if not (text.isascii() and text.isdigit() and 1 <= len(text) <= 9 and 1 <= int(text) <= most):
        raise OptionError(f"{name}={text[:20]}: give a whole number from 1 to {most:,}")
    return int(text)


def _require_few(names: list[str]) -> None:
    if len(names) > MOST_GENES:
        raise OptionError(f"{len(names):,} genes are named; give at most {MOST_GENES:,}")
