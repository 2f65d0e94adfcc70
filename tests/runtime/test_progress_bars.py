"""Where progress bars are drawn."""

from __future__ import annotations

import importlib.util

import pytest

from stpath_runtime.progress import terminal_bars


@pytest.mark.parametrize(("jupyter", "widgets"), [(False, True), (True, False), (True, True)])
def test_bars_in_a_notebook_are_widgets_or_none_and_in_a_pipe_none(jupyter, widgets, monkeypatch, capfd):
    monkeypatch.setattr("rich.console._is_jupyter", lambda: jupyter)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found" if widgets and name == "ipywidgets" else None)
    monkeypatch.setattr("rich.progress.Progress.start", lambda self: None)
    with terminal_bars() as bars:
        assert (bars is not None) == (jupyter and widgets)
    assert "\x1b" not in "".join(capfd.readouterr())
