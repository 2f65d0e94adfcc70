"""Lists of names as users type them on the command line."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import OptionError


def listed_names(text: str, option: str, noun: str) -> list[str]:
    """Names from A,B,C, or from a .txt (one a line) or .json file of them.

    Parameters
    ----------
    option, noun
        What messages call the option and what it names: "--genes", "gene".

    Raises
    ------
    InputError
        If there is no such file, it cannot be read, or nothing is named.
    """
    path = Path(text)
    if path.suffix.lower() not in (".txt", ".json"):
        if "," not in text and path.exists():  # a list may be longer than any name of a file
            raise OptionError(f"{option} {path}: give names in a .txt file, one a line, or in a .json file")
        names = text.split(",")
    elif not path.is_file():
        raise OptionError(f"{option} {path}: no such file")
    else:
        try:
            read = path.read_text(encoding="utf-8-sig")
            names = read.splitlines() if path.suffix.lower() == ".txt" else _json_names(read)
        except (ValueError, RecursionError) as error:
            raise OptionError(
                f"{option} {path}: cannot be read ({error}); give one name a line, or a JSON list"
            ) from error
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise OptionError(f"{option} {text}: names no {noun}; give A,B,C or a file of names")
    return names


def shown(name: object) -> str:
    """A name as printable text, whatever bytes a file name contains."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def delimiter_of(text: str) -> str:
    """What separates the columns of a table: whichever of comma, tab and semicolon its first line has most of."""
    head = text.partition("\n")[0]
    return max(",\t;", key=head.count)


def _json_names(text: str) -> list[str]:
    """A JSON list of names, or HEST-bench's {"genes": [...]}."""
    found = json.loads(text)
    names = found.get("genes") if isinstance(found, dict) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError('expected a list of names, or {"genes": [...]}')
    return names
