"""Slide images and patches files to files of features: decoding threads, batches, the encoder, the file.

Tiles are read ahead, by threads, into a queue that spans slides; the encoder never waits for the next slide to be
opened. A file of features is made whole, with NaN for features that are not computed yet, and batches are written into
it where they belong: a run that was killed finds the first row of NaN and goes on there, to the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import queue
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, OutputError, warn, warnings_to
from ..files import require_writable, written_whole
from ..machine import give_back_memory
from ..progress import OnTile
from ..results.targets import slide_name
from .encoder import Encoder, Tiles
from .picture import draw_tiles
from .reading import is_image
from .settings import TileSettings
from .sources import TileSource, View, check_patches, identity, open_source

AHEAD = 3  # batches that are read before they are encoded
ROWS_AT_ONCE = 8_192  # looked through for NaN
DTYPE = np.dtype("<f4")
TILES_ENDING = ".tiles.png"


@dataclass(frozen=True)
class FeaturesJob:
    """One slide image or patches file, and where its features go."""

    source: Path
    target: Path
    settings: TileSettings = field(default_factory=TileSettings)

    @property
    def half(self) -> Path:
        """The file while it is not whole."""
        return self.target.with_name(f".{self.target.name}.partial")


@dataclass(frozen=True, eq=False)
class Made:
    """What became of a job."""

    job: FeaturesJob
    total: int = 0  #: tiles
    view: View | None = None  #: of an image whose tiles were looked for in this run
    error: Exception | None = None
    warnings: tuple[str, ...] = ()


@dataclass(eq=False)
class _Work:
    """A job in progress."""

    job: FeaturesJob
    source: TileSource | None = None  # None where the features are there already
    total: int = 0
    first: int = 0  # tile that is to be encoded next
    batch: int = 0
    handle: int = -1  # of the file while it is not whole, which this run alone may write
    offset: int = 0  # bytes before its features
    error: Exception | None = None
    warnings: list[str] = field(default_factory=list)
    open: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True, eq=False)
class _Batch:
    work: _Work
    start: int
    stop: int
    parts: list[Future[Tiles]]


_Item = _Batch | _Work | Exception | None  # None: there are no more


def extract(
    jobs: Iterable[FeaturesJob], encoder: Encoder, *, batch_size: int | None = None, on_batch: Any = None
) -> Generator[Made, None, None]:
    """Compute the features of slides, one after the other; yields what became of each, errors included.

    Parameters
    ----------
    jobs
        Taken as they are needed, in another thread.
    batch_size
        Tiles at once; None: what the encoder finds best.
    on_batch
        Called with the job, the number of its tiles that are done, and in all.
    """
    with ExitStack() as stack:
        opened: list[_Work] = []
        stack.callback(_close, opened)  # where it ends early
        threads = max(2, len(os.sched_getaffinity(0)))
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        feed: queue.Queue[_Item] = queue.Queue(AHEAD)
        stop = threading.Event()
        planner = threading.Thread(
            target=_plan, args=(jobs, encoder, batch_size, pool, threads, feed, opened, stop), daemon=True
        )
        planner.start()
        stack.callback(planner.join)
        stack.callback(stop.set)
        while (item := feed.get()) is not None:
            if isinstance(item, Exception):
                raise item
            if isinstance(item, _Work):
                opened.remove(item)
                yield _ended(item)
                continue
            if item.work.error is None:
                try:
                    _encode(item, encoder)
                except Exception as error:  # whatever it is, the other slides continue
                    item.work.error = _kept(error, item)
            wait(item.parts)  # where one failed, too: no source is closed while a thread reads of it
            if item.work.error is None and on_batch is not None:
                on_batch(item.work.job, item.stop, item.work.total)


def extract_one(
    job: FeaturesJob, encoder: Encoder, batch_size: int | None = None, on_batch: OnTile | None = None
) -> Made:
    """Compute the features of one slide.

    Raises
    ------
    InputError
        If it cannot be read or written, or its features cannot be computed.
    """
    tell = None if on_batch is None else (lambda job, done, total: on_batch(done, total))
    with closing(extract([job], encoder, batch_size=batch_size, on_batch=tell)) as found:
        (made,) = found
    for warning in made.warnings:
        warn(warning)
    if made.error is not None:
        raise made.error
    return made


def find_targets(sources: Sequence[Path], out: Path) -> list[Path]:
    """The features file of each source: `out`, or NAME.h5 in the folder `out`.

    Raises
    ------
    InputError
        If `out` is one file for several, or a target would overwrite a source or another target.
    """
    is_file = out.suffix == ".h5" and not out.is_dir()
    if is_file and len(sources) > 1:
        raise OutputError(f"--out {out}: one file for {len(sources)} slides; give a folder")
    if not is_file and out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: a file is there; give a folder, or a name that ends in .h5")
    targets = [out] if is_file else [out / f"{slide_name(path)}.h5" for path in sources]
    inputs = {path.resolve() for path in sources}
    for i, (path, target) in enumerate(zip(sources, targets, strict=True)):
        if target.resolve() in inputs:
            raise OutputError(f"--out {out}: {target} would overwrite the patches; choose another folder")
        if target in targets[:i]:
            first = sources[targets.index(target)]
            raise OutputError(f"{first} and {path} would both be written to {target}; run them into two folders")
        require_writable(target)
    return targets


def require_sources(sources: Sequence[Path], size: int) -> None:
    """Check before the work that each source is there, and is an image by its name or a patches file.

    Raises
    ------
    InputError
        If one is not.
    """
    for path in sources:
        if not is_image(path) or not path.exists():
            check_patches(path, size)


def _plan(
    jobs: Iterable[FeaturesJob],
    encoder: Encoder,
    batch_size: int | None,
    pool: ThreadPoolExecutor,
    threads: int,
    feed: queue.Queue[_Item],
    opened: list[_Work],
    stop: threading.Event,
) -> None:
    """Open slides, find their tiles, and have them read, as far ahead as the queue goes."""

    def put(item: _Item) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                feed.put(item, timeout=0.1)
                return

    def read(work: _Work) -> None:
        """Have the tiles read that are to be encoded."""
        assert work.source is not None
        for start in range(work.first, work.total, work.batch):
            if work.error is not None or stop.is_set():  # in an earlier batch
                break
            end = min(start + work.batch, work.total)
            step = max(1, math.ceil((end - start) / (2 * threads)))
            parts = [pool.submit(work.source.read, low, min(low + step, end)) for low in range(start, end, step)]
            put(_Batch(work, start, end, parts))

    try:
        for job in jobs:
            if stop.is_set():
                return
            work = _Work(job)
            opened.append(work)
            try:
                with warnings_to(work.warnings.append):
                    _begin(work, encoder, batch_size)
                give_back_memory()  # what finding the tissue took
                if work.source is not None:
                    read(work)
            except Exception as error:  # the consumer says it of this slide
                work.error = error
            put(work)
    except Exception as error:  # of the jobs
        put(error)
    put(None)


def _begin(work: _Work, encoder: Encoder, batch_size: int | None) -> None:
    """Open a job's source and its file; a file that is whole already, of the same making, is left as it is."""
    job = work.job
    about = {**encoder.about, "tiles": identity(job.source, job.settings)}
    if job.target.exists():
        work.total = _require_same(job.target, about)
        return
    source = work.open.enter_context(open_source(job.source, encoder, job.settings))
    work.total = source.total
    job.target.parent.mkdir(parents=True, exist_ok=True)
    if source.view is not None:
        draw_tiles(source.view, tiles_picture(job.target))
    if job.half.exists():  # claimed before it may be replaced
        work.handle = _claimed(work)
    found = _goes_on(job.half, about)
    if found is None:
        work.batch = batch_size or encoder.batch()
        _create(job.half, source, encoder.width, {**about, "batch": work.batch})
        work.handle = _claimed(work)
    else:
        work.batch, work.first = found
    with _read(job.half) as file:
        work.offset = _features(file).id.get_offset()
    work.source = source


