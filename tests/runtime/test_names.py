"""Names from the command line: a list, or a file of them."""

from __future__ import annotations

import pytest

from stpath_runtime import InputError
from stpath_runtime.names import listed_names


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("n.txt", "\ufeffGATA3\n\n  ERBB2 \n"),
        ("n.json", '["GATA3", "ERBB2"]'),
        ("n.JSON", '{"genes": ["GATA3", "ERBB2"]}'),
    ],
)
def test_files(tmp_path, file, text):
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert listed_names(str(tmp_path / file), "--genes", "gene") == ["GATA3", "ERBB2"]


@pytest.mark.parametrize(
    ("file", "raw", "message"),
    [
        ("n.json", b'{"names": ["GATA3"]}', r'n.json: cannot be read \(expected a list of names, or {"genes"'),
        ("n.json", b'["GATA3", 7]', "expected a list of names"),
        ("n.json", b"GATA3", "n.json: cannot be read"),
        ("n.json", b"[" * 100_000, "n.json: cannot be read"),
        ("n.txt", b"\xff\xfe", "n.txt: cannot be read"),
        ("n.txt", b"\n \n", "names no gene; give A,B,C or a file of names"),
        ("n.csv", b"GATA3", "n.csv: give names in a .txt file"),
    ],
)
def test_faulty_files(tmp_path, file, raw, message):
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(InputError, match=message) as error:
        listed_names(str(tmp_path / file), "--genes", "gene")
    assert str(error.value).startswith("--genes ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"n\.txt: no such file"):
        listed_names(str(tmp_path / "n.txt"), "--genes", "gene")
