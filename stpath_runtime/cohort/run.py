"""A cohort: its slides, from a manifest or a folder, and a run that continues where the last one stopped."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import CohortError, InputError, OutputError, warn
from ..files import remove, require_writable, sweep, written_whole
from ..images.encoder import Encoder
from ..images.slide import require_encoder
from ..names import delimiter_of, shown
from ..readers import read_slide
from ..results.output import Format, require_spatialdata
from ..results.targets import slide_name
from ..slides.vocabulary import nearest_names, organ_token, technology_token
from .pipeline import Job, Outcome, Settings, Watch, run_jobs
from .progress import cohort_progress
from .remote import discard, fetched, is_url, join, sent

ALIASES = {"tech": "technology"}  # as the option is called
COLUMNS = ("slide", "organ", "technology", "context", "mpp", "tissue", "spots")
FILE_COLUMNS = ("context", "tissue", "spots")
SUMMARY_COLUMNS = ("slide", "output", "status", "spots", "seconds", "warnings")
ENDINGS = (".h5", ".hdf5", ".h5ad", ".zarr", ".zarr.zip")  # of what is taken from a folder
TABLES = (".csv", ".tsv")  # manifests
FAILURES, SUMMARY, LOCK = "failures.csv", "summary.csv", ".stpath.lock"


@dataclass(frozen=True)
class Totals:
    """The totals of a run."""

    done: int
    skipped: int
    failed: int
    spots: int
    seconds: float

    def __str__(self) -> str:
        rate = f", {self.spots / self.seconds:,.0f} spots/s" if self.spots and self.seconds else ""
        return (
            f"{self.done:,} done ({self.spots:,} spots in {self.seconds:,.1f} s{rate}), {self.skipped:,} skipped, "
            f"{self.failed:,} failed"
        )


def read_cohort(
    source: str,
    out: str,
    form: Format,
    organ: str | None = None,
    technology: str | None = None,
    images: Sequence[str] = (),
) -> list[Job]:
    """The slides of a manifest (.csv) or a folder, and where each result goes.

    Parameters
    ----------
    source
        A .csv with a column `slide`, a path (a relative one from the manifest's folder) or URL, and, as need be,
        `organ`, `technology` and `context`; or a folder, of which every .h5, .h5ad, .zarr and .zarr.zip is a slide.
    out
        Folder or URL of the results, each named after its slide.
    organ, technology
        Of slides for which the manifest says nothing.
    images
        Endings of slide images that are taken of a folder, too.

    Raises
    ------
    InputError
        If the manifest cannot be read, names no slide, an unknown organ or technology, or two slides would share a
        result or be overwritten by one.
    """
    if form is Format.SPATIALDATA:
        require_spatialdata()
    rows = _manifest(source) if source.lower().endswith(TABLES) else [(f, {}) for f in _folder(source, out, images)]
    jobs: dict[str, Job] = {}
    for slide, row in rows:
        target = join(out, f"{slide_name(slide)}{form.suffix}")
        more = [row.get(name) for name in ("context", "mpp", "tissue", "spots")]
        job = Job(slide, target, row.get("organ") or organ, row.get("technology") or technology, *more)
        if target in jobs:
            raise CohortError(_one_result(source, jobs[target].slide, slide, target))
        jobs[target] = job
    inputs = (name for job in jobs.values() for name in (job.slide, job.context, job.tissue, job.spots))
    read = {_absolute(name) for name in inputs if name is not None}
    for target in jobs:
        if _absolute(target) in read:
            raise OutputError(f"--out {out}: {target} would overwrite an input; choose another folder")
    if not jobs:
        raise CohortError(f"{source}: no slides; expected rows below the header, or files {', '.join(ENDINGS)}")
    organs, technologies = {job.organ for job in jobs.values()}, {job.technology for job in jobs.values()}
    for names, token in ((organs, organ_token), (technologies, technology_token)):
        for name in sorted(names - {None}, key=str):
            try:
                token(name)
            except InputError as error:
                raise CohortError(f"{source}: {error}") from None
    return list(jobs.values())


def _one_result(source: str, first: str, second: str, target: str) -> str:
    """The error for two files with one target: often one holds a slide's features, the other its counts."""
    for name in (first, second):
        try:
            with fetched(name) as path:
                read_slide(path)
        except InputError as error:
            return (
                f"{source}: {first} and {second} would both be {target}, and {name} holds no features that can be read "
                f"({error}); move it, or name the slides in a manifest (.csv)"
            )
    return f"{source}: {first} and {second} would both be {target}; rename one"


def run_cohort(jobs: Sequence[Job], out: str, settings: Settings, cluster: dict[str, Any] | None = None) -> Totals:
    """Run a cohort into a folder; results of an earlier run with the same settings are kept.

    Writes a result a slide, `summary.csv` and, where slides fail, `failures.csv`.

    Parameters
    ----------
    cluster
        Arguments of `on_ray.run_on_ray`, to run on Ray; None: in this process.

    Raises
    ------
    InputError
        If the engine or the settings are at fault, the folder cannot be written, or another run is at work in it.
    """
    engine = settings.load()  # where slides run elsewhere, too: a fault of it is named before anything is written
    encoder = settings.load_encoder(engine)
    _require_encoder(jobs, settings)
    engine.check_context(any(job.context for job in jobs))
    panel = engine.vocabulary.panel(settings.genes)
    if settings.genes is not None:
        settings = replace(settings, genes=panel.names)
    outcomes: list[Outcome] = []
    earlier = _summary(out)
    if is_url(out):  # find out before the work if nothing can be written there
        _write_tables(jobs, [], earlier, out)
    with _locked(out), cohort_progress(len(jobs)) as progress:
        try:
            with closing(_outcomes(engine, encoder, jobs, settings, cluster, progress.watch)) as found:
                for outcome in found:
                    outcomes.append(outcome)
                    progress(outcome)
        finally:  # an interrupted run still reports what it did
            _write_tables(jobs, outcomes, earlier, out)
    return _totals(outcomes, progress.seconds())


def _outcomes(
    engine: Engine,
    encoder: Encoder | None,
    jobs: Sequence[Job],
    settings: Settings,
    cluster: dict[str, Any] | None,
    watch: Watch,
) -> Generator[Outcome, None, None]:
    if cluster is None:
        return run_jobs(engine, jobs, settings, watch, encoder)
    from .on_ray import run_on_ray

    return run_on_ray(jobs, settings, **cluster)


def _require_encoder(jobs: Sequence[Job], settings: Settings) -> None:
    """Refuse images without an encoder, an encoder without images, and images that are not on this machine.

    Raises
    ------
    InputError
        If it is so.
    """
    needed = require_encoder([job.slide for job in jobs], settings.encoder, settings.tiles)
    for job, is_image in zip(jobs, needed, strict=True):
        if is_image and (is_url(job.slide) or is_url(job.target)):
            raise CohortError(
                f"{job.slide}: slide images are read, and their features kept, in folders of this machine; copy them "
                "here, or mount their storage"
            )


def _totals(outcomes: Iterable[Outcome], seconds: float) -> Totals:
    outcomes = list(outcomes)
    count = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
    return Totals(**count, spots=sum(outcome.spots for outcome in outcomes), seconds=seconds)


@contextmanager
def _locked(out: str) -> Iterator[None]:
    """Lock the output folder, and remove the half-written files of killed runs from it."""
    if is_url(out):
        yield  # no lock: two runs would do the same work twice, but each result is still whole
        return
    from filelock import FileLock, Timeout

    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"--out {out}: a file is there; give a folder")
    require_writable(folder / SUMMARY)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(f"--out {out}: another run is at work in this folder; wait for it to end") from None
    try:
        sweep(folder)
        yield
        sweep(folder)  # of workers that died
    finally:
        lock.release()


