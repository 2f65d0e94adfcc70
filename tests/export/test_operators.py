"""The operators of the exported graphs: how the reference is written must not change what is run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx

EXPECTED = Path(__file__).with_name("operators.json")  # of the tiny engine, before the reference took einops


def count(graph: onnx.GraphProto) -> Counter[str]:
    """How often each operator stands in a graph and in those within it."""
    found = Counter(node.op_type for node in graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += count(attribute.g)
    return found


def test_graphs_have_the_operators_that_they_had(tiny_engine):
    found = {
        path.stem: dict(count(onnx.load(path, load_external_data=False).graph)) for path in tiny_engine.glob("*.onnx")
    }
    assert found == json.loads(EXPECTED.read_text())