def _claimed(work: _Work) -> int:
    """A handle of a job's file, which no other run has, for as long as the job is open.

    Raises
    ------
    InputError
        If another run has it.
    """
    handle = os.open(work.job.half, os.O_RDWR)
    work.open.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{work.job.target}: another run computes it; wait for it to end") from error
    except OSError:  # a file system without locks: whose file it is shows at the end
        pass
    return handle


def _create(half: Path, source: TileSource, width: int, about: dict[str, Any]) -> None:
    """A whole file of features, all of them NaN."""
    import h5py

    with written_whole(half) as partial, h5py.File(partial, "w") as file:
        name = source.write(file)
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        made.set_obj_track_times(False)  # the same bytes whenever it is made
        made.set_fill_value(np.array(np.nan, DTYPE))
        space = h5py.h5s.create_simple((source.total, width))
        h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, space, made)
        file.attrs.update(about)


def _goes_on(half: Path, about: dict[str, Any]) -> tuple[int, int] | None:
    """The batch of an earlier run of the same making, and the tile that it goes on with; None if there is none."""
    found: dict[str, Any] = {}
    with suppress(OSError, KeyError), _read(half) as file:  # it may be damaged, or not be there
        found = dict(file.attrs)
        if not _differences(found, about):
            features, batch = _features(file), int(found["batch"])
            for start in range(0, len(features), ROWS_AT_ONCE):
                missing = np.flatnonzero(np.isnan(features[start : start + ROWS_AT_ONCE]).any(axis=1))
                if len(missing):
                    return batch, (start + int(missing[0])) // batch * batch
            return batch, len(features)
    if found:
        warn(f"{half}: begun with other {_differences(found, about)}; it starts over")
    return None