def _manifest(source: str) -> list[tuple[str, dict[str, str]]]:
    """The slides of a manifest, and the other fields of their rows."""
    with fetched(source) as path:
        if not path.is_file():
            raise CohortError(f"{source}: no such manifest")
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")  # names of files need not be text
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text), strict=True)
        lines = [(reader.line_num, [field.strip() for field in row]) for row in reader]
    except csv.Error as error:
        raise CohortError(f"{source}: not a CSV file ({error})") from error
    head = [ALIASES.get(name, name) for name in lines[0][1]] if lines else []
    named = [name for name in head if name]
    if "slide" not in named or len(set(named)) < len(named):
        raise CohortError(f"{source}: the first line names the columns, slide among them, each once; it is: {head}")
    for name in named:
        if name not in COLUMNS:
            near = nearest_names(name, COLUMNS)
            warn(f"{source}: the column {name!r} is not read{near}; {', '.join(COLUMNS)} are")
    return [_row(head, row, source, line) for line, row in lines[1:] if any(row)]  # Excel leaves empty ones


def _row(head: Sequence[str], row: Sequence[str], source: str, line: int) -> tuple[str, dict[str, str]]:
    if len(row) != len(head):
        raise CohortError(f"{source}: line {line} has not as many fields as the header; quote those that hold a comma")
    if any(field for name, field in zip(head, row, strict=True) if not name):
        raise CohortError(f"{source}: line {line} has a field in a column without a name; name it in the first line")
    fields = {name: field for name, field in zip(head, row, strict=True) if name and field}
    slide = fields.pop("slide", "")
    if not slide_name(slide).strip("."):
        raise CohortError(f"{source}: line {line} names no slide ({slide!r}); give a path or URL")
    fields |= {name: _relative_to_manifest(source, fields[name]) for name in FILE_COLUMNS if name in fields}
    if not _is_number(fields.get("mpp", "1")):
        raise CohortError(f"{source}: line {line} has mpp {fields['mpp']!r}; give um a pixel, a number above 0")
    slide = _relative_to_manifest(source, slide)
    for name in (slide, *(fields.get(column, "") for column in FILE_COLUMNS)):
        if shown(name) != name and not Path(name).exists():
            raise CohortError(
                f"{source}: line {line} is not text in UTF-8 and names no file ({name!r}); save it as CSV in UTF-8"
            )
    return slide, fields


