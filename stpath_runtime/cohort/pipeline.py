"""Slides through an engine, one after the other, while the next ones are read and the last ones written.

Everything that a cohort does to a slide is here, but not where it runs: `run.run_cohort` in one process and the
workers of a Ray cluster (`on_ray`) both call `run_jobs`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import InputError, OutputError, code_of, warnings_to
from ..images.encoder import Encoder, load_encoder, require_width
from ..images.features import FeaturesJob
from ..images.settings import TileSettings
from ..images.slide import ImageSlides, needs_encoder
from ..images.slide import features_job as features_beside
from ..readers import read_context, read_slide
from ..results.output import PROVENANCE, TABLE, Format, is_prediction
from ..results.prediction import Prediction
from ..results.reading import read_facts
from ..results.targets import slide_name
from ..slides.context import ContextRows, choose_spots
from ..slides.slide import Slide
from .remote import fetched, is_url, sent, transfer, version

READ_AHEAD = 4  # slides that are read ahead while one runs
WRITE_BEHIND = 4  # slides that may wait to be written
LISTS = (".txt", ".json", ".csv")  # files of barcodes
SMALL = 1_024  # spots: smaller slides run together, up to this many
TOGETHER = 4 * SMALL

Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """The settings for every slide of a cohort, in types that can be sent between machines."""

    engine: str
    backend: str = "onnxruntime"
    device: str = "cpu"
    precision: str | None = None
    genes: list[str] | None = None
    features_key: str | None = None
    context_spots: str | None = None
    fill_context: bool = False
    attention: str | None = None
    neighbors: int | None = None
    memory: int | str | None = None
    embeddings: bool = False
    form: Format = Format.H5AD
    dtype: str = "float32"
    resume: bool = True
    encoder: str | None = None  #: of slide images
    encoder_backend: str | None = None  #: what runs it; None: what runs the engine
    tiles: TileSettings = field(default_factory=TileSettings)  #: of slide images
    steps: int | None = None  #: of STFlow, as are the two below
    seed: int | None = None
    samples: int | None = None

    def load(self) -> Engine:
        """Load the engine, and check the settings against it."""
        engine = Engine.load(self.engine, backend=self.backend, device=self.device, precision=self.precision)
        self.options(engine)
        return engine

    def options(self, engine: Engine) -> dict[str, Any]:
        """What the engine's `predict_many` takes beside genes and memory, checked against the engine."""
        names = ("attention", "neighbors", "embeddings", "fill_context", "steps", "seed", "samples")
        return engine.options(**{name: getattr(self, name) for name in names})

    def load_encoder(self, engine: Engine) -> Encoder | None:
        """Load the tile encoder, if there is one, and check that the engine takes its features."""
        if self.encoder is None:
            return None
        backend = self.encoder_backend or self.backend
        encoder = load_encoder(self.encoder, backend=backend, device=self.device, precision=self.precision)
        require_width(encoder.name, encoder.width, engine.manifest.model.n_features, self.engine)
        return encoder


@dataclass(frozen=True)
class Job:
    """One slide of a cohort."""

    slide: str  #: a path, or a URL
    target: str  #: of its result
    organ: str | None = None
    technology: str | None = None
    context: str | None = None
    mpp: str | None = None  #: of an image, as the manifest says it
    tissue: str | None = None
    spots: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a slide."""

    slide: str
    output: str
    status: str  # "done", "skipped" or "failed"
    spots: int = 0
    seconds: float = 0.0  # of reading, running and writing it, of a batch by its share of the spots
    warnings: tuple[str, ...] = ()
    code: str = ""  # of the error, where it failed
    reason: str = ""


@dataclass
class _Work:
    """A slide in progress."""

    job: Job
    slide: Slide | None = None
    context: ContextRows | None = None
    prediction: Prediction | None = None
    run: str = ""  # the fingerprint of its result
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    picture: dict[str, Any] = field(default_factory=dict)  # of its tissue, where it is an image
    copies: dict[str, str] = field(default_factory=dict)  # files of this machine, and the URLs that they are copies of
    outcome: Outcome | None = None  # where it is known

    def end(self, status: str, code: str = "", reason: str = "") -> None:
        spots = len(self.slide) if self.slide is not None and status == "done" else 0
        warned = tuple(dict.fromkeys(map(self._named, self.warnings)))
        self.outcome = Outcome(
            self.job.slide,
            self.job.target,
            status,
            spots,
            round(self.seconds, 3),
            warned,
            code,
            " ".join(self._named(reason).split()),
        )

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A file, or a local copy of it; messages use the original name."""
        with fetched(name) as path:
            if is_url(name):
                self.copies[str(path)] = name
            yield path

    def _named(self, message: str) -> str:
        for copy, name in self.copies.items():
            message = message.replace(copy, name)
        return message


