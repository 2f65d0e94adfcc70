"""The fused kernel without a GPU: its numbers by Triton's interpreter, and that it compiles for the GPUs it is for.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter has a process of its own.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget

from helpers import relative_l2
from stpath_runtime.errors import DeviceError, OptionError
from stpath_runtime.manifest import ModelConfig
from stpath_train.checkpoint import seeded_checkpoint
from stpath_train.fused_attention import attention_kernel, distance_attention, tiles
from stpath_train.model import distance_bias

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHARED = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes a block may take, by capability


@pytest.fixture(scope="module")
def interpreted():
    """Runs a function in a process where Triton interprets kernels on the CPU."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=mend_interpreter) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(int)  # starts the process
        yield lambda function, *args: pool.submit(function, *args).result()


def mend_interpreter() -> None:
    """Triton 3.7's interpreter multiplies the bits of bfloat16 as if they were whole numbers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def as_float32(factor):
        if factor.dtype.scalar != triton.language.bfloat16:
            return factor
        return TensorHandle((factor.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, as_float32(a), as_float32(b), *rest)


def case(n: int, heads: int, head_size: int, dtype: torch.dtype = torch.float32, weight: float = 0.5, seed: int = 0):
    """Arguments of `distance_attention`: q, k and v as the model's one product gives them, so not contiguous."""
    rng = np.random.default_rng((seed, n, heads, head_size))
    qkv = torch.from_numpy(rng.standard_normal((n, 3, heads, head_size))).to(dtype)
    coords = torch.from_numpy(rng.random((n, 2)) * 100).float()
    return *qkv.unbind(1), coords, torch.linspace(-weight, weight, heads + 1)[1:]


def by_torch(q, k, v, coords, weight, dtype: torch.dtype) -> torch.Tensor:
    """The same by `SpatialAttention`'s own formula, in a type."""
    coords = coords.double() if dtype == torch.float64 else coords
    q, k, v = (part.to(dtype).transpose(0, 1) for part in (q, k, v))
    bias = distance_bias(weight, coords, coords).to(dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1)


def errors(found: torch.Tensor, arguments) -> tuple[float, float]:
    """Relative L2 to float64: of what was found, and of PyTorch in the type of q."""
    exact = by_torch(*arguments, torch.float64)
    return relative_l2(found.double(), exact), relative_l2(by_torch(*arguments, found.dtype).double(), exact)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("heads", "head_size"), [(1, 128), (3, 16)])
@pytest.mark.parametrize("n", [1, 37, 64, 130])
def test_kernel_equals_float64(interpreted, n, heads, head_size, dtype):
    arguments = case(n, heads, head_size, dtype)
    found = interpreted(distance_attention, *arguments)
    assert (found.dtype, found.shape) == (dtype, (n, heads, head_size))
    error, of_torch = errors(found, arguments)
    assert error <= (1e-5 if dtype == torch.float32 else 2 * of_torch)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 150), st.integers(1, 3), st.sampled_from([16, 32, 64]), st.integers(0, 2**16))
def test_any_number_of_spots(interpreted, n, heads, head_size, seed):
    arguments = case(n, heads, head_size, seed=seed)
    assert errors(interpreted(distance_attention, *arguments), arguments)[0] <= 1e-5


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("weight", [-1e4, 1e4, 1e30])
def test_no_weight_overflows(interpreted, weight, dtype):
    arguments = case(70, 2, 16, dtype, weight)
    found = interpreted(distance_attention, *arguments)
    assert found.isfinite().all()  # where PyTorch's float16 gives NaN: a bias of 1e6 is infinite there
    coords, distance = arguments[3], distance_bias(torch.ones(1), arguments[3], arguments[3])[0]
    farthest = distance.argmax(dim=1) if weight > 0 else torch.arange(len(coords))
    assert torch.equal(found[:, 1], arguments[2][farthest, 1])  # the far spot, or itself, has all the weight


def test_three_products_of_tensorfloat32_are_enough(interpreted):
    """The interpreter multiplies float32 as it is; a GPU, by input_precision="tf32x3", so."""
    q, k, v, coords, weight = case(500, 4, 128)

    def rounded(x):  # TensorFloat-32: 10 bits after the point
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def thrice(a, b):
        high_a, high_b = rounded(a), rounded(b)
        low_a, low_b = rounded(a - high_a), rounded(b - high_b)
        return low_a @ high_b + high_a @ low_b + high_a @ high_b

    def attend(product):
        parts = (part.transpose(0, 1).contiguous() for part in (q, k, v))
        own_q, own_k, own_v = parts
        scores = product(own_q, own_k.mT.contiguous()) / math.sqrt(128) + distance_bias(weight, coords, coords)
        return product(scores.softmax(-1), own_v).transpose(0, 1)

    exact = by_torch(q, k, v, coords, weight, torch.float64)
    assert relative_l2(attend(thrice).double(), exact) <= 2e-6
    assert relative_l2(attend(lambda a, b: rounded(a) @ rounded(b)).double(), exact) > 1e-4


