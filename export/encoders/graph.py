"""The ONNX graph of a folded vision transformer: uint8 RGB tiles [N, S, S, 3] in, float32 features [N, F] out.

The precision is written into it: products, attention and what lies between them are in the engine's type, norms, the
residual and the features in float32. n is a batch of tiles, T the tokens of one, d the width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tape import Tape
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from stpath_train.encoders import MEAN, TOKEN, EncoderModel

from ..writing import DTYPES, OPSET, SHARED_FROM_BYTES, SharedWeights
from .folding import Block, Product, final_norm, fold_block, fold_stem

IR_VERSION = 11
FLOAT, UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8
TYPES = {"fp32": FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
TILES, STATE, FEATURES = "tiles", "state", "features"  # ends of graphs; the state is what passes between blocks
Constants = dict[str, ir.TensorProtocol]  # by name, as they are stored


class Network:
    """Nodes of a graph, in a precision.

    Parameters
    ----------
    emulated
        Whether bfloat16 is emulated, for runtimes that have no kernels for it: everything is float32, and what would
        be bfloat16 is rounded to it, so that the numbers are the same but for the order of sums.
    """

    def __init__(self, precision: str, emulated: bool = False) -> None:
        self.tape = Tape()
        self.stored, self.emulated = TYPES[precision], emulated
        self._constants: dict[int, ir.Value] = {}

    def constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        """A stored tensor, once in the graph, in the type that products take."""
        if id(tensor) not in self._constants:
            value = self.tape.initializer(tensor, name=f"{tensor.name}_{self._next()}")
            if self.emulated and tensor.dtype == self.stored:
                value = self.op("Cast", value, to=FLOAT)
            self._constants[id(tensor)] = value
        return self._constants[id(tensor)]

    def integers(self, *numbers: int) -> ir.Value:
        """Numbers that say a shape or positions."""
        return self.tape.initializer(ir.tensor(list(numbers), dtype=ir.DataType.INT64, name=f"numbers_{self._next()}"))

    def op(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """One node, and its output."""
        value: ir.Value = self.tape.op(kind, list(inputs), attributes)
        value.name = f"value_{self._next()}"
        return value

    def low(self, kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """A node in the engine's type."""
        return (
            self.narrow(self.op(kind, *inputs, **attributes)) if self.emulated else self.op(kind, *inputs, **attributes)
        )

    def narrow(self, value: ir.Value) -> ir.Value:
        """A value in the engine's type."""
        if self.stored == FLOAT:
            return value
        value = self.op("Cast", value, to=self.stored)
        return self.wide(value) if self.emulated else value

    def wide(self, value: ir.Value) -> ir.Value:
        """A value in float32."""
        return value if self.stored == FLOAT else self.op("Cast", value, to=FLOAT)

    def widened(self, value: ir.Value) -> ir.Value:
        """A product's value in float32; emulated, it is."""
        return value if self.emulated else self.wide(value)

    def product(self, x: ir.Value, constants: Constants, name: str) -> ir.Value:
        """X W + b, in the engine's type."""
        y = self.low("MatMul", x, self.constant(constants[f"{name}.weight"]))
        return self.low("Add", y, self.constant(constants[f"{name}.bias"]))

    def branch(self, x: ir.Value, constants: Constants, name: str) -> ir.Value:
        """X W + b as it is added to the residual: the sum and LayerScale, where it is not folded, in float32."""
        y = self.widened(self.low("MatMul", x, self.constant(constants[f"{name}.weight"])))
        y = self.op("Add", y, self.constant(constants[f"{name}.bias"]))
        scale = constants.get(f"{name}.scale")
        return y if scale is None else self.op("Mul", y, self.constant(scale))

    def norm(self, x: ir.Value, constants: Constants, name: str, eps: float) -> ir.Value:
        """LayerNorm over the last axis, in float32."""
        ends = [
            self.constant(constants[f"{name}.{part}"]) for part in ("weight", "bias") if f"{name}.{part}" in constants
        ]
        return self.op("LayerNormalization", x, *ends, axis=-1, epsilon=eps)

    def model(self, start: ir.Value, end: ir.Value, name: str, shape: Sequence[int | str]) -> ir.Model:
        """The graph from a start to an end, which gets a name and a shape."""
        end.name, end.shape, end.type = name, ir.Shape(shape), ir.TensorType(FLOAT)
        values = list(self.tape.initializers)
        graph = ir.Graph(
            [start], [end], nodes=self.tape.nodes, initializers=values, opset_imports={"": OPSET}, name="encoder"
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="stpath-engine")

    def _next(self) -> int:
        return len(self.tape.nodes) + len(self.tape.initializers)