def run_jobs(
    engine: Engine,
    jobs: Sequence[Job],
    settings: Settings,
    watch: Watch = lambda what, done, total: None,
    encoder: Encoder | None = None,
) -> Generator[Outcome, None, None]:
    """Run slides; yields the outcome of each, in order.

    `watch` is called during the work with the step and the slide, the amount done and the total.

    A slide that fails, for whatever reason, does not stop the others. When the caller stops iterating, the slide that
    is being written is finished, and the others are dropped.
    """
    identity = _identity(engine, settings, encoder)
    with ExitStack() as stack:
        images = None
        if encoder is not None:
            due = (features_job(job, settings) for job in jobs if _is_image_to_run(job, settings, identity))
            images = stack.enter_context(closing(ImageSlides(due, encoder)))
        reader, writer = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(2))
        stack.callback(reader.shutdown, wait=True, cancel_futures=True)
        stack.callback(writer.shutdown, wait=True, cancel_futures=True)
        if images is not None:
            stack.callback(images.stop)  # a slide's features may take hours; they go on with the next run
        read = partial(_read, engine, settings=settings, identity=identity, images=images, watch=watch)
        waiting: deque[Future[_Work]] = deque()
        for batch in _batches(_read_ahead(reader, jobs, read)):
            _encode(engine, batch, settings, watch)
            waiting += [writer.submit(_write, work, settings, watch) for work in batch]
            while waiting and (waiting[0].done() or len(waiting) > WRITE_BEHIND):
                yield _outcome(waiting.popleft())
        while waiting:
            yield _outcome(waiting.popleft())


def _read_ahead(reader: ThreadPoolExecutor, jobs: Sequence[Job], read: Callable[[Job], _Work]) -> Iterator[_Work]:
    pending: deque[Future[_Work]] = deque()
    for job in jobs:
        pending.append(reader.submit(read, job))
        if len(pending) > READ_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _batches(read: Iterator[_Work]) -> Iterator[list[_Work]]:
    """Batches of slides to run in one call: small ones together, others alone."""
    batch: list[_Work] = []
    spots = 0
    for work in read:
        size = len(work.slide) if work.slide is not None else 0
        if batch and (size > SMALL or spots + size > TOGETHER):
            yield batch
            batch, spots = [], 0
        batch.append(work)
        spots += size
        if size > SMALL:
            yield batch
            batch, spots = [], 0
    if batch:
        yield batch


def _read(
    engine: Engine,
    job: Job,
    settings: Settings,
    identity: dict[str, Any],
    images: ImageSlides | None,
    watch: Watch,
) -> _Work:
    work = _Work(job)
    with _step(work):
        work.run, whole = _checked(job, settings, identity)
        if whole:
            work.end("skipped")
            return work
        if images is not None and needs_encoder(job.slide):
            tell = partial(watch, f"tiles {slide_name(job.slide)}")
            slide, work.picture = images.next(job.organ, job.technology, lambda _, done, total: tell(done, total))
        else:
            with work.fetched(job.slide) as path:
                slide = read_slide(
                    path,
                    organ=job.organ,
                    technology=job.technology,
                    features_key=settings.features_key,
                    sections=settings.tiles.sections,
                )
        if job.context is not None:
            with work.fetched(job.context) as path:
                context = read_context(path)
            chosen = choose_spots(context, slide, settings.context_spots) if settings.context_spots else context
            work.context = chosen.resolve(slide, engine.vocabulary)
        work.slide = slide
    return work


def _checked(job: Job, settings: Settings, identity: dict[str, Any]) -> tuple[str, bool]:
    """The fingerprint of a slide's result, and whether a whole one of it is there already.

    Raises
    ------
    InputError
        If an input is not there, or something else is where the result goes.
    """
    run = fingerprint(job, identity)
    if settings.resume and _recorded(job.target, settings.form) == run:
        return run, True
    if _is_of_others(job.target):
        raise OutputError(f"{job.target} exists and is not a prediction by stpath; move it away")
    return run, False


def _is_image_to_run(job: Job, settings: Settings, identity: dict[str, Any]) -> bool:
    """Whether features are to be made for a slide: it is an image, and its result is not there yet."""
    try:
        return needs_encoder(job.slide) and not _checked(job, settings, identity)[1]
    except (InputError, OSError):
        return False  # it is said when the slide is read


def features_job(job: Job, settings: Settings) -> FeaturesJob:
    """The job that makes the features of a slide image, kept beside its result."""
    own = {name: value for name in ("tissue", "spots") if (value := getattr(job, name)) is not None}
    if job.mpp is not None:
        own["mpp"] = float(job.mpp)
    return features_beside(Path(job.slide), Path(job.target), replace(settings.tiles, **own))


def _encode(engine: Engine, batch: list[_Work], settings: Settings, watch: Watch) -> None:
    """Run the slides of a batch together; if that fails, each alone, so that only the faulty one does."""
    todo = [work for work in batch if work.outcome is None and work.slide is not None]
    if not todo:
        return
    earlier = [list(work.warnings) for work in todo]
    with _step(*todo) as failed:
        _encode_together(engine, todo, settings, watch)
    if failed and len(todo) > 1:
        for work, before in zip(todo, earlier, strict=True):
            work.outcome, work.warnings = None, before
            _encode(engine, [work], settings, watch)


