"""Public data sets as they are downloaded: which slides a folder holds, and the files and metadata of each.

A layout is a function from a folder to its slides (`Source`); `stpath_train.prepare` takes them from there. The
features of a slide are one HDF5 file, ID.h5, that `stpath_runtime.readers.read_slide` reads.
"""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stpath_runtime.errors import DataError, InputError, OptionError
from stpath_runtime.names import delimiter_of
from stpath_runtime.slides.context import as_csr
from stpath_runtime.slides.vocabulary import nearest_names

if TYPE_CHECKING:
    from anndata import AnnData
    from pandas import DataFrame

    from .store import Task

ROWS_AT_ONCE = 512  # of a CSV file of counts, that are dense at once
TECHNOLOGY_FOLDERS = ("ST", "Visium", "VisiumHD")  # of STImage-1K4M


class Layout(StrEnum):
    """How a folder of slides is laid out."""

    HEST = "hest"
    STIMAGE = "stimage"
    HEST_BENCH = "hest-bench"
    STPATH = "stpath"


class Counts(StrEnum):
    """What the counts of a file are."""

    RAW = "raw"
    LOG1P = "log1p"


@dataclass(frozen=True)
class Source:
    """A slide as it was downloaded."""

    slide: str
    counts: Path  # .h5ad, or .csv of spots by genes
    features: Path
    row: dict[str, str] = field(default_factory=dict)  # its row of the metadata table; empty where it has none
    tables: tuple[Path, ...] = ()  # CSV files of a row a spot, kept in obs where they exist


@dataclass(frozen=True)
class Metadata:
    """Where a layout has its table of slides, and which columns hold the fields of a `Record`."""

    file: str  # a pattern within the folder
    columns: dict[str, str]  # field of the record to column


HEST_COLUMNS = {
    "slide": "id",
    "organ": "organ",
    "technology": "st_technology",
    "species": "species",
    "patient": "patient",
    "source": "dataset_title",
}
METADATA = {
    Layout.HEST: Metadata("HEST_v*.csv", HEST_COLUMNS),
    Layout.HEST_BENCH: Metadata("HEST_v*.csv", HEST_COLUMNS),
    Layout.STIMAGE: Metadata(
        "meta/meta_all_gene.csv",
        {"slide": "slide", "organ": "tissue", "technology": "tech", "species": "species", "source": "pmid"},
    ),
    Layout.STPATH: Metadata(
        "metadata.csv",
        {"slide": "id"} | {name: name for name in ("organ", "technology", "species", "patient", "source")},
    ),
}


def hest(folder: Path, features: Path) -> Iterator[Source]:
    """HEST-1k: `st/ID.h5ad`, raw counts; obs_names are barcodes, var_names symbols."""
    for counts in sorted((folder / "st").glob("*.h5ad")):
        yield Source(counts.stem, counts, features / f"{counts.stem}.h5")


def stimage(folder: Path, features: Path) -> Iterator[Source]:
    """STImage-1K4M, a folder a technology: ST, Visium, VisiumHD.

    `gene_exp/SLIDE_count.csv` (a row a spot, its name in the first column; a column a gene), `coord/SLIDE_coord.csv`
    (spot, yaxis, xaxis, r: pixels of the image) and, beside them, `annotation/SLIDE_anno.csv` (a pathologist's label
    of each spot) of the slides that have one.
    """
    for technology in TECHNOLOGY_FOLDERS:
        for counts in sorted((folder / technology / "gene_exp").glob("*_count.csv")):
            slide = counts.name.removesuffix("_count.csv")
            coords = folder / technology / "coord" / f"{slide}_coord.csv"
            tables = (coords, folder / "annotation" / f"{slide}_anno.csv")
            yield Source(slide, counts, features / f"{slide}.h5", tables=tables)


def hest_bench(folder: Path, features: Path) -> Iterator[Source]:
    """HEST-bench: `TASK/adata/ID.h5ad`, as `st/ID.h5ad` of HEST-1k."""
    for counts in sorted(folder.glob("*/adata/*.h5ad")):
        yield Source(counts.stem, counts, features / f"{counts.stem}.h5")


def stpath(folder: Path, features: Path) -> Iterator[Source]:
    """As STPath's example: `ID.h5`, features, beside `ID.h5ad`, raw counts."""
    for counts in sorted(folder.glob("*.h5ad")):
        yield Source(counts.stem, counts, features / f"{counts.stem}.h5")


