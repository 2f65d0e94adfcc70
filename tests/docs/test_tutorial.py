"""The tutorial runs from its first cell to its last, draws, and says that its data are simulated."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from pages import ROOT

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


@pytest.mark.docs
def test_tutorial(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 6
    assert not [output for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    tables = [output.data["text/plain"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("context spread" in table and "0.335" in table for table in tables)  # as the table in context.md has it


@pytest.mark.docs
def test_tutorial_is_kept_without_outputs():
    """They are made when the site is built."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert NOTEBOOK.stat().st_size < 300_000
    assert "**simulated**" in notebook.cells[0].source
