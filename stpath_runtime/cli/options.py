"""The options that several commands share, and how they are parsed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError, OutputError
from ..files import require_writable
from ..machine import parse_bytes
from ..names import listed_names
from ..results.output import Format


class DType(StrEnum):
    """Type of the expression in a file."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


EngineFolder = Annotated[Path, typer.Option("--engine", metavar="ENGINE", help="Engine folder.")]
Organ = Annotated[str | None, typer.Option(help="Organ, as HEST-1k or STPath name it; left out: Others.")]
Tech = Annotated[str | None, typer.Option(help="Visium, Xenium, ...; left out: unknown.")]
Genes = Annotated[str, typer.Option(metavar="A,B,C|FILE", help="Names, or a .txt (one a line) or .json file of them.")]
FeaturesKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Where the features are: the obsm key of an AnnData, the table of a SpatialData."),
]
ContextSpots = Annotated[
    str | None,
    typer.Option(
        metavar="5%|A,B,C|FILE",
        help="Which spots with counts are context: a share by the published rule, barcodes, or a .csv of barcode and "
        "context (1 or 0); left out: all.",
    ),
]
FillContext = Annotated[bool, typer.Option("--fill-context", help="Write the measured values of context spots.")]
Attention = Annotated[
    str | None,
    typer.Option(metavar="global|knn:K", help="To all spots or to the K nearest; left out: as the model was trained."),
]
Neighbors = Annotated[int | None, typer.Option(metavar="K", help="With --attention knn: K.")]
Memory = Annotated[
    int | None,
    typer.Option(
        metavar="SIZE", parser=parse_bytes, help="Memory to take, such as 6G; left out: half of what there is."
    ),
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", help="Of STFlow: points of the time grid, from 2; left out: as trained.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Of STFlow: of what its samples start from; left out: 0.")]
Samples = Annotated[
    int | None,
    typer.Option(metavar="N", help="Of STFlow: from 2 on the result is their mean and layers['std']; left out: 1."),
]
Backend = Annotated[
    str,
    typer.Option(help="What runs the engine: onnxruntime, openvino, tensorrt, tensorrt_rtx, or auto, which says what."),
]
Device = Annotated[str, typer.Option(help="cpu or cuda:N.")]
Precision = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16", help="What to compute in; left out: the engine's own.")
]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Keep the embedding, to decode other genes later.")]
Form = Annotated[
    Format | None, typer.Option("--format", help="What to write; left out: by the name, zarr where X is above 2 GiB.")
]
Encoder = Annotated[
    str | None,
    typer.Option(metavar="ENCODER", help="Of slide images: the tile encoder's folder, or a model of timm (PyTorch)."),
]
Mpp = Annotated[
    float | None, typer.Option("--mpp", metavar="UM", help="Um a pixel of an image's finest level; left out: its own.")
]
Pitch = Annotated[float, typer.Option(metavar="UM", help="From one tile of an image to the next.")]
MinTissue = Annotated[float, typer.Option(metavar="SHARE", help="How much of a tile has to be tissue, 0 to 1.")]
Tissue = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Where an image's tissue is: GeoJSON (QuPath, TRIDENT) or a mask; left out: ours."
    ),
]
SpotsFile = Annotated[
    str | None,
    typer.Option("--spots", metavar="FILE", help="Tiles at these spots: an AnnData or Visium's tissue_positions.csv."),
]
Sections = Annotated[
    str | None,
    typer.Option(metavar="[COLUMN]", help="Each piece of tissue, or value of a column of obs, is a slide of its own."),
]
Type = Annotated[DType, typer.Option("--dtype", help="Type of the expression written.")]


def chosen_backend(engine: Path, backend: str, device: str, precision: str | None) -> str:
    """The backend asked for; with auto the one that is chosen, which is printed to stderr."""
    from ..backends.choice import AUTO, choose_backend

    if backend != AUTO:
        return backend
    if not engine.exists():  # a tile encoder of timm, which PyTorch runs; or nothing, which loading it says
        return "onnxruntime"
    name, why = choose_backend(engine, device, precision)
    typer.echo(why, err=True)
    return name


def gene_names(genes: str) -> list[str] | None:
    """The genes asked for; None means all."""
    return None if genes.casefold() == "all" else listed_names(genes, "--genes", "gene")


def require_png(out: Path) -> None:
    """Check that a picture can be written at `out`, as a PNG."""
    if out.suffix.lower() != ".png":
        raise OutputError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    require_writable(out)


def whole_numbers(text: str, option: str, example: str) -> list[int]:
    """Distinct numbers from a text such as '8,16,32', each above 0, sorted."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise OptionError(f"{option} {text}: give whole numbers from 1, such as {example}")
    return sorted({int(word) for word in words})


def count(n: int, noun: str) -> str:
    """A number with its noun: "1 spot", "2,000 spots"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