class Parts:
    """The parts of an encoder, each folded and stored when it is asked for, and added to any network.

    Part 0 gives the tokens, parts 1 to depth are the blocks, and the last one gives the features.
    """

    def __init__(self, encoder: EncoderModel, precision: str, weights: SharedWeights) -> None:
        self.encoder, self.precision = encoder, precision
        self._weights = weights
        self._stem = fold_stem(encoder)
        self._ones = {"ones.weight": self._stored("ones.weight", torch.ones(encoder.model.embed_dim))}
        self._stored_parts: dict[int, Constants] = {}
        self.last = encoder.depth + 1
        self.tokens = len(self._stem.constant)
        # Only the class token is needed of the last block, where nothing else is pooled.
        self.alone = encoder.pooling == TOKEN

    def add(self, part: int, network: Network, x: ir.Value) -> ir.Value:
        """Add a part to a network: from tiles or a state to a state or features."""
        constants = self._constants(part)
        if part == 0:
            return self._add_stem(network, constants, x)
        if part == self.last:
            return self._add_features(network, constants, x)
        return self._add_block(network, constants, x, self.encoder.model.blocks[part - 1], part == self.last - 1)

    def start(self, part: int) -> ir.Value:
        """What a graph begins with that begins with this part."""
        size, name = self.encoder.size, TILES if part == 0 else STATE
        shape: list[int | str] = ["n", size, size, 3] if part == 0 else ["n", *self.state_shape(part - 1)]
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(UINT8 if part == 0 else FLOAT))

    def state_shape(self, part: int) -> tuple[int, int]:
        """Tokens and width of what a part gives."""
        alone = self.alone and part == self.last - 1
        return (1 if alone else self.tokens), self.encoder.model.embed_dim

    def kept(self, part: int, state: Tensor) -> Tensor:
        """Of what timm's part gives [n, T, d] the tokens that ours gives; features [n, F] are as they are."""
        return state if part == self.last else state[:, : self.state_shape(part)[0]]

    def graph(self, first: int, last: int, emulated: bool = False) -> ir.Model:
        """The graph of parts `first` to `last`, both among them."""
        network, start = Network(self.precision, emulated), self.start(first)
        x = start
        for part in range(first, last + 1):
            x = self.add(part, network, x)
        if last == self.last:
            return network.model(start, x, FEATURES, ["n", self.encoder.width])
        return network.model(start, x, "next_state", ["n", *self.state_shape(last)])

    def _add_stem(self, network: Network, constants: Constants, tiles: ir.Value) -> ir.Value:
        stem = self._stem
        g, p = stem.grid, stem.patch
        x = network.op("Cast", tiles, to=FLOAT if network.emulated else network.stored)  # [n, S, S, 3]
        x = network.op("Sub", x, network.constant(constants["whole"]))  # exact in every type
        x = network.op("Reshape", x, network.integers(0, g, p, g, p, 3))
        x = network.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])  # [n, g, g, p, p, 3]
        x = network.op("Reshape", x, network.integers(0, g * g, p * p * 3))
        x = network.widened(network.low("MatMul", x, network.constant(constants["patches.weight"])))  # [n, g * g, d]
        if stem.prefix:  # rows of zeros, to which class token and registers are added
            x = network.op("Pad", x, network.integers(0, stem.prefix, 0, 0, 0, 0))
        x = network.op("Add", x, network.constant(constants["constant"]))  # [n, T, d]
        return network.norm(x, constants, "norm_pre", self.encoder.model.norm_pre.eps) if stem.norm else x

    def _add_block(self, network: Network, constants: Constants, x: ir.Value, block: Any, last: bool) -> ir.Value:
        heads, eps = block.attn.num_heads, block.norm1.eps
        n = network.narrow(network.norm(x, constants, "ones", eps))
        queries = n
        if last and self.alone:
            queries, x = (
                network.op("Slice", rows, network.integers(0), network.integers(1), network.integers(1))
                for rows in (n, x)
            )
        q = network.product(queries, constants, "q")
        k, v = network.product(n, constants, "k"), network.product(n, constants, "v")
        a = network.low("Attention", q, k, v, q_num_heads=heads, kv_num_heads=heads, scale=1.0)
        x = network.op("Add", x, network.branch(a, constants, "out"))
        n = network.narrow(network.norm(x, constants, "ones", eps))
        up = network.product(n, constants, "up")
        if "gate.weight" in constants:
            gate = network.product(n, constants, "gate")
            silu = network.low("Mul", gate, network.low("Sigmoid", gate))
            inner = network.low("Mul", silu, up)
        else:
            inner = network.low("Gelu", up)
        return network.op("Add", x, network.branch(inner, constants, "down"))

    def _add_features(self, network: Network, constants: Constants, x: ir.Value) -> ir.Value:
        encoder = self.encoder
        norm = final_norm(encoder)
        after = encoder.pooling == MEAN and "fc_norm.weight" in encoder.weights
        if norm is not None and not after:
            x = network.norm(x, constants, "norm", norm[1])
        parts = []
        if encoder.pooling != MEAN:
            parts.append(
                network.op("Gather", x, network.tape.initializer(ir.tensor(0, name="first")), axis=1)
            )  # [n, d]
        if encoder.pooling != TOKEN:
            ends = (encoder.model.num_prefix_tokens, self.tokens, 1)
            patches = network.op("Slice", x, *(network.integers(end) for end in ends))
            parts.append(network.op("ReduceMean", patches, network.integers(1), keepdims=0))
        x = parts[0] if len(parts) == 1 else network.op("Concat", *parts, axis=-1)
        return network.norm(x, constants, "norm", norm[1]) if norm is not None and after else x

    def _constants(self, part: int) -> Constants:
        """The tensors of a part as they are stored; folded and stored the first time."""
        if part not in self._stored_parts:
            tensors, wide = self._tensors(part)
            stored = {name: self._stored(name, tensor, name in wide) for name, tensor in tensors.items()}
            self._stored_parts[part] = self._ones | stored
        return self._stored_parts[part]

    def _tensors(self, part: int) -> tuple[dict[str, Tensor], set[str]]:
        """The tensors of a part in float64, and the names of those that stay in float32."""
        if part == 0:
            tensors = {
                "whole": torch.tensor(self._stem.whole, dtype=torch.float64),
                "patches.weight": self._stem.product,
                "constant": self._stem.constant[None],
            }
            norm = {f"norm_pre.{name}": tensor for name, tensor in (self._stem.norm or {}).items()}
            return tensors | norm, {"constant", *norm}
        if part == self.last:
            found = final_norm(self.encoder)
            norm = {f"norm.{name}": tensor for name, tensor in found[0].items()} if found is not None else {}
            return norm, set(norm)
        block = fold_block(self.encoder, part - 1, fold_scales=self.precision != "fp16")
        return _of_block(block), {"out.bias", "down.bias", "out.scale", "down.scale"}

    def _stored(self, name: str, tensor: Tensor, wide: bool = True) -> ir.TensorProtocol:
        dtype = torch.float32 if wide else DTYPES[self.precision]
        adapted = TorchTensor(tensor.to(dtype).contiguous(), name=name)
        if adapted.nbytes < SHARED_FROM_BYTES:
            return adapted
        return self._weights.add(adapted, name)


def _of_block(block: Block) -> dict[str, Tensor]:
    """The tensors of a block by name."""
    products: dict[str, Product | None] = {
        name: getattr(block, name) for name in ("q", "k", "v", "out", "up", "gate", "down")
    }
    tensors: dict[str, Tensor] = {}
    for name, product in products.items():
        if product is not None:
            tensors |= {f"{name}.weight": product.weight, f"{name}.bias": product.bias}
    if block.scales is not None:
        tensors |= {"out.scale": block.scales[0], "down.scale": block.scales[1]}
    return tensors