LAYOUTS: dict[Layout, Callable[[Path, Path], Iterator[Source]]] = {
    Layout.HEST: hest,
    Layout.STIMAGE: stimage,
    Layout.HEST_BENCH: hest_bench,
    Layout.STPATH: stpath,
}


def find_sources(folder: Path, layout: Layout, features: Path, table: DataFrame) -> list[Source]:
    """The slides of a folder, each with its row of the metadata table.

    Parameters
    ----------
    features
        Folder of ID.h5, a file a slide.
    table
        As `read_metadata` gives it.

    Raises
    ------
    InputError
        If the folder is missing or holds no slide of that layout.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    rows = table.to_dict("index")
    # A slide may serve several tasks of HEST-bench.
    found = {source.slide: source for source in LAYOUTS[layout](folder, features)}
    if not found:
        expected = str(LAYOUTS[layout].__doc__).splitlines()[0].rstrip(".")
        raise DataError(f"{folder}: holds no slide of the layout {layout.value}; expected {expected}")
    return [replace(source, row=_words(rows.get(source.slide, {}))) for source in found.values()]


def _words(row: dict[object, object]) -> dict[str, str]:
    return {str(column): str(value).strip() for column, value in row.items()}


def read_metadata(folder: Path, layout: Layout, path: Path | None) -> DataFrame:
    """Read the table of the slides, a row a slide, text throughout: its index is the slide's id.

    Parameters
    ----------
    path
        A CSV file, separated by commas or tabs; None for the one that the layout has in the folder.

    Raises
    ------
    InputError
        If there is none, it cannot be read, lacks a column that is needed, or names a slide twice.
    """
    columns = METADATA[layout].columns
    path = path if path is not None else _metadata_file(folder, layout)
    try:
        table = _read_table(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table of slides ({error})") from error
    for needed in ("slide", "organ", "technology"):
        if columns[needed] not in table:
            raise DataError(
                f"{path}: no column {columns[needed]!r}, the {needed}; it has {', '.join(map(str, table.columns))}"
            )
    slides = table[columns["slide"]]
    if slides.duplicated().any():
        raise DataError(f"{path}: slide {slides[slides.duplicated()].iloc[0]!r} appears twice; keep one row of it")
    return table.set_index(columns["slide"], drop=False)


def _metadata_file(folder: Path, layout: Layout) -> Path:
    pattern = METADATA[layout].file
    found = sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])
    if not found:
        hint = "; stpath data download hest --pattern 'HEST_v*.csv' gets it" if pattern.startswith("HEST") else ""
        raise DataError(f"{folder}: no table of the slides ({pattern}); give one with --metadata{hint}")
    return found[-1]  # the newest version


def record_fields(source: Source, layout: Layout) -> dict[str, str]:
    """The fields of a `Record` that the metadata tell, in the data set's own words."""
    columns = METADATA[layout].columns
    fields = {name: source.row.get(column, "") for name, column in columns.items() if name != "slide"}
    if layout in (Layout.HEST, Layout.HEST_BENCH) and fields["patient"]:
        # HEST numbers its patients anew in each data set.
        fields["patient"] = f"{fields['source']}: {fields['patient']}"
    if layout is Layout.STIMAGE and fields["source"]:
        fields["source"] = f"PMID {fields['source']}"
    return fields


def read_counts(path: Path) -> AnnData:
    """Read the counts of a slide, X [N, genes], from an h5ad file, or a CSV of a row a spot and a column a gene.

    Raises
    ------
    InputError
        If the file cannot be read, or holds no counts.
    """
    import anndata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # anndata's notes on names that appear twice and files of its early versions
            adata = _read_csv(path) if path.suffix == ".csv" else anndata.read_h5ad(path)
    except Exception as error:  # anndata raises errors of h5py, pandas and its own on a damaged file
        if isinstance(error, InputError):
            raise
        raise DataError(f"{path}: cannot be read ({error}); download it again") from error
    if adata.X is None or 0 in adata.shape:
        raise DataError(f"{path}: holds no counts; X is empty")
    return adata


