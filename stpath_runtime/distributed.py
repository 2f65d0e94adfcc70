"""A cohort on a Ray cluster: Ray Data keeps a pool of engines, gives them slides, and mends what dies."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .errors import InputError
from .output import Format
from .pipeline import Job, Outcome, Settings, run_jobs

AT_ONCE = 8  # slides that a worker is given, so that it can read and write while it runs


class Worker:
    """An engine in a process of a Ray cluster."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = Settings(**{**settings, "form": Format(settings["form"])})
        self.engine = self.settings.load()

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Run some slides; what became of each goes back as it ends."""
        jobs = [Job(**json.loads(job)) for job in batch["job"]]
        for outcome in run_jobs(self.engine, jobs, self.settings):
            yield {"outcome": [json.dumps(asdict(outcome))]}


def run_on_ray(
    jobs: Sequence[Job], settings: Settings, *, address: str, workers: int, cpus: float, gpus: float
) -> Generator[Outcome, None, None]:
    """Run slides on Ray; yields what became of each, as they end.

    When a worker dies, Ray starts another, which is given its slides again; those that are whole are skipped then, if
    the settings resume.

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
        If Ray is not installed, or no cluster is there.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InputError("--ray needs Ray; run: pip install 'stpath-engine[ray]'") from error
    try:
        _require_answer(address)
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"--ray {address}: no cluster there ({error}); start one with: ray start --head") from error
    try:
        _require_room(ray.cluster_resources(), address, workers, cpus, gpus)  # type: ignore[no-untyped-call]
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        given = min(AT_ONCE, -(-len(jobs) // workers))
        items = [{"job": json.dumps(asdict(job))} for job in jobs]
        outcomes = ray.data.from_items(items, override_num_blocks=-(-len(items) // given)).map_batches(
            Worker,
            fn_constructor_args=(asdict(settings),),
            batch_size=given,
            batch_format="numpy",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        for row in outcomes.iter_rows():
            found = json.loads(row["outcome"])
            yield Outcome(**{**found, "warnings": tuple(found["warnings"])})
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise OSError where HOST:PORT does not answer: Ray would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _require_room(resources: dict[str, float], address: str, workers: int, cpus: float, gpus: float) -> None:
    """Refuse what the cluster does not have: Ray would wait for it without end."""
    for what, one, there in (("CPUs", cpus, resources.get("CPU", 0)), ("GPUs", gpus, resources.get("GPU", 0))):
        if workers * one > there:
            raise InputError(
                f"--ray {address}: {workers} engines of {one:g} {what} need {workers * one:g}, the cluster has "
                f"{there:g}; lower --workers, --cpus or --gpus"
            )
