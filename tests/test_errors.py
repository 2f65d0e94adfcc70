"""Every error has a code, and docs/errors.md a row for each."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from stpath_runtime import errors
from stpath_runtime.cli import app as cli
from stpath_runtime.errors import FAULT, INTERRUPTED, InputError, ParityError

ROOT = Path(__file__).parent.parent
PACKAGES = ("stpath_runtime", "stpath_train", "export")
KINDS = InputError.__subclasses__()
BRANCHES = [
    *((kind("wrong"), kind.code, 2, "wrong") for kind in KINDS),
    (ParityError("wrong"), "parity", 3, "parity failed: wrong"),
    (PermissionError(13, "Permission denied", "s.h5"), "file", 2, "s.h5: Permission denied"),
    (MemoryError("of 9 GB"), "memory", 2, "not enough memory (of 9 GB); ask for fewer genes or smaller slides"),
    (ZeroDivisionError("of 1"), FAULT, 1, "ZeroDivisionError: of 1; a fault of stpath-engine: run again with --debug"),
    (KeyboardInterrupt(), INTERRUPTED, 130, "interrupted; nothing half-written is left"),
]


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """Rows of the table by code: exit code, cause, fix."""
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs" / "errors.md").read_text(), re.M)
    assert len({code for code, _ in rows}) == len(rows), "a code has two rows"
    return {code: row.split(" | ") for code, row in rows}


@pytest.fixture(scope="module")
def messages():
    """The script that lists the messages."""
    spec = importlib.util.spec_from_file_location("messages", ROOT / "docs" / "messages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_code_is_documented(table):
    assert all(re.fullmatch(r"[a-z]+", kind.__dict__["code"]) for kind in KINDS)
    codes = [kind.code for kind in KINDS] + [ParityError.code, FAULT, INTERRUPTED]
    assert len(set(codes)) == len(codes)
    assert set(table) == set(codes)
    for code, row in table.items():
        assert len(row) == 3, code
        assert all(row), code


def test_no_error_is_raised_without_a_code():
    """The base, and a class that is defined elsewhere than in errors.py, would have none."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                called = node.func if isinstance(node, ast.Call) else node.exc if isinstance(node, ast.Raise) else None
                assert getattr(called, "id", getattr(called, "attr", "")) != "InputError", f"{path}: {node.lineno}"
    assert all(kind.__module__ == errors.__name__ for kind in KINDS)


@pytest.mark.parametrize(("fault", "code", "exit_code", "line"), BRANCHES, ids=[type(b[0]).__name__ for b in BRANCHES])
def test_the_command_prints_the_code(fault, code, exit_code, line, table, monkeypatch, capsys):
    def app(*_, **__):
        raise fault

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(cli, "_add_commands", lambda: None)
    assert cli.main([]) == exit_code == int(table[code][0])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error[{code}]: {line}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [["predict"], ["predict", "s.h5", "--gens", "A"], ["info", "a", "b"]])
def test_a_call_in_error_has_the_code_of_options(words, capsys):
    assert cli.main(words) == 2
    assert re.fullmatch(r"error\[option\]: .*; see stpath --help\n", capsys.readouterr().err)


def test_every_message_is_listed(messages):
    sections = dict(re.findall(r"^### (\w+)\n\n((?:- .*\n)*)", messages.listing() + "\n", re.M))
    assert set(sections) == {kind.code for kind in KINDS} | {ParityError.code}
    for code, lines in sections.items():
        assert lines, f"{code}: no message; its class is not used"
    assert "- `unknown {kind} {name}{near}; known: {…}`\n" in sections["slide"]
    assert (
        "- `ONNX Runtime is not installed; run: pip install 'stpath-engine[cpu]' (or [gpu], never both)`\n"
        in (sections["install"])
    )


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise SlideError(f"{self.name}: {n + 1:,} of {x!r}, {_why}")', ["{name}: {…} of {x}, {why}"]),
        ('raise SlideError("no X" if a else f"no {b}")', ["no X", "no {b}"]),
        ('e = SlideError("a " + ("b" if c else "d") + f"{c()}{d()}")', ["a b{…}", "a d{…}"]),
        ('raise SlideError(f"{name}: {error}")', []),
        ('raise OSError("no")', []),
    ],
)
def test_messages_are_read_from_source(source, found, messages):
    assert list(messages.messages(source)) == [("SlideError", text) for text in found]