def _read_csv(path: Path) -> AnnData:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import vstack

    separator = delimiter_of(_first_line(path))
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file, delimiter=separator), [])
    # Without the header, as pandas would rename a gene that appears twice; names as they are: a spot may be called NA.
    types = dict.fromkeys(range(1, len(header) + 1), "float32")
    parts = pd.read_csv(
        path, sep=separator, header=None, skiprows=1, converters={0: str}, dtype=types, chunksize=ROWS_AT_ONCE
    )
    spots: list[str] = []
    counts = []
    for part in parts:
        if part.shape[1] - len(header) not in (0, 1):  # R leaves out the name of the first column
            raise DataError(f"{path}: {len(header):,} names in its first line, {part.shape[1]:,} columns below")
        genes = header[len(header) + 1 - part.shape[1] :]
        # Spreadsheets leave rows and columns of nothing at the end.
        while genes and not genes[-1]:
            genes.pop()
        table = part[(part[0] != "") | part.iloc[:, 1:].notna().any(axis=1)]
        if table.iloc[:, 1 + len(genes) :].notna().any(axis=None):
            raise DataError(f"{path}: a column of counts has no gene's name in the first line")
        spots += list(table[0])
        counts.append(as_csr(table.iloc[:, 1 : 1 + len(genes)].to_numpy(), str(path)))
    return AnnData(vstack(counts, format="csr"), pd.DataFrame(index=spots), pd.DataFrame(index=genes))


def read_spots(path: Path, spots: Sequence[str]) -> DataFrame:
    """Read a CSV file of a row a spot, its name in the first column: the rows of `spots`, empty where it has none.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        table = _read_table(path, converters={0: str})  # a spot may be called NA
        table = table.set_index(table.columns[0])
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table of spots ({error}); download it again") from error
    table.index = table.index.astype(str)
    return table[~table.index.duplicated()].reindex(list(spots)).dropna(axis=1, how="all")


def _read_table(path: Path, **options: Any) -> DataFrame:
    """A table separated by commas, tabs or semicolons: STImage-1K4M has been given out with either of the first two."""
    import pandas as pd

    return pd.read_csv(path, sep=delimiter_of(_first_line(path)), **options)


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig") as file:
        return file.readline()


def read_rules(path: Path, table: DataFrame) -> list[str]:
    """Read rules of exclusion, one a line: a slide's id, or column=value. A line that begins with # is a note.

    Raises
    ------
    InputError
        If the file cannot be read or a column is not of the metadata table.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise OptionError(f"--exclude {path}: cannot be read ({error}); give a text file, a rule a line") from error
    rules = [rule for line in lines if (rule := line.strip()) and not rule.startswith("#")]
    for rule in rules:
        column, is_of_column, _ = rule.partition("=")
        if is_of_column and rule not in table.index:
            require_column(column.strip(), table, f"--exclude {path}: {rule!r}")
    return rules


def require_column(column: str, table: DataFrame, whose: str) -> None:
    """Raise InputError where a column is not of the metadata table."""
    if column not in table:
        names = [str(name) for name in table.columns]
        raise DataError(
            f"{whose}: the metadata have no column {column!r}{nearest_names(column, names)}; they have "
            f"{', '.join(names)}"
        )


def exclude(sources: Sequence[Source], rules: Sequence[str]) -> tuple[list[Source], Counter[str]]:
    """The slides that no rule names, and how many each rule took away (the first that names a slide)."""
    taken_away = Counter(dict.fromkeys(rules, 0))
    kept = []
    for source in sources:
        rule = next((rule for rule in rules if _names(rule, source)), None)
        if rule is None:
            kept.append(source)
        else:
            taken_away[rule] += 1
    return kept, taken_away


def _names(rule: str, source: Source) -> bool:
    column, _, value = rule.partition("=")
    return rule == source.slide or (
        column.strip() in source.row and source.row[column.strip()].casefold() == value.strip().casefold()
    )


def bench_tasks(folder: Path) -> dict[str, Task]:
    """The tasks of HEST-bench: `TASK/var_50genes.json`, and `TASK/splits/train_K.csv` and `test_K.csv` (sample_id).

    Raises
    ------
    InputError
        If a file of a task is missing or is not as described.
    """
    import pandas as pd

    from .store import Task

    tasks = {}
    for splits in sorted(folder.glob("*/splits")):
        try:
            genes = json.loads((splits.parent / "var_50genes.json").read_text())["genes"]
            count = len(list(splits.glob("test_*.csv")))
            folds = [
                {
                    side: list(pd.read_csv(splits / f"{side}_{fold}.csv", dtype=str)["sample_id"])
                    for side in ("train", "test")
                }
                for fold in range(count)
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{splits.parent}: not a task of HEST-bench ({error}); download it again") from error
        tasks[splits.parent.name] = Task(genes, folds)
    return tasks
