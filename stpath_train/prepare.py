"""Public data sets, as they are downloaded, into one training store."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from stpath_runtime.errors import DataError, InputError, MemoryLimitError, OptionError, OutputError, code_of, warn
from stpath_runtime.files import require_writable, sweep
from stpath_runtime.progress import OnTile
from stpath_runtime.readers import read_slide
from stpath_runtime.slides.context import is_whole
from stpath_runtime.slides.vocabulary import ORGANS, TECHNOLOGIES, GeneVocabulary, organ_token, technology_token

from .sources import (
    Layout,
    Source,
    bench_tasks,
    exclude,
    find_sources,
    read_counts,
    read_metadata,
    read_rules,
    read_spots,
    record_fields,
    require_column,
)
from .store import FAILURES, UNITS, Failure, Record, Store, highly_variable, measured

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

LOCK = ".stpath.lock"
VERSION = 1  # of what a slide is made into: a change makes every slide anew


@dataclass(frozen=True)
class Options:
    """How slides are prepared."""

    layout: Layout
    hvg: int = 200  # highly variable genes that are marked on a slide
    counts: str = "raw"  # what the counts are, of stpath_train.store.UNITS
    label: str | None = None  # column of the metadata that is to be predicted of a whole slide

    def __post_init__(self) -> None:
        if self.counts not in UNITS:
            raise OptionError(f"counts are {' or '.join(UNITS)}, not {self.counts!r}")
        if self.hvg < 1:
            raise OptionError(f"{self.hvg} highly variable genes; give 1 or more")


@dataclass
class Summary:
    """What a run of `prepare` did; as text, a line of it."""

    records: list[Record] = field(default_factory=list)  #: of the slides that are in the store now
    skipped: int = 0  #: of them, those that were there already, unchanged
    excluded: Counter[str] = field(default_factory=Counter)  #: slides that each rule took away
    failed: dict[str, Failure] = field(default_factory=dict)  #: slide or task, and why

    def __str__(self) -> str:
        spots, genes = sum(record.spots for record in self.records), [record.genes for record in self.records]
        return (
            f"{len(self.records):,} slides ({self.skipped:,} of them skipped, as they were there), {spots:,} spots, "
            f"{min(genes, default=0):,} to {max(genes, default=0):,} genes a slide, {len(self.failed):,} failed"
        )


def prepare(
    source: str | Path,
    layout: str,
    out: str | Path,
    *,
    features: str | Path | None = None,
    metadata: str | Path | None = None,
    genes: str | Path | None = None,
    exclude_rules: str | Path | None = None,
    label: str | None = None,
    hvg: int = 200,
    counts: str = "raw",
    workers: int = 1,
    on_slide: OnTile | None = None,
) -> Summary:
    """Take the slides of a downloaded data set into a training store.

    A slide that cannot be taken does not stop the others: it stands in the summary, and in the store's failures.csv.
    A slide that is there already, of unchanged files and options, is skipped: a run that was stopped goes on.

    Parameters
    ----------
    source
        Folder of the data set.
    layout
        Of `stpath_train.sources.Layout`, where each is described.
    out
        The store; a new one, or one with slides in it, of this data set or another.
    features
        Folder of the features, a file ID.h5 a slide; left out: `source`.
    metadata
        CSV file of a row a slide; left out: the one that the layout has in `source`.
    genes
        A vocabulary as `GeneVocabulary.read` takes it; left out: STPath's published one.
    exclude_rules
        Text file of slides to leave out, a rule a line: a slide's id, or column=value of the metadata.
    label
        Column of the metadata to predict of a whole slide.
    hvg
        How many highly variable genes to mark.
    counts
        "raw", or "log1p" where the files hold log1p of raw counts.
    workers
        Processes that make slides ready.
    on_slide
        Called with the number of slides done, and to do.

    Raises
    ------
    InputError
        If an argument or table is at fault, or no slide could be taken.
    """
    source, out = Path(source), Path(out)
    options = Options(_layout(layout), hvg, counts, label)
    if features is None and options.layout is not Layout.STPATH:
        raise OptionError(f"{source}: the layout {layout} has no features; name a folder of ID.h5 with --features")
    table = read_metadata(source, options.layout, Path(metadata) if metadata is not None else None)
    if label is not None:
        require_column(label, table, "--label")
    rules = read_rules(Path(exclude_rules), table) if exclude_rules is not None else []
    found = find_sources(source, options.layout, Path(features) if features is not None else source, table)
    kept, excluded = exclude(found, rules)
    if not kept:
        raise DataError(f"{source}: the rules exclude all of its {len(found):,} slides")
    _warn_of_others(kept, options)
    tasks = bench_tasks(source) if options.layout is Layout.HEST_BENCH else {}
    require_writable(out)
    store = Store.create(out, GeneVocabulary.read(genes) if genes is not None else GeneVocabulary.published())
    with _alone(store.path), closing(Store.open(out)) as store:  # as an earlier run left it
        if there := sorted({slide.slide for slide in found} - {slide.slide for slide in kept} & {*store.records}):
            raise OutputError(
                f"{out}: holds {', '.join(there)} of an earlier run, which the rules exclude; choose a new store"
            )
        summary = _take_all(kept, store, options, workers, on_slide)
        for name, task in tasks.items():
            missing = {slide for fold in task.folds for slides in fold.values() for slide in slides} - {*store.records}
            if missing:
                why = f"the task is left out: it needs {', '.join(sorted(missing))}, not in the store"
                summary.failed[name] = Failure(DataError.code, why)
            else:
                store.add_task(name, task)
        _write_failures(store, summary.failed, {*(slide.slide for slide in found), *tasks})
    summary.excluded = excluded
    if not summary.records:
        slide, (_, reason) = next(iter(summary.failed.items()))
        raise DataError(
            f"{source}: none of {len(kept):,} slides could be taken, see {out / FAILURES}; the first, {slide}: {reason}"
        )
    return summary


def prepare_slide(source: Source, vocabulary: GeneVocabulary, options: Options) -> AnnData:
    """Read one slide as `Store.write` takes it: the spots that have both counts and features, in the features' order.

    Raises
    ------
    InputError
        If a file is missing or damaged, no barcode is in both, no gene is known, nothing is counted, or the counts are
        not what the options say.
    """
    for what, path in (("counts", source.counts), ("features", source.features)):
        if not path.is_file():
            raise DataError(f"no {what}: {path} is missing")
    slide = read_slide(source.features)
    found = read_counts(source.counts)
    spots, rows = _in_both(slide.obs_names, list(found.obs_names))
    adata = measured(found.X[rows], list(found.var_names), vocabulary, str(source.counts))
    _require_units(adata.X, options.counts)
    obs = found.obs.iloc[rows].copy()
    for table in source.tables:
        if table.is_file():
            spots_of_table = read_spots(table, obs.index)
            obs = obs.join(spots_of_table[[column for column in spots_of_table if column not in obs]])
    adata.obs = _writable(obs)
    adata.obsm["spatial"], adata.obsm["features"] = slide.coords[spots], slide.features[spots]
    log_counts = adata.X if options.counts == "log1p" else adata.X.log1p()
    adata.var["highly_variable"] = _marked(adata, found, vocabulary, options.hvg, log_counts)
    return adata


def _in_both(of_features: Sequence[str], of_counts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Rows of the spots that stand in both: those of the features, ascending, and theirs of the counts."""
    row = {barcode: i for i, barcode in enumerate(of_counts)}
    if len(row) != len(of_counts):
        twice = Counter(of_counts).most_common(1)[0][0]
        raise DataError(f"the counts name spot {twice!r} twice; each spot needs one row")
    spots = [i for i, barcode in enumerate(of_features) if barcode in row]
    if len(spots) < 2:  # one spot has no place and no variance
        raise DataError(
            f"counts and features have {len(spots) or 'no'} barcode in common; the first of the counts is "
            f"{of_counts[0]!r}, of the features {of_features[0]!r} (a number where the file has no barcodes)"
        )
    return spots, [row[of_features[i]] for i in spots]