def _is_number(text: str) -> bool:
    """Whether a field is a finite number above 0."""
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _relative_to_manifest(source: str, path: str) -> str:
    """A path in a manifest; relative ones start from its folder."""
    if is_url(path) or Path(path).is_absolute():
        return path
    return join(source.rsplit("/", 1)[0], path) if is_url(source) else str(Path(source).parent / path)


def _folder(source: str, out: str, images: Sequence[str]) -> list[str]:
    if is_url(source):
        raise CohortError(f"{source}: give a manifest (.csv) of URLs; only a folder of this machine is listed")
    folder = Path(source)
    if not folder.is_dir():
        if source.lower().endswith((".xlsx", ".xls", ".ods")):
            raise CohortError(f"{source}: a spreadsheet; save it as CSV, and give that")
        what = "a file" if folder.exists() else "no such folder"
        raise CohortError(f"{source}: {what}, and no manifest (.csv); give one of both, or one slide to stpath predict")
    if _absolute(source) == _absolute(out):
        raise OutputError(f"--out {out}: the folder of the slides, of which results would be slides; choose another")
    found = (entry for entry in sorted(folder.iterdir()) if not entry.name.startswith("."))
    return [str(entry) for entry in found if entry.name.lower().endswith((*ENDINGS, *images))]


def _absolute(path: str) -> str:
    return path.rstrip("/") if is_url(path) else str(Path(path).resolve())


def _summary(out: str) -> dict[str, list[str]]:
    """Rows of an earlier run's summary, by output; empty if there is none, or if another program wrote it."""
    try:
        with fetched(join(out, SUMMARY)) as path:
            text = path.read_text(encoding="utf-8", errors="surrogateescape")  # names of files need not be text
        head, *rows = csv.reader(io.StringIO(text, newline=""))
    except (InputError, OSError, ValueError, csv.Error):
        return {}
    return {row[1]: row for row in rows if len(row) == len(SUMMARY_COLUMNS)} if tuple(head) == SUMMARY_COLUMNS else {}


def _write_tables(jobs: Sequence[Job], outcomes: Sequence[Outcome], earlier: dict[str, list[str]], out: str) -> None:
    """Write summary.csv and, where slides failed, failures.csv.

    Slides that were skipped, or that an interrupted run did not reach, keep their earlier row.
    """
    found = {outcome.output: _summary_row(outcome, earlier.get(outcome.output)) for outcome in outcomes}
    rows = [row for job in jobs if (row := found.get(job.target, earlier.get(job.target))) is not None]
    _write_csv(join(out, SUMMARY), SUMMARY_COLUMNS, rows)
    failed = [[o.slide, o.code, o.reason] for o in outcomes if o.status == "failed"]
    if failed:
        _write_csv(join(out, FAILURES), ("slide", "code", "reason"), failed)
    elif is_url(out):
        discard(join(out, FAILURES))  # of an earlier run
    else:
        remove(Path(out) / FAILURES)


def _summary_row(outcome: Outcome, earlier: list[str] | None) -> list[Any]:
    if outcome.status == "skipped" and earlier is not None:
        return [*earlier[:2], outcome.status, *earlier[3:]]
    o = outcome
    return [o.slide, o.output, o.status, o.spots or "", o.seconds or "", "; ".join(o.warnings)]


def _write_csv(path: str, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([head, *rows])
    with sent(path) as target, written_whole(target) as partial:
        partial.write_bytes(text.getvalue().encode(errors="surrogateescape"))  # names of files need not be text
