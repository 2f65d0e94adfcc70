"""The training store: a folder of slides, each with its features and its measured expression, over one vocabulary.

    STORE/
      store.json       schema, width of the features, SHA-256 of the vocabulary
      genes.tsv.gz     the vocabulary
      slides.csv       a row a slide, the fields of `Record`
      slides/ID.h5ad   X sparse counts [N, P]; var token, symbol, highly_variable; obs; obsm spatial, features
      tasks/NAME.json  a benchmark's genes and folds (`Task`)
      failures.csv     slides that could not be taken, and why

A slide's spots are in spatial order, so that a window of near spots is a few runs of rows; X holds the genes of the
vocabulary that were measured on the slide, by token. N spots, F features, P genes measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stpath_runtime.encoding.neighbors import cut
from stpath_runtime.encoding.sizes import BLOCK
from stpath_runtime.errors import FeaturesError, InputError, OutputError, StoreError, VocabularyError
from stpath_runtime.files import written_whole
from stpath_runtime.records import record as read_record
from stpath_runtime.slides.context import Context, as_csr, known_genes
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import GeneVocabulary, nearest_names, organ_token, technology_token

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

SCHEMA = 1
STORE, GENES, SLIDES, FAILURES = "store.json", "genes.tsv.gz", "slides.csv", "failures.csv"
UNITS = ("raw", "log1p")  # of the counts of a slide
OPEN_SLIDES = 64  # files that a loading process keeps open


@dataclass(frozen=True)
class Record:
    """A slide of a store, as `slides.csv` has it."""

    slide: str  #: its id, and the name of its file
    organ: str  #: as in stpath_runtime.slides.vocabulary.ORGANS
    technology: str  #: as in TECHNOLOGIES; empty where unknown
    species: str = ""
    patient: str = ""  #: slides of one patient never stand on both sides of a split; empty: a patient of its own
    source: str = ""  #: the data set that it comes from
    counts: str = "raw"  #: of UNITS
    label: str = ""  #: what is to be predicted of the whole slide, where that is known
    spots: int = 0
    genes: int = 0  #: of the vocabulary, measured
    made_from: str = ""  #: a hash of the files and options that it was made from

    def __post_init__(self) -> None:
        organ_token(self.organ)
        technology_token(self.technology or None)
        if self.counts not in UNITS:
            raise StoreError(f"slide {self.slide}: counts are {' or '.join(UNITS)}, not {self.counts!r}")
        if not self.slide or self.slide != Path(self.slide).name or self.slide.startswith("."):
            raise StoreError(f"{self.slide!r} cannot name a slide; give one that can name a file")


@dataclass(frozen=True)
class About:
    """What store.json says."""

    schema: int
    n_features: int  #: width of the features; 0 while the store has no slide
    genes: str  #: SHA-256 of genes.tsv.gz


@dataclass(frozen=True)
class Task:
    """A benchmark task: which genes to predict, and which slides to learn from and to test on."""

    genes: list[str]
    folds: list[dict[str, list[str]]]  #: each {"train": slides, "test": slides}


class Failure(NamedTuple):
    """Why a slide could not be taken, as `failures.csv` has it."""

    code: str  # of stpath_runtime.errors
    reason: str


class Store:
    """A training store; make one with `Store.create` or `Store.open`."""

    def __init__(self, path: Path, vocabulary: GeneVocabulary, n_features: int, records: Sequence[Record]) -> None:
        self.path = path
        self.vocabulary = vocabulary
        self.n_features = n_features  # 0 while the store has no slide
        self.records = {record.slide: record for record in records}
        self._genes = _hash(path / GENES)
        self._changed, self._write_next = False, 0.0

    @classmethod
    def create(cls, path: str | Path, vocabulary: GeneVocabulary) -> Store:
        """Open a store to add slides to it; a new, empty one where there is none.

        Raises
        ------
        InputError
            If the folder holds something else, or a store over another vocabulary.
        """
        path = Path(path)
        if (path / STORE).exists():
            store = cls.open(path)
            store.require_vocabulary(vocabulary, "the vocabulary given")
            return store
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise OutputError(f"{path}: exists and is not a training store; choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        vocabulary.write(path / GENES)
        store = cls(path, vocabulary, 0, [])
        store._write_index()
        return store

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open a store to read it.

        Raises
        ------
        InputError
            If there is none, it is damaged, or of a newer version of this package.
        """
        import pandas as pd

        path = Path(path)
        if not (path / STORE).is_file():
            raise StoreError(f"{path}: not a training store (it has no {STORE}); make one with stpath data prepare")
        try:
            about = read_record(About, json.loads((path / STORE).read_text()))
            if about.schema > SCHEMA:
                raise StoreError(f"{path}: a store of schema {about.schema}, newer than {SCHEMA}; upgrade stpath")
            table = pd.read_csv(path / SLIDES, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
            numbers = {field.name: int for field in fields(Record) if field.type == "int"}
            records = [Record(**row) for row in table.astype(numbers).to_dict("records")]  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise StoreError(f"{path}: a damaged training store ({error}); prepare it again") from error
        if _hash(path / GENES) != about.genes:
            raise StoreError(f"{path}: {GENES} is not the vocabulary that the store was made with; prepare it again")
        return cls(path, GeneVocabulary.read(path / GENES), about.n_features, records)

    def add(self, record: Record, adata: AnnData) -> None:
        """Write a slide, and then name it in the index; as `write` and `index` together."""
        self.index(self.write(record, adata))

    def write(self, record: Record, adata: AnnData) -> Record:
        """Write a slide's file, in spatial order; the slide is of the store once `index` names it.

        Parameters
        ----------
        record
            Its `spots` and `genes` are filled in here.
        adata
            X sparse counts [N, P], var as `measured` gives it with `highly_variable`, obsm spatial [N, 2] in pixels
            and features [N, F].

        Returns
        -------
        Record
            Filled in.

        Raises
        ------
        InputError
            If the features are not as wide as those of the other slides.
        """
        width = adata.obsm["features"].shape[1]
        if self.n_features not in (0, width):
            raise FeaturesError(
                f"slide {record.slide}: features are {width:,} wide, those of the store {self.n_features:,}; one store "
                "holds the features of one encoder"
            )
        order = np.argsort(cut(np.asarray(adata.obsm["spatial"], np.float64), BLOCK), kind="stable")
        with written_whole(self.slide_path(record.slide)) as partial:
            adata[order].copy().write_h5ad(partial, compression="lzf")
        self.n_features = width
        return replace(record, spots=adata.n_obs, genes=adata.n_vars)

    def index(self, record: Record, at_once: bool = True) -> None:
        """Name a slide, whose file is written, in the index.

        Parameters
        ----------
        at_once
            Whether the index is written now; else at times, and by `close`: a run over thousands of slides would write
            it as often.
        """
        self.records[record.slide] = record
        self._changed = True
        if at_once or time.monotonic() > self._write_next:
            self._write_index()

    def close(self) -> None:
        """Write what `index` has not written yet."""
        if self._changed:
            self._write_index()

    def slide_path(self, slide: str) -> Path:
        """Where the h5ad file of a slide is."""
        return self.path / "slides" / f"{slide}.h5ad"

    def read(self, slide: str) -> AnnData:
        """A slide, whole: X counts in the units of its record, obsm spatial and features.

        Raises
        ------
        InputError
            If the store has no such slide, or its file is damaged.
        """
        import anndata

        self.require_slides([slide])
        try:
            return anndata.read_h5ad(self.slide_path(slide))
        except Exception as error:  # anndata raises errors of h5py, pandas and its own on a damaged file
            raise StoreError(f"{self.slide_path(slide)}: cannot be read ({error}); prepare the slide again") from error

    def as_slide(self, adata: AnnData, slide: str) -> Slide:
        """What a model is given of a slide: features, coordinates, organ and technology, not the expression."""
        record = self.records[slide]
        coords, features = adata.obsm["spatial"], adata.obsm["features"]
        return Slide(coords, features, list(adata.obs_names), record.organ, record.technology or None, slide)

    def as_context(self, adata: AnnData, slide: str, spots: npt.NDArray[np.int64]) -> Context:
        """The measured expression of some spots of a slide, as context of a prediction."""
        counts = adata.X[spots]
        if self.records[slide].counts == "log1p":
            counts = counts.expm1().rint()  # whole again, but for the rounding of a logarithm
        return Context(ids=[str(adata.obs_names[i]) for i in spots], counts=counts, genes=list(adata.var_names))

    def log_counts(self, adata: AnnData, slide: str) -> csr_matrix:
        """log1p of raw counts [N, P], which the model predicts."""
        counts: csr_matrix = adata.X
        return counts if self.records[slide].counts == "log1p" else counts.log1p()

    def task(self, name: str) -> Task:
        """A benchmark task of the store, by name.

        Raises
        ------
        InputError
            If the store has none of that name.
        """
        path = self.path / "tasks" / f"{name}.json"
        if not path.is_file():
            known = sorted(file.stem for file in (self.path / "tasks").glob("*.json"))
            held = f"it has {', '.join(known)}" if known else "it has none"
            raise StoreError(f"{self.path}: no task {name!r}{nearest_names(name, known)}; {held}")
        try:
            return read_record(Task, json.loads(path.read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{path}: a damaged task ({error}); prepare the data set again") from error

    def add_task(self, name: str, task: Task) -> None:
        """Write a benchmark task."""
        with written_whole(self.path / "tasks" / f"{name}.json") as partial:
            partial.write_text(json.dumps(asdict(task), indent=1))

    def write_failures(self, failed: dict[str, Failure]) -> None:
        """Write which slides could not be taken, and why; no file where every slide could."""
        import pandas as pd

        path = self.path / FAILURES
        path.unlink(missing_ok=True)
        if failed:
            rows = [(slide, *failure) for slide, failure in failed.items()]
            with written_whole(path) as partial:
                table = pd.DataFrame(rows, columns=["slide", "code", "reason"])
                table.to_csv(partial, index=False, errors="surrogateescape")

    def require_slides(self, slides: Sequence[str]) -> None:
        """Raise InputError where a slide is not of this store."""
        for slide in slides:
            if slide not in self.records:
                near = nearest_names(slide, self.records)
                raise StoreError(f"{self.path}: no slide {slide!r}{near}; it has {len(self.records):,}, see {SLIDES}")

    def require_vocabulary(self, vocabulary: GeneVocabulary, whose: str) -> None:
        """Raise InputError where another vocabulary numbers the genes otherwise."""
        if list(vocabulary.ensembl_ids) != list(self.vocabulary.ensembl_ids):
            raise VocabularyError(
                f"{self.path}: a store of another vocabulary ({self.vocabulary.n_tokens:,} tokens; {whose} has "
                f"{vocabulary.n_tokens:,}, or other genes); prepare the slides with that vocabulary"
            )

    def _write_index(self) -> None:
        import pandas as pd

        start = time.monotonic()
        about = About(SCHEMA, self.n_features, self._genes)
        columns = [field.name for field in fields(Record)]
        rows = [astuple(record) for record in sorted(self.records.values(), key=lambda record: record.slide)]
        with written_whole(self.path / SLIDES) as partial:
            pd.DataFrame(rows, columns=columns).to_csv(partial, index=False, errors="surrogateescape")
        with written_whole(self.path / STORE) as partial:
            partial.write_text(json.dumps(asdict(about), indent=1))
        now = time.monotonic()
        self._changed, self._write_next = False, now + 20 * (now - start)  # a twentieth of the time, at the most


class StoredSlide:
    """A slide of a store, of which the spots asked for are read."""

    def __init__(self, path: Path, record: Record) -> None:
        import h5py

        try:
            file = h5py.File(path, "r")
            # Not anndata's view of a sparse matrix: each slice of it reads the metadata of installed packages again.
            self._values, self._columns = file["X/data"], file["X/indices"]
            self._starts: npt.NDArray[np.int64] = file["X/indptr"][()].astype(np.int64)  # [N + 1]
            self._features = file["obsm/features"]
            coords = file["obsm/spatial"][()]
            self.tokens: npt.NDArray[np.int64] = file["var/token"][()]  # [P]
            self.highly_variable: npt.NDArray[np.bool_] = file["var/highly_variable"][()]  # [P]
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(f"{path}: a damaged slide of the store ({error}); prepare it again") from error
        self.record = record
        # As the model takes them, over the whole slide: [N, 2]
        self.coords = Slide(coords, np.ones((len(coords), 1), np.float32)).normalized_coords().astype(np.float32)
        self.pixels = coords  # [N, 2]

    def __len__(self) -> int:
        return len(self.coords)

    def read(self, spots: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.generic], csr_matrix]:
        """Features [n, F], as they came, and log1p of raw counts [n, P] of some spots, ascending."""
        from scipy.sparse import csr_matrix

        runs = _runs(spots)
        entries = [slice(self._starts[run.start], self._starts[run.stop]) for run in runs]
        values, columns = (np.concatenate([part[run] for run in entries]) for part in (self._values, self._columns))
        starts = np.append(0, np.cumsum(np.diff(self._starts)[spots]))
        counts = csr_matrix((values, columns, starts), shape=(len(spots), len(self.tokens)))
        features = np.concatenate([self._features[run] for run in runs])
        return features, counts if self.record.counts == "log1p" else counts.log1p()


def open_slide(store: Store, slide: str) -> StoredSlide:
    """Open a slide of a store; the last that this process asked for stay open."""
    return _open_slide(store.slide_path(slide), store.records[slide], os.getpid())


@lru_cache(maxsize=OPEN_SLIDES)
def _open_slide(path: Path, record: Record, process: int) -> StoredSlide:
    return StoredSlide(path, record)  # HDF5 handles are not shared with a forked process


def _runs(rows: npt.NDArray[np.int64]) -> list[slice]:
    """Ascending rows as slices of successive ones: h5py's own indexing goes row by row."""
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    stops = np.append(starts[1:], len(rows))
    return [slice(int(rows[start]), int(rows[stop - 1]) + 1) for start, stop in zip(starts, stops, strict=True)]


def measured(counts: Any, genes: Sequence[str], vocabulary: GeneVocabulary, name: str) -> AnnData:
    """The genes of a slide that the vocabulary knows: X [N, P] by token; var token and symbol, index Ensembl ids.

    Several names of one gene are resolved by the maximum, as in published training.

    Parameters
    ----------
    counts
        [N, genes], dense or sparse.
    genes
        Symbols, aliases or Ensembl ids.

    Raises
    ------
    InputError
        If the counts are not a matrix of numbers, negative, NaN or infinite, or no gene is known.
    """
    import pandas as pd
    from anndata import AnnData

    tokens, matrix, _ = known_genes(as_csr(counts, name), genes, vocabulary, name)
    var = pd.DataFrame({"token": tokens, "symbol": vocabulary.names(tokens)}, index=vocabulary.gene_ids(tokens))
    return AnnData(X=matrix, var=var)


def highly_variable(adata: AnnData, n: int, log_counts: csr_matrix) -> npt.NDArray[np.bool_]:
    """Which genes [P] are the n most variable, as published: among those in a tenth of the spots, on log1p of counts.

    scanpy's `highly_variable_genes`, flavour seurat. A slide with no more than n such genes keeps all of them.
    """
    import scanpy as sc
    from anndata import AnnData

    common = np.flatnonzero(np.diff(log_counts.tocsc().indptr) >= np.ceil(0.1 * adata.n_obs))
    chosen = np.zeros(adata.n_vars, bool)
    if len(common) <= n:
        chosen[common] = True
        return chosen
    view = AnnData(X=log_counts[:, common])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's own notes on its defaults
        sc.pp.highly_variable_genes(view, n_top_genes=n, flavor="seurat")
    best = view.var["highly_variable"].to_numpy(bool)
    chosen[common[best]] = True
    return chosen


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
