"""Graphs are traced once for all modules that differ in their weights alone."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from stpath_export import writing
from stpath_export.stages import Graph, graphs
from stpath_export.writing import SharedWeights, write_graph
from stpath_train.checkpoint import seeded_checkpoint


def written(graph: Graph, folder: Path) -> tuple[bytes, bytes]:
    """The file of a graph, without the names of its nodes, which the exporter counts, and that of its weights."""
    folder.mkdir()
    write_graph(graph, SharedWeights(folder / "weights.bin"), folder)
    model = onnx.load(folder / f"{graph.name}.onnx", load_external_data=False)
    for node in model.graph.node:
        node.name = ""
    return model.SerializeToString(), (folder / "weights.bin").read_bytes()


@pytest.mark.parametrize("name", ["block_2", "knn_block_2"])
def test_a_layer_is_written_as_a_trace_of_its_own_would_be(tiny, tmp_path, monkeypatch, name):
    all_graphs = {graph.name: graph for graph in graphs(tiny.model)}
    monkeypatch.setattr(writing, "_traces", {})
    first = written(all_graphs[name.replace("2", "1")], tmp_path / "first")
    by_first = written(all_graphs[name], tmp_path / "by_first")
    assert len(writing._traces) == 1
    monkeypatch.setattr(writing, "_traces", {})
    assert by_first == written(all_graphs[name], tmp_path / "own") != first


def test_models_of_another_config_or_type_have_traces_of_their_own(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_traces", {})
    wider = dataclasses.replace(tiny.model.config, n_features=tiny.model.config.n_features + 1)
    models = [tiny.model, seeded_checkpoint(wider, 0), copy.deepcopy(tiny.model).half(), seeded_checkpoint(wider, 1)]
    for i, model in enumerate(models):
        (embed,) = (graph for graph in graphs(model) if graph.name == "embed")
        written(embed, tmp_path / str(i))
    assert len(writing._traces) == 3


class Twice(nn.Module):
    """Two products, which may have one weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        if tied:
            self.second = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_a_trace_that_does_not_name_all_weights_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_traces", {})

    def graph(tied: bool) -> Graph:
        x = torch.zeros(2, 3)
        return Graph("twice", Twice(tied).eval(), "one layout", {"x": x}, {"x": {0: torch.export.Dim("rows")}}, ("y",))

    written(graph(tied=True), tmp_path / "tied")
    with pytest.raises(AssertionError, match="does not hold all of its weights"):
        written(graph(tied=False), tmp_path / "not_tied")
