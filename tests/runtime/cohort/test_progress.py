"""What a terminal shows of long work, and what a pipe does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stpath_runtime.cohort.pipeline import Outcome
from stpath_runtime.cohort.progress import cohort_progress
from stpath_runtime.images.features import FeaturesJob
from stpath_runtime.progress import progress_bar, tile_bars

DONE = Outcome("a[b].h5", "out/a.h5ad", "done", spots=1_200, seconds=2.0, warnings=("few spots",))
SKIPPED = Outcome("c.h5", "out/c.h5ad", "skipped")


@pytest.fixture
def terminal(monkeypatch):
    """Standard error is one, 120 characters wide."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")


def shown(capsys) -> str:
    """What was written to standard error, without the terminal's codes."""
    out, err = capsys.readouterr()
    assert out == ""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)


def test_a_bar_on_a_terminal(terminal, capsys):
    with progress_bar("encoding") as on_tile:
        on_tile(1, 4)
        on_tile(3, 4)
    assert re.search(r"encoding .* 75%", shown(capsys))


def test_no_bar_in_a_pipe(capsys):
    with progress_bar("encoding") as on_tile:
        assert on_tile is None
    assert shown(capsys) == ""


def test_bars_of_tiles(terminal, capsys):
    one, other = (FeaturesJob(Path(name), Path("s.h5")) for name in ("a/one.svs", "a/other.svs"))
    with tile_bars(4) as tell:
        tell(one, 20, 40)
        tell(other, 60, 60)
    said = shown(capsys)
    assert re.search(r"one.svs .* 50%", said)
    assert re.search(r"other.svs .* 100%", said)
    assert re.search(r"4 slides .* 40%", said)  # the two that are not open yet count as 50 tiles each


def test_a_bar_of_one_slide_tells_of_it_alone(terminal, capsys):
    with tile_bars(1) as tell:
        tell(FeaturesJob(Path("one.svs"), Path("s.h5")), 1, 4)
    said = shown(capsys)
    assert re.search(r"one.svs .* 25%", said)
    assert "slides" not in said


def test_no_bars_of_tiles_in_a_pipe(capsys):
    with tile_bars(2) as tell:
        assert tell is None
    assert shown(capsys) == ""


def test_a_cohort_on_a_terminal(terminal, capsys):
    with cohort_progress(2) as progress:
        progress.watch("a[b].h5", 1, 4)
        assert len(progress.bars.tasks) == 2
        progress.watch("a[b].h5", 4, 4)
        assert len(progress.bars.tasks) == 1  # a slide that is done has no bar
        progress(DONE)
        progress(SKIPPED)
    said = shown(capsys)
    assert "1/2 a[b].h5: 1,200 spots, 2.0 s" in said  # brackets are no markup
    assert "warning: a[b].h5: few spots" in said
    assert "2/2 c.h5: whole already" in said
    assert re.search(r"2 slides, [\d,]+ spots/s .* 100%", said)


def test_a_cohort_in_a_pipe(capsys):
    with cohort_progress(2) as progress:
        progress.watch("a[b].h5", 1, 4)
        progress(DONE)
    assert shown(capsys) == "1/2 a[b].h5: 1,200 spots, 2.0 s\nwarning: a[b].h5: few spots\n"
