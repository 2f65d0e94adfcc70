"""Global attention of `stpath_train.model` as one kernel for NVIDIA GPUs, which keeps no scores: inference only.

FlashAttention's online softmax (Dao, 2023, arXiv:2307.08691), with the distance bias computed in the kernel: memory
grows with the spots, not with their square. Written in Triton, the language for GPUs that PyTorch brings along.

N spots, H heads, D = d/H a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stpath_runtime.errors import DeviceError, InstallError, OptionError

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError as error:
    what = "fused attention needs Triton, which PyTorch for CUDA brings on Linux; run: pip install triton"
    raise InstallError(what) from error

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: Triton interprets kernels on the CPU, for tests


class Tiles(NamedTuple):
    """What one program of the kernel holds at once, and how it is compiled."""

    queries: int
    keys: int
    warps: int
    stages: int  # tiles of keys and values that are on their way from memory


def tiles(dtype: torch.dtype, capability: int) -> Tiles:
    """The tiles for a type and a compute capability (80, 90, ...): the largest that do not spill registers at D = 128.

    They take 132 KB of shared memory (16 bits) and 197 KB (float32) on 9.0, and 99 and 74 KB elsewhere, where some GPUs
    have 101 KB.
    """
    if dtype != torch.float32:
        return Tiles(queries=128, keys=64, warps=8, stages=3)
    if capability == 90:
        return Tiles(queries=128, keys=32, warps=8, stages=2)
    return Tiles(queries=32, keys=32, warps=4, stages=2)


@triton.jit(do_not_specialize=["spots"])  # type: ignore[untyped-decorator]  # compiled once for slides of all sizes
def attention_kernel(  # type: ignore[no-untyped-def]
    q, k, v, coords, distance_weight, out, spots,
    q_spot, q_head, k_spot, k_head, v_spot, v_head, out_spot, out_head,
    head_size: tl.constexpr, queries: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of queries to all spots, in one head. The numbers after `spots` are strides."""
    log2_e: tl.constexpr = 1.4426950408889634  # exp(s) = exp2(s * log2(e)), and GPUs have an instruction for exp2
    head = tl.program_id(1)
    rows = (tl.program_id(0) * queries + tl.arange(0, queries)).to(tl.int64)
    dims = tl.arange(0, head_size)
    is_query = rows < spots
    q_tile = tl.load(q + head * q_head + rows[:, None] * q_spot + dims, is_query[:, None], 0.0)
    x = tl.load(coords + 2 * rows, is_query, 0.0)
    y = tl.load(coords + 2 * rows + 1, is_query, 0.0)
    scale: tl.constexpr = log2_e / head_size**0.5
    weight = log2_e * tl.load(distance_weight + head)

    most = tl.full([queries], float("-inf"), tl.float32)  # the highest score so far
    total = tl.zeros([queries], tl.float32)  # the sum of exp2(score - most)
    attended = tl.zeros([queries, head_size], tl.float32)
    for start in range(0, spots, keys):
        columns = (start + tl.arange(0, keys)).to(tl.int64)
        is_key = columns < spots  # at least one is, so `most` is finite from the first tile on
        k_tile = tl.load(k + head * k_head + columns * k_spot + dims[:, None], is_key[None, :], 0.0)  # [D, keys]
        dx = x[:, None] - tl.load(coords + 2 * columns, is_key, 0.0)[None, :]
        dy = y[:, None] - tl.load(coords + 2 * columns + 1, is_key, 0.0)[None, :]
        scores = tl.dot(q_tile, k_tile, input_precision="tf32x3") * scale + weight * tl.sqrt(dx * dx + dy * dy)
        scores = tl.where(is_key[None, :], scores, float("-inf"))  # [queries, keys]

        highest = tl.maximum(most, tl.max(scores, 1))
        fade = tl.exp2(most - highest)
        weights = tl.exp2(scores - highest[:, None])
        total = total * fade + tl.sum(weights, 1)
        v_tile = tl.load(v + head * v_head + columns[:, None] * v_spot + dims, is_key[:, None], 0.0)  # [keys, D]
        attended = tl.dot(weights.to(v_tile.dtype), v_tile, attended * fade[:, None], input_precision="tf32x3")
        most = highest

    attended /= total[:, None]
    places = out + head * out_head + rows[:, None] * out_spot + dims
    tl.store(places, attended.to(out.dtype.element_ty), is_query[:, None])


