"""The faults that the command line tells apart by exit code and by code, and the warning that it shows.

Every code is a row of docs/errors.md: its cause and its mend.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

PACKAGES = ("stpath_runtime", "stpath_train", "stpath_export")
FAULT = "fault"  # of this program
INTERRUPTED = "interrupted"


class InputError(ValueError):
    """The input or the call is at fault: the message says what is wrong, where, and what to do (exit code 2).

    What is raised is one of the subclasses, each a family of causes; to catch this one is to catch them all.
    """

    code: ClassVar[str]


class OptionError(InputError):
    """A command, option or argument is unknown, missing, out of range, or does not go with another."""

    code = "option"


class FileError(InputError):
    """A file that is to be read is not there, damaged, or of no kind that is read."""

    code = "file"


class SlideError(InputError):
    """A slide's coordinates, features, barcodes, organ or technology are missing or wrong."""

    code = "slide"


class FeaturesError(InputError):
    """Features are not as wide as the model or the store takes them: another tile encoder made them."""

    code = "features"


class ContextError(InputError):
    """Context counts are no raw counts, or do not fit the slide or the model."""

    code = "context"


class GeneError(InputError):
    """A gene that is asked for is unknown, or none is asked for."""

    code = "gene"


class VocabularyError(InputError):
    """A gene vocabulary is faulty, or is not that of the model."""

    code = "vocabulary"


class EngineError(InputError):
    """A folder is no engine, or the engine is damaged or newer than this version."""

    code = "engine"


class CheckpointError(InputError):
    """A checkpoint is not there, none of STPath, or not that of the engine."""

    code = "checkpoint"


class BackendError(InputError):
    """A backend is unknown, lacks the precision, or cannot run the engine."""

    code = "backend"


class DeviceError(InputError):
    """A device is unknown or not there."""

    code = "device"


class PlanError(InputError):
    """TensorRT plans are missing, damaged, of another engine, GPU or version, or cannot be built."""

    code = "plan"


class InstallError(InputError):
    """A package is missing, or does not load."""

    code = "install"


class MemoryLimitError(InputError):
    """Memory, or what a response may hold, does not suffice."""

    code = "memory"


class OutputError(InputError):
    """Where a result is to go cannot be written, or holds something else."""

    code = "output"


class PredictionError(InputError):
    """A file is no prediction, or none that what is asked can be done with."""

    code = "prediction"


class CohortError(InputError):
    """A manifest or folder of slides is not as it has to be."""

    code = "cohort"


class ClusterError(InputError):
    """A Ray cluster is not there, too small, or starts no worker."""

    code = "cluster"


class RemoteError(InputError):
    """A URL cannot be read or written."""

    code = "remote"


class DownloadError(InputError):
    """The Hugging Face Hub does not give the files of a data set."""

    code = "download"


class DataError(InputError):
    """A data set, as it was downloaded, lacks what a training store is made from."""

    code = "data"


class StoreError(InputError):
    """A training store is missing, damaged, newer than this version, or lacks a slide or task."""

    code = "store"


class EncoderError(InputError):
    """A tile encoder is unknown, cannot be fetched, or its weights do not fit it."""

    code = "encoder"


class ConfigError(InputError):
    """A training config cannot be read, or does not fit the store, the checkpoint or the course of the run."""

    code = "config"


class EvaluationError(InputError):
    """Slides lack what a task of evaluation needs: spots, genes, regions, labels, or sides kept apart."""

    code = "evaluation"


class ParityError(RuntimeError):
    """An engine does not give the reference's numbers (exit code 3)."""

    code: ClassVar[str] = "parity"


class InputWarning(UserWarning):
    """The input is odd, and the result may be: the message says why."""


_COLLECT: ContextVar[Callable[[str], None] | None] = ContextVar("collect", default=None)


@contextmanager
def warnings_to(collect: Callable[[str], None]) -> Iterator[None]:
    """Hand the warnings of a block to a function, in this thread or task alone; nothing global is replaced."""
    token = _COLLECT.set(collect)
    try:
        yield
    finally:
        _COLLECT.reset(token)


def warn(message: str) -> None:
    """Warn of odd input, at the line of the caller's own code that led here, however deep in this package."""
    collect = _COLLECT.get()
    if collect is not None:
        collect(message)
        return
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, InputWarning, stacklevel=level)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def code_of(error: BaseException) -> str:
    """The code of an error, whoever raised it: "file" where the system refuses one, "fault" where none is known."""
    if isinstance(error, InputError | ParityError):
        return error.code
    if isinstance(error, OSError):
        return FileError.code
    if isinstance(error, MemoryError):
        return MemoryLimitError.code
    return FAULT
