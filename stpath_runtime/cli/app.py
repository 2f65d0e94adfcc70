"""The command `stpath`.

Exit codes: 0 done, 1 a bug of this program, 2 the input or the call is wrong, 3 parity failed, 4 `bench compare`
found a regression.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated

import typer

from .. import __version__
from ..errors import INTERRUPTED, InputError, InputWarning, OptionError, ParityError, code_of
from ..images.settings import PIECES
from .bench import bench
from .images import features
from .look import info, plot, view
from .make import build, triton
from .measure import doctor, fidelity
from .predict import decode, predict, run

CTRL_C = 130  # the exit code
# The groups of `stpath --help`: the runtime's own commands, and those of the other packages by name.
PREDICT, LOOK, MEASURE, MAKE, TRAIN = "Predict", "Look", "Measure", "Make", "Train"
COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    PREDICT: (predict, run, decode),
    LOOK: (view, plot, info),
    MEASURE: (doctor, fidelity),
    MAKE: (features, build, triton),
}
GROUP_OF = {
    "demo": PREDICT,
    "verify": MEASURE,
    "evaluate": MEASURE,
    "export": MAKE,
    "export-encoder": MAKE,
    "features": MAKE,
}  # others: TRAIN

app = typer.Typer(
    help="Predict the expression of 38,982 genes at every spot of a pathology slide, with STPath engines.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stpath-engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None: ...


for group, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=group)(command)
app.add_typer(bench, name="bench", rich_help_panel=MEASURE)


def _is_own(given: Sequence[str]) -> bool:
    """Whether a command of the runtime is asked for, which needs none of the other packages."""
    asked = next((word for word in given if not word.startswith("-")), None)
    return asked == "bench" or asked in {command.__name__ for commands in COMMANDS.values() for command in commands}


@cache
def _add_commands() -> None:
    """Add the commands of the packages that need more than the runtime (see pyproject.toml)."""
    for entry in sorted(entry_points(group="stpath.commands"), key=lambda entry: entry.name):
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name, rich_help_panel=GROUP_OF.get(entry.name, TRAIN))
        else:
            app.command(entry.name, rich_help_panel=GROUP_OF.get(entry.name, TRAIN))(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # accepted anywhere on the line: users put it last
    given = [word for word in given if word != "--debug"]
    given = _with_pieces(given)
    # Sent by a cluster or a closing terminal: clean up on the way out.
    earlier = {ending: signal.signal(ending, _stop) for ending in (signal.SIGTERM, signal.SIGHUP)}
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be text
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            if not debug:  # other libraries' notes to developers do not help a user
                warnings.simplefilter("ignore")
            warnings.simplefilter("always", InputWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            if not _is_own(given):
                _add_commands()
            code = app(given, standalone_mode=False)
        if code == CTRL_C:  # typer takes Ctrl-C itself
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except Exception as error:
        if debug:
            raise
        return _report(error)
    except KeyboardInterrupt:
        _print_error(INTERRUPTED, "interrupted; nothing half-written is left")
        return CTRL_C
    finally:
        for ending, handler in earlier.items():
            signal.signal(ending, handler)


def _with_pieces(given: list[str]) -> list[str]:
    """The words, with --sections that names no column naming the pieces of tissue."""
    filled: list[str] = []
    for word, following in zip(given, [*given[1:], "-"], strict=False):
        filled += [word, PIECES] if word == "--sections" and following.startswith("-") else [word]
    return filled


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    typer.echo(f"warning: {message}", err=True)


def _report(error: Exception) -> int:
    """Print one line for an error; returns the exit code."""
    code, exit_code = code_of(error), 2
    if isinstance(error, ParityError):
        line, exit_code = f"parity failed: {error}", 3
    elif isinstance(error, InputError):
        line = str(error)
    elif isinstance(error, typer.TyperException):
        if not error.format_message():
            return 2  # no command given: the help was printed
        line, code = f"{error.format_message().rstrip('.')}; see stpath --help", OptionError.code
    elif isinstance(error, OSError):
        named = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        # Some libraries do not name the file in the error, but in its message.
        line = f"{' and '.join(named) or 'a file'}: {error.strerror if named else error}"
    elif isinstance(error, MemoryError):
        line = f"not enough memory ({error}); ask for fewer genes or smaller slides"
    else:
        exit_code = 1
        line = f"{type(error).__name__}: {error}; a fault of stpath-engine: run again with --debug and report it"
    _print_error(code, line)
    return exit_code


def _print_error(code: str, line: str) -> None:
    typer.echo(f"error[{code}]: {' '.join(line.split())}", err=True)
