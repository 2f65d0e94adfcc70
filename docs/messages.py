"""The messages that the program can print, by code, read from its source: conf.py adds them to errors.md."""

import ast
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from stpath_runtime import errors

ROOT = Path(__file__).parent.parent
PACKAGES = ("stpath_runtime", "stpath_train", "export")
CODES = {name: kind.code for name, kind in vars(errors).items() if hasattr(kind, "code")}  # class -> code
FIELD = "{…}"  # of an f-string, where it has no short name


def listing() -> str:
    """All messages in Markdown, a heading a code, what is filled in in braces."""
    found: dict[str, set[str]] = {code: set() for code in CODES.values()}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for name, message in messages(path.read_text()):
                found[CODES[name]].add(message)
    parts = [f"### {code}\n\n" + "\n".join(f"- `{message}`" for message in sorted(found[code])) for code in found]
    return "\n\n".join(parts) + "\n"


def messages(source: str) -> Iterator[tuple[str, str]]:
    """The classes of errors that a module makes, each with its message."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODES and node.args:
            for text in texts(node.args[0]):
                line = " ".join(text.replace("`", "'").split())
                if re.search(r"\w", re.sub(r"{.*?}", "", line)):  # one of fields alone tells nothing
                    yield node.func.id, line


def texts(node: ast.expr) -> list[str]:
    """What an expression of text may be: more than one where it has a condition."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(_part(part) for part in node.values).replace(FIELD + FIELD, FIELD)]
    if isinstance(node, ast.BinOp):
        return [left + right for left, right in product(texts(node.left), texts(node.right))]
    if isinstance(node, ast.IfExp):
        return texts(node.body) + texts(node.orelse)
    return [FIELD]


def _part(part: ast.expr) -> str:
    if not isinstance(part, ast.FormattedValue):
        return texts(part)[0]
    name = getattr(part.value, "attr", getattr(part.value, "id", "")).strip("_")
    return f"{{{name}}}" if name else FIELD