def embeddings(compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Of two slides in one call, with and without the kernel."""
    config = ModelConfig(
        d_model=32, n_heads=2, n_layers=2, d_mlp=64, n_features=6, n_tokens=12, n_organs=25, n_technologies=5
    )
    model = seeded_checkpoint(config, 0).requires_grad_(True)
    rng = np.random.default_rng(0)
    inputs = {
        "features": torch.from_numpy(rng.standard_normal((50, 6))).float(),
        "coords": torch.from_numpy(rng.random((50, 2)) * 100).float(),
        "organ": torch.zeros(50, dtype=torch.long),
        "technology": torch.zeros(50, dtype=torch.long),
        "sizes": [20, 30],
    }
    with torch.inference_mode():
        plain = model.embed(**inputs)
        model.fuse_attention()
        if compiled:  # one graph: the kernel does not break it
            model.embed = torch.compile(model.embed, backend="eager", fullgraph=True, dynamic=True)
        return plain, model.embed(**inputs)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_attends_by_the_kernel(interpreted, compiled):
    plain, fused = interpreted(embeddings, compiled)
    assert not torch.equal(fused, plain)  # it did run
    assert relative_l2(fused.double(), plain.double()) <= 1e-5


REFUSED = {
    "double": lambda q, k, v, c, w: (q.double(), k.double(), v.double(), c, w),
    "mixed types": lambda q, k, v, c, w: (q, k.half(), v, c, w),
    "coords of half": lambda q, k, v, c, w: (q, k, v, c.half(), w),
    "head size": lambda q, k, v, c, w: (q[..., :8], k[..., :8], v[..., :8], c, w),
    "fewer keys": lambda q, k, v, c, w: (q, k[:-1], v[:-1], c, w),
    "fewer coords": lambda q, k, v, c, w: (q, k, v, c[:-1], w),
    "weights": lambda q, k, v, c, w: (q, k, v, c, w[:1]),
    "gradients": lambda q, k, v, c, w: (q, k, v, c, w.requires_grad_()),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_refused(change):
    with pytest.raises(OptionError, match="^fused attention.*(give|call it under)"):
        distance_attention(*change(*case(5, 2, 16)))


def test_without_a_gpu_it_says_so():
    with pytest.raises(DeviceError, match="runs on an NVIDIA GPU, and its tensors are on cpu"):
        distance_attention(*case(5, 2, 16))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> Callable:
    """Compiles the kernel for a GPU that is not here, to machine code."""

    def build(dtype: torch.dtype, capability: int, head_size: int = 128):
        tile = tiles(dtype, capability)
        pointers = dict.fromkeys(("q", "k", "v", "out"), f"*{TYPES[dtype]}")
        pointers |= {"coords": "*fp32", "distance_weight": "*fp32"}
        fixed = {"head_size": head_size, "queries": tile.queries, "keys": tile.keys}
        types = {**pointers, **dict.fromkeys(fixed, "constexpr")}
        signature = {name: types.get(name, "i32") for name in attention_kernel.arg_names}
        aligned = [i for i, name in enumerate(signature) if name not in (*fixed, "spots")]
        return triton.compile(
            triton.compiler.ASTSource(
                attention_kernel, signature, fixed, attrs={(i,): [["tt.divisibility", 16]] for i in aligned}
            ),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages},
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield build


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_for_a_gpu(compiled, dtype, capability, tmp_path):
    kernel = compiled(dtype, capability)
    assert kernel.metadata.shared <= SHARED[capability]
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    kind = "tf32" if dtype == torch.float32 else TYPES[dtype].replace("fp", "f")
    assert re.search(rf"{re.escape(instruction)}\S*\.{kind}\.{kind}", kernel.asm["ptx"])  # on the tensor cores
    (tmp_path / "kernel.cubin").write_bytes(kernel.asm["cubin"])
    usage = subprocess.check_output([CUOBJDUMP, "-res-usage", tmp_path / "kernel.cubin"], text=True)
    assert "STACK:0 " in usage  # no register spills