def _require_units(counts: csr_matrix, units: str) -> None:
    if not counts.data.any():
        raise DataError("nothing is counted: every count is 0")
    if is_whole(counts) and units == "log1p":
        raise DataError("all counts are whole numbers, as raw ones are; leave out --counts log1p")
    if not is_whole(counts) and units == "raw":
        raise DataError(
            f"counts are not whole numbers (highest {counts.data.max():g}), as if normalised or log-transformed; "
            "give raw counts, or --counts log1p where they are log1p of raw counts"
        )


def _writable(obs: pd.DataFrame) -> pd.DataFrame:
    """The columns that anndata can write; a column of mixed things, or of an odd name, is left out."""
    import h5py
    from anndata import AnnData
    from anndata.io import write_elem

    obs.columns = obs.columns.astype(str)
    adata = AnnData(obs=obs.loc[:, ~obs.columns.duplicated()])
    adata.strings_to_categoricals()
    columns = []
    with h5py.File("columns", "w", driver="core", backing_store=False) as memory:
        for number, column in enumerate(adata.obs):
            try:
                write_elem(memory, str(number), adata.obs[[column]])
                columns.append(column)
            except (TypeError, ValueError, KeyError, OSError):
                continue
    return adata.obs[columns]


def _marked(
    adata: AnnData, found: AnnData, vocabulary: GeneVocabulary, n: int, log_counts: csr_matrix
) -> npt.NDArray[np.bool_]:
    """Which genes [P] are highly variable: those that the file names, as published, or the n most variable."""
    if "raw_hvg_names" not in found.uns:
        return highly_variable(adata, n, log_counts)
    named = [vocabulary.find(str(name)) for name in np.ravel(found.uns["raw_hvg_names"])[:n]]
    chosen: npt.NDArray[np.bool_] = np.isin(adata.var["token"], [token for token in named if token is not None])
    return chosen


