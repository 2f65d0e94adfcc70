"""A cohort on a Ray cluster: Ray Data keeps a pool of engines, sends them slides, and replaces those that die."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import ClusterError, InstallError, MemoryLimitError, first_line
from ..images.settings import TileSettings
from ..results.output import Format
from .pipeline import LISTS, Job, Outcome, Settings, run_jobs
from .remote import is_url

AT_ONCE = 8  # slides sent to a worker at a time, so that it can read and write while it runs
RETRIES = 2  # of slides whose worker died
DIED = "every worker that was given it died, as when the memory does not suffice; give workers more, or lower --memory"


class Worker:
    """An engine in a process of a Ray cluster."""

    def __init__(self, settings: dict[str, Any]) -> None:
        given = {"form": Format(settings["form"]), "tiles": TileSettings(**settings["tiles"])}
        self.settings = Settings(**{**settings, **given})
        self.engine = self.settings.load()
        self.encoder = self.settings.load_encoder(self.engine)

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Run slides; yields each outcome as it ends."""
        jobs = [Job(**json.loads(job)) for job in batch["job"]]
        for outcome in run_jobs(self.engine, jobs, self.settings, encoder=self.encoder):
            yield {"outcome": [json.dumps(asdict(outcome))]}


def run_on_ray(
    jobs: Sequence[Job], settings: Settings, *, address: str, workers: int, cpus: float, gpus: float
) -> Generator[Outcome, None, None]:
    """Run slides on Ray; yields the outcome of each, as they end.

    When a worker dies, Ray starts another and sends it the same slides; those already done are skipped if the settings
    resume. Slides whose workers keep dying are run once more, each alone, so that only those that kill their worker
    fail.

    Parameters
    ----------
    address
        Of a cluster ("auto", "HOST:PORT", "ray://..."), or "local": one of this machine, for this run.
    workers
        Engines at once.
    cpus, gpus
        Of each engine.

    Raises
    ------
    InputError
        If Ray is not installed, no cluster is there, or no worker can be started on it.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InstallError("--ray needs Ray; run: pip install 'stpath-engine[ray]'") from error
    try:
        _require_answer(address)
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UnicodeError):
            raise ClusterError(f"--ray {address}: Ray takes names in UTF-8 only ({error}); rename the file") from error
        if "AF_UNIX" in str(error):
            raise ClusterError(
                f"--ray {address}: the path of the folder of temporary files is too long for Ray's sockets "
                f"({first_line(error)}); set RAY_TMPDIR to a short one, such as /tmp"
            ) from error
        raise ClusterError(f"--ray {address}: no cluster there ({error}); start one with: ray start --head") from error
    try:
        _require_room(ray.cluster_resources(), address, workers, cpus, gpus)  # type: ignore[no-untyped-call]
        waiting = {_anywhere(job.target): job for job in jobs}
        for given in (min(AT_ONCE, -(-len(jobs) // workers)), 1):
            for found in _outcomes(list(waiting.values()), settings, given, workers, cpus, gpus):
                job = waiting.pop(found.output)
                yield replace(found, slide=job.slide, output=job.target)
        for job in waiting.values():
            yield Outcome(job.slide, job.target, "failed", code=MemoryLimitError.code, reason=DIED)
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"--ray {address}: no worker could be started ({str(error).strip().splitlines()[-1]}); engine, slides and "
            "results must be where every machine finds them"
        ) from error
    finally:
        ray.shutdown()


def _outcomes(
    jobs: Sequence[Job], settings: Settings, given: int, workers: int, cpus: float, gpus: float
) -> Iterator[Outcome]:
    """Run slides, `given` at a time to a worker; slides whose workers die too often yield nothing."""
    import ray.data

    if not jobs:
        return
    spots = settings.context_spots
    named = replace(settings, engine=_anywhere(settings.engine))
    if settings.encoder is not None and Path(settings.encoder).exists():
        named = replace(named, encoder=_anywhere(settings.encoder))
    if spots is not None and Path(spots).suffix.lower() in LISTS:
        named = replace(named, context_spots=_anywhere(spots))
    items = [{"job": json.dumps({**asdict(job), **_places(job)})} for job in jobs]
    slides = ray.data.from_items(items, override_num_blocks=-(-len(items) // given))
    slides.context.enable_progress_bars = False  # for this data set only: the caller's others are not affected
    slides.context.print_on_execution_start = False
    slides.context.max_errored_blocks = -1  # losing a worker is no reason to stop
    outcomes = slides.map_batches(
        Worker,
        fn_constructor_args=(asdict(named),),
        batch_size=given,
        batch_format="numpy",
        # A slide on its own does not queue at a worker that another slide kills.
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1 if given == 1 else None),
        num_cpus=cpus,
        num_gpus=gpus,
        max_task_retries=RETRIES,  # Ray's default is to retry forever
    )
    for row in _quietly(outcomes.iter_rows()):
        found = json.loads(row["outcome"])
        yield Outcome(**{**found, "warnings": tuple(found["warnings"])})


def _quietly(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The same rows, with Ray Data's log silenced while it computes the next."""
    log, waiting = logging.getLogger("ray.data"), iter(rows)
    while True:
        level = log.level
        log.setLevel(logging.CRITICAL)
        try:
            row = next(waiting)
        except StopIteration:
            return
        finally:
            log.setLevel(level)
        yield row


def _anywhere(path: str) -> str:
    """An absolute path: a worker may start in another folder."""
    return path if is_url(path) else str(Path(path).absolute())


def _places(job: Job) -> dict[str, str]:
    named = {"slide": job.slide, "target": job.target, "context": job.context}
    named |= {"tissue": job.tissue, "spots": job.spots}
    return {what: _anywhere(path) for what, path in named.items() if path is not None}


def _require_answer(address: str) -> None:
    """Raise OSError if HOST:PORT does not answer: Ray would retry for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _require_room(resources: dict[str, float], address: str, workers: int, cpus: float, gpus: float) -> None:
    """Refuse resources that the cluster does not have: Ray would wait for them forever."""
    for what, one, there in (("CPUs", cpus, resources.get("CPU", 0)), ("GPUs", gpus, resources.get("GPU", 0))):
        if workers * one > there:
            raise ClusterError(
                f"--ray {address}: {workers} engines of {one:g} {what} need {workers * one:g}, the cluster has "
                f"{there:g}; lower --workers, --cpus or --gpus"
            )
