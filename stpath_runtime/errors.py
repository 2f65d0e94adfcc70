"""The exceptions of this package, one for each family of causes, and its warning.

Every code is a row of docs/errors.md: its cause and its fix.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ClassVar

PACKAGES = ("stpath_runtime", "stpath_train", "stpath_export")
FAULT = "fault"  # a bug of this program
INTERRUPTED = "interrupted"


class InputError(ValueError):
    """The input or the call is wrong: the message says what, where, and what to do about it (exit code 2).

    Always raised as one of its subclasses, each for a family of causes. Catch this one to catch them all.
    """

    code: ClassVar[str]


class OptionError(InputError):
    """A command, option or argument is unknown, missing, out of range, or does not go with another."""

    code = "option"


class FileError(InputError):
    """An input file is missing, damaged, or of a kind that is not supported."""

    code = "file"


class SlideError(InputError):
    """A slide's coordinates, features, barcodes, organ or technology are missing or wrong."""

    code = "slide"


class ImageError(InputError):
    """A slide image cannot be read, says no scale, or shows no tissue where it is looked for."""

    code = "image"


class FeaturesError(InputError):
    """Features do not have the width that the model or the store expects: another tile encoder made them."""

    code = "features"


class ContextError(InputError):
    """Context counts are not raw counts, or do not fit the slide or the model."""

    code = "context"


class GeneError(InputError):
    """A requested gene is unknown, or no gene is requested."""

    code = "gene"


class VocabularyError(InputError):
    """A gene vocabulary is invalid, or is not the model's."""

    code = "vocabulary"


class EngineError(InputError):
    """A folder is not an engine, or the engine is damaged or newer than this version."""

    code = "engine"


class CheckpointError(InputError):
    """A checkpoint is missing, is not one of STPath, or is not the engine's."""

    code = "checkpoint"


class BackendError(InputError):
    """A backend is unknown, lacks the precision, or cannot run the engine."""

    code = "backend"


class DeviceError(InputError):
    """A device is unknown or not present."""

    code = "device"


class PlanError(InputError):
    """TensorRT plans are missing or damaged, belong to another engine, GPU or version, or cannot be built."""

    code = "plan"


class InstallError(InputError):
    """A package is missing, or does not load."""

    code = "install"


class MemoryLimitError(InputError):
    """There is not enough memory, or the result is larger than a response may be."""

    code = "memory"


class OutputError(InputError):
    """A result cannot be written where it should go, or something else is already there."""

    code = "output"


class PredictionError(InputError):
    """A file is not a prediction, or lacks what is needed for the request."""

    code = "prediction"


class CohortError(InputError):
    """A manifest or a folder of slides is invalid."""

    code = "cohort"


class ClusterError(InputError):
    """A Ray cluster is missing, too small, or starts no worker."""

    code = "cluster"


class RemoteError(InputError):
    """A URL cannot be read or written."""

    code = "remote"


class DownloadError(InputError):
    """The Hugging Face Hub does not provide the files of a data set."""

    code = "download"


class DataError(InputError):
    """A downloaded data set lacks what a training store is made from."""

    code = "data"


class StoreError(InputError):
    """A training store is missing, damaged, newer than this version, or lacks a slide or task."""

    code = "store"


class EncoderError(InputError):
    """A tile encoder is unknown, cannot be fetched, or its weights do not fit it."""

    code = "encoder"


class ConfigError(InputError):
    """A training config cannot be read, or does not fit the store, the checkpoint or the run."""

    code = "config"


class EvaluationError(InputError):
    """Slides lack what an evaluation needs: spots, genes, regions, labels, or separate training and test slides."""

    code = "evaluation"


class ParityError(RuntimeError):
    """An engine does not give the reference's numbers (exit code 3)."""

    code: ClassVar[str] = "parity"


class InputWarning(UserWarning):
    """The input is unusual, so the result may be too: the message says why."""


_COLLECT: ContextVar[Callable[[str], None] | None] = ContextVar("collect", default=None)


@contextmanager
def warnings_to(collect: Callable[[str], None]) -> Iterator[None]:
    """Pass the warnings of a block to a function, in this thread or task only; nothing global is replaced."""
    token = _COLLECT.set(collect)
    try:
        yield
    finally:
        _COLLECT.reset(token)


def warn(message: str) -> None:
    """Warn about unusual input, at the line of the caller's own code that led here, however deep in this package."""
    collect = _COLLECT.get()
    if collect is not None:
        collect(message)
        return
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in PACKAGES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, InputWarning, stacklevel=level)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def code_of(error: BaseException) -> str:
    """The code of an error, whoever raised it: "file" for an error of the system, "fault" if it is unknown."""
    if isinstance(error, InputError | ParityError):
        return error.code
    if isinstance(error, OSError):
        return FileError.code
    if isinstance(error, MemoryError):
        return MemoryLimitError.code
    return FAULT
