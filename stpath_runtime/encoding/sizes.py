"""Sizes of blocks, tiles and chunks, and the types that pass between the stages."""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 64  # rows of a block; fixed in the exported graphs
USUAL_KEYS = 192  # keys of a block: k = 32 on a hexagonal grid
PAD_KEYS = 8  # GPU kernels want the number of keys to be a multiple of 8
CHUNK = (1_024, 256)  # spots and genes of a chunk of X: 1 MiB, for readers of one gene and for readers of one region
# A tile reads its keys once for all its queries: with 1,024 queries that is hundreds of operations for each number
# read, more than enough to keep a CPU busy. Larger tiles cost memory and gain nothing there.
MOST_ROWS = 1024
# Of several tiles at once, each has fewer: with 128 rows a slide takes a twentieth longer, as weights are read more
# often, with 512 as long. Below 64 a second core gains nothing.
ROWS_AT_ONCE, LEAST_ROWS = 256, 64
# What passes between the stages, by precision. In bf16 x stays in float32, and k and v are bfloat16, which NumPy does
# not have: their bits.
DTYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.float32}
KV_DTYPES = {**DTYPES, "bf16": np.uint16}
SAMPLES_AT_ONCE = 8  # of STFlow: more gain nothing, as its numbers no longer stay in a core's cache
MOST_ELEMENTS = 2**31 - 1  # of a tensor: kernels of GPUs count in 32 bits
MOST_BYTES = 64 << 20  # of a tile of the embed and head stages, which have no keys
GENES_AT_ONCE = 32 * CHUNK[1]
DECODED_ROWS = 16 * CHUNK[0]  # of a tile of the head stage, at most