def _encode(item: _Batch, encoder: Encoder) -> None:
    """Encode a batch, and write its features where they belong."""
    work = item.work
    tiles = np.concatenate([part.result() for part in item.parts])
    features = np.ascontiguousarray(encoder(tiles), DTYPE)
    try:
        written = os.pwrite(work.handle, features.data, work.offset + item.start * features[0].nbytes)
        if written != features.nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OutputError(
            f"{work.job.half}: cannot be written ({error.strerror}); free some space, and run again"
        ) from error


def _ended(work: _Work) -> Made:
    """Close a job's source, and give its file its name where it is whole."""
    warnings = tuple(work.warnings)
    with work.open:
        if work.error is not None:
            return Made(work.job, error=work.error, warnings=warnings)
        if work.source is not None:
            os.fsync(work.handle)
            if not os.path.samestat(os.fstat(work.handle), work.job.half.stat()):
                error = OutputError(f"{work.job.target}: another run has begun it anew; wait for that to end")
                return Made(work.job, error=error, warnings=warnings)
            work.job.half.replace(work.job.target)
    return Made(work.job, work.total, work.source.view if work.source is not None else None, warnings=warnings)


def _close(works: Sequence[_Work]) -> None:
    """Close the sources and files of works."""
    for work in works:
        work.open.close()


def _kept(error: Exception, item: _Batch) -> Exception:
    """The error, with what is kept of the slide's features."""
    if not isinstance(error, InputError) or not item.start:
        return error
    return type(error)(
        f"{error}; the features of the first {item.start:,} of {item.work.total:,} tiles are kept in "
        f"{item.work.job.half}, which is a part and no features file: a later run goes on there"
    )


def tiles_picture(target: Path) -> Path:
    """Where the picture of a slide's tiles goes: beside its features."""
    return target.with_name(target.name.removesuffix(".h5").removesuffix(".features") + TILES_ENDING)


def _read(path: Path) -> Any:
    """An HDF5 file to be read, whoever has locked it."""
    import h5py

    return h5py.File(path, "r", locking=False)


def _features(file: Any) -> Any:
    return file["features"] if "features" in file else file["embeddings"]


def _require_same(out: Path, about: dict[str, Any]) -> int:
    """The number of tiles of a file of the same making.

    Raises
    ------
    InputError
        If it is something else.
    """
    found: dict[str, Any] = {}
    with suppress(OSError, KeyError), _read(out) as file:
        found = dict(file.attrs)
        if not _differences(found, about):
            return len(_features(file))
    raise OutputError(f"{out}: exists, and is of other {_differences(found, about)}; choose another name, or delete it")


def _differences(found: dict[str, Any], about: dict[str, Any]) -> str:
    return ", ".join(name for name, value in about.items() if found.get(name) != value)