def distance_attention(q: Tensor, k: Tensor, v: Tensor, coords: Tensor, distance_weight: Tensor) -> Tensor:
    """Attention of every spot to every spot: softmax(q k^T / sqrt(D) + distance_weight * distance) v, [N, H, D].

    Distances, scores and sums are float32 in every type. A product of float32 is made of three in TensorFloat-32 on the
    tensor cores ("tf32x3", 22 bits of each factor): one (11 bits) would miss 1e-5 by far, and float32 instructions peak
    lower (67 TFLOP/s against 495 / 3 on an H100, by its datasheet).

    Parameters
    ----------
    q, k, v
        [N, H, D] of one slide, on one NVIDIA GPU of compute capability 8.0 or above, all float32, float16 or bfloat16;
        D is 16, 32, 64 or 128.
    coords
        [N, 2] in float32, whatever the type of q: float16 would round positions of 0..100 to 1/16.
    distance_weight
        [H], what a unit of distance adds to the score.

    Raises
    ------
    OptionError
        Another shape or type, or a gradient is wanted: the kernel computes none.
    DeviceError
        No such GPU.
    """
    _check(q, k, v, coords, distance_weight)
    return _launch(q, k, v, coords, distance_weight)


@torch.library.custom_op("stpath::distance_attention", mutates_args=())  # torch.compile takes it whole
def _launch(q: Tensor, k: Tensor, v: Tensor, coords: Tensor, distance_weight: Tensor) -> Tensor:
    spots, heads, head_size = q.shape
    q, k, v = (part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (8, 0)
    if major < 8:
        name = torch.cuda.get_device_name(q.device)
        raise DeviceError(f"fused attention needs compute capability 8.0 (Ampere), and {name} is older; run without it")
    tile = tiles(q.dtype, 10 * major + minor)
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]  # Triton launches on the current GPU
        attention_kernel[(triton.cdiv(spots, tile.queries), heads)](
            q, k, v, coords.contiguous(), distance_weight.float().contiguous(), out, spots,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2],
            head_size, tile.queries, tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


@_launch.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, coords: Tensor, distance_weight: Tensor) -> Tensor:
    return q.new_empty(q.shape)


def _check(q: Tensor, k: Tensor, v: Tensor, coords: Tensor, distance_weight: Tensor) -> None:
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(str(part.dtype).removeprefix("torch.") for part in (q, k, v))
        raise OptionError(f"fused attention: q, k, v of {given}; give float32, float16 or bfloat16, one type for all")
    if coords.dtype != torch.float32:
        raise OptionError(f"fused attention: coords of {coords.dtype}; give float32, whatever the type of the model")
    if q.ndim != 3 or q.shape[-1] not in HEAD_SIZES or not q.shape == k.shape == v.shape:
        given = ", ".join(str(list(part.shape)) for part in (q, k, v))
        raise OptionError(f"fused attention: q, k, v of {given}; give [N, H, D] each, D one of {HEAD_SIZES}")
    if coords.shape != (len(q), 2) or distance_weight.shape != (q.shape[1],):
        given = f"{list(coords.shape)}, distance_weight of {list(distance_weight.shape)}"
        raise OptionError(f"fused attention: coords of {given}; give [{len(q)}, 2] and [{q.shape[1]}], as q has")
    parts = (q, k, v, coords, distance_weight)
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        raise OptionError("fused attention has no gradients; call it under torch.inference_mode(), or train without it")
    if len({part.device for part in parts}) > 1 or not (q.is_cuda or INTERPRETED):
        given = ", ".join(str(part.device) for part in parts)
        raise DeviceError(f"fused attention runs on an NVIDIA GPU, and its tensors are on {given}; move them to cuda:0")