def _record(source: Source, options: Options) -> Record:
    if not source.row:
        raise DataError("the metadata have no row of it")
    fields = record_fields(source, options.layout)
    return Record(
        slide=source.slide,
        organ=ORGANS[organ_token(fields.pop("organ") or None)],
        technology=_technology(fields.pop("technology")),
        counts=options.counts,
        label=source.row[options.label] if options.label is not None else "",
        made_from=_made_from(source, options),
        **fields,  # type: ignore[arg-type]  # the rest of them are text
    )


def _technology(name: str) -> str:
    return TECHNOLOGIES[technology_token(name)] if name else ""


def _made_from(source: Source, options: Options) -> str:
    """A hash of the slide's metadata and options, and of the names, sizes and times of its files."""
    files = [path for path in (source.counts, source.features, *source.tables) if path.exists()]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([VERSION, stats, source.row, astuple(options)]).encode()).hexdigest()


def _take_all(
    sources: Sequence[Source], store: Store, options: Options, workers: int, on_slide: OnTile | None
) -> Summary:
    summary = Summary()
    to_do = [source for source in sources if not _is_taken(source, store, options)]
    summary.skipped = len(sources) - len(to_do)
    to_do_slides = {source.slide for source in to_do}
    summary.records = [store.records[source.slide] for source in sources if source.slide not in to_do_slides]
    for done, (slide, outcome) in enumerate(_outcomes(to_do, store, options, workers), summary.skipped + 1):
        if isinstance(outcome, Record):
            store.index(outcome, at_once=False)
            summary.records.append(outcome)
        else:
            summary.failed[slide] = outcome
        if on_slide is not None:
            on_slide(done, len(sources))
    return summary


def _is_taken(source: Source, store: Store, options: Options) -> bool:
    record = store.records.get(source.slide)
    unchanged = record is not None and record.made_from == _made_from(source, options)
    return unchanged and store.slide_path(source.slide).exists()


def _outcomes(
    sources: Sequence[Source], store: Store, options: Options, workers: int
) -> Iterator[tuple[str, Record | Failure]]:
    """Each slide with its record, its file being written, or with the reason why not, as they come."""
    to_do = list(sources)
    # The first slide that can be taken sets the width of the features, which every worker has to know.
    while to_do and (workers == 1 or store.n_features == 0):
        source = to_do.pop(0)
        yield source.slide, _take(store, source, options)
    if not to_do:
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    try:
        slides: dict[Future[Record | Failure], str] = {
            pool.submit(_take_in_worker, store.path, source, options): source.slide for source in to_do
        }
        for future in as_completed(slides):
            yield slides[future], future.result()
    except BrokenProcessPool as error:
        raise MemoryLimitError(
            f"{store.path}: a worker was killed or ran out of memory; run again with fewer --workers, it continues"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _take(store: Store, source: Source, options: Options) -> Record | Failure:
    """Write a slide's file into the store: its record, or why it cannot be taken."""
    try:
        record = _record(source, options)
        return store.write(record, prepare_slide(source, store.vocabulary, options))
    except InputError as error:
        return Failure(error.code, str(error))
    except Exception as error:  # one odd file must not end a run over a thousand
        return Failure(code_of(error), f"{type(error).__name__}: {error}")


def _take_in_worker(store: Path, source: Source, options: Options) -> Record | Failure:
    return _take(_opened(store), source, options)


_opened: Callable[[Path], Store] = cache(Store.open)  # once a worker


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; the main process reports
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")


def _end_with_parent() -> None:
    """A pool's process would wait for work for ever where its parent was killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Keep other runs off the store, and clear away what a killed one left half-written."""
    lock = FileLock(store / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(f"{store}: another stpath data prepare writes into it; wait for its end") from None
    try:
        yield
    finally:
        for folder in (store, store / "slides"):
            sweep(folder)
        lock.release()


def _write_failures(store: Store, failed: dict[str, Failure], tried: Set[str]) -> None:
    """Keep the failures of other data sets, which this run did not try again."""
    import pandas as pd

    path = store.path / FAILURES
    before: dict[str, Failure] = {}
    if path.exists():
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding_errors="surrogateescape")
        before = {row["slide"]: Failure(row.get("code", ""), row["reason"]) for row in table.to_dict("records")}
    store.write_failures({slide: why for slide, why in before.items() if slide not in tried} | failed)


def _warn_of_others(sources: Sequence[Source], options: Options) -> None:
    """Say which organs have no token of their own."""
    organs = Counter(record_fields(source, options.layout)["organ"] for source in sources if source.row)
    others = {organ: n for organ, n in organs.items() if _becomes_others(organ)}
    if others:
        shown = ", ".join(f"{organ or 'none given'} ({n:,})" for organ, n in sorted(others.items()))
        warn(f"organs without a token of STPath become Others: {shown}")


def _becomes_others(organ: str) -> bool:
    try:
        return organ.casefold() != "others" and ORGANS[organ_token(organ or None)] == "Others"
    except InputError:  # reported for each slide
        return False


def _layout(name: str) -> Layout:
    try:
        return Layout(name)
    except ValueError:
        raise OptionError(f"unknown layout {name!r}; known: {', '.join(Layout)}") from None