def _encode_together(engine: Engine, works: list[_Work], settings: Settings, watch: Watch) -> None:
    slides = [work.slide for work in works if work.slide is not None]
    more = f" and {len(works) - 1} more" if len(works) > 1 else ""
    predictions = engine.predict_many(
        slides,
        [work.context for work in works],
        genes=settings.genes,
        memory=settings.memory,
        **settings.options(engine),
        on_tile=partial(watch, f"predict {slide_name(works[0].job.slide)}{more}"),
    )
    for work, prediction in zip(works, predictions, strict=True):
        prediction.frame.uns["stpath"]["run"] = work.run
        if work.picture:
            prediction.frame.uns["spatial"] = work.picture
        work.prediction = prediction


def _write(work: _Work, settings: Settings, watch: Watch) -> _Work:
    if work.prediction is not None and work.outcome is None:
        with _step(work), sent(work.job.target) as path:
            work.prediction.write(path, settings.form, settings.dtype, partial(watch, f"write {path.name}"))
        if work.outcome is None:
            work.end("done")
    work.prediction = None
    return work


def _outcome(written: Future[_Work]) -> Outcome:
    outcome = written.result().outcome
    assert outcome is not None
    return outcome


def fingerprint(job: Job, identity: dict[str, Any]) -> str:
    """SHA-256 of everything that a result depends on: engine, settings, names, and sizes and times of its input files.

    Raises
    ------
    InputError
        If a file is not there.
    """
    named = (job.slide, job.context, job.tissue, job.spots)
    files = {name: version(name) for name in named if name is not None}
    facts = {**identity, "organ": job.organ, "technology": job.technology, "files": list(files.values())}
    if job.mpp is not None:
        facts["mpp"] = job.mpp
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _identity(engine: Engine, settings: Settings, encoder: Encoder | None) -> dict[str, Any]:
    """The parts of engine and settings that a result depends on or records (not the memory)."""
    options = settings.options(engine)
    if "attention" in options:
        options["attention"] = str(options["attention"])
    kept = asdict(settings) | {"engine": engine.hash(), "attention": None} | options
    for free in ("memory", "neighbors", "resume", "encoder_backend"):
        del kept[free]
    for name in ("steps", "seed", "samples"):  # as before there was STFlow, so that results of then are known again
        if name not in options:
            del kept[name]
    if encoder is None:  # as before there were images, so that results of then are known again
        del kept["encoder"], kept["tiles"]
    else:
        kept["encoder"] = encoder.about
    chosen = settings.context_spots
    if chosen is not None and Path(chosen).suffix.lower() in LISTS and Path(chosen).is_file():
        kept["context_spots"] = version(chosen)
    return kept


def _is_of_others(target: str) -> bool:
    """Whether the target exists and was not written by stpath."""
    if not is_url(target):
        return Path(target).exists() and not is_prediction(Path(target))
    with transfer(target, "read") as (files, place):
        if files.isdir(place):
            return not any(files.isdir(f"{place}/{key}") for key in (PROVENANCE, f"tables/{TABLE}/{PROVENANCE}"))
        if not files.exists(place):
            return False
        import h5py

        with files.open(place, "rb") as remote:
            try:
                with h5py.File(remote, "r") as file:
                    return PROVENANCE not in file
            except OSError:  # no HDF5
                return True


def _recorded(target: str, form: Format) -> str | None:
    """The fingerprint in a result; None if it has none, or is not whole."""
    try:
        if is_url(target):
            return _recorded_there(target, form)
        return str(read_facts(target).get("run")) if Path(target).exists() else None
    except (InputError, OSError, KeyError):
        return None


def _recorded_there(target: str, form: Format) -> str:
    """The fingerprint in a result at a URL, fetched alone."""
    if form is Format.H5AD:
        import fsspec
        import h5py

        with fsspec.open(target) as remote, h5py.File(remote, "r") as file:
            return str(file[PROVENANCE]["run"].asstr()[()])
    import zarr

    uns = "uns" if form is Format.ZARR else f"tables/{TABLE}/uns"
    with fetched(f"{target}/{uns}") as path:
        return str(zarr.open_array(path / "stpath" / "run", mode="r")[...])


@contextmanager
def _step(*works: _Work) -> Iterator[list[Exception]]:
    """One step of one or more slides: they get its time and its warnings, and an error fails them only."""
    failed: list[Exception] = []
    start = time.perf_counter()

    def collect(message: str) -> None:
        for work in works:
            work.warnings.append(message)

    try:
        with warnings_to(collect):
            yield failed
    except Exception as error:  # whatever it is, the other slides continue
        failed.append(error)
    spots = sum(len(work.slide) for work in works if work.slide is not None) or 1
    for work in works:
        share = len(work.slide) / spots if len(works) > 1 and work.slide is not None else 1.0
        work.seconds += (time.perf_counter() - start) * share
        for found in failed:
            reason = str(found) if isinstance(found, InputError) else f"{type(found).__name__}: {found}"
            work.end("failed", code_of(found), reason)
