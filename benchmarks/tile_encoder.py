"""A tile encoder of Gigapath's sizes, of random weights, and slide images of any size; made once, and kept."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import torch

import published
import timm_here  # noqa: F401, before timm
from stpath_runtime.files import written_whole

GIGAPATH = {
    "img_size": 224,
    "patch_size": 16,
    "embed_dim": 1536,
    "num_heads": 24,
    "init_values": 1e-5,
    "mlp_ratio": 5.33334,
}
SMALL = {**GIGAPATH, "embed_dim": 96, "num_heads": 4}
ARCHITECTURE = "vit_giant_patch14_dinov2"


def encoder_folder(depth: int, small: bool = False) -> Path:
    """As the Hub has it; gammas near 1, as 1e-5 would make every block the identity."""
    import timm
    from safetensors.torch import save_file

    arguments = {**(SMALL if small else GIGAPATH), "depth": depth}
    folder = published.KEPT / f"gigapath-{depth}{'-small' if small else ''}"
    if folder.exists():
        return folder
    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, pretrained=False, num_classes=0, **arguments)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "gamma" in name or ("norm" in name and name.endswith("weight")):
                weights.uniform_(0.5, 1.5)
            elif weights.ndim == 2:
                weights.normal_(0, weights.shape[1] ** -0.5)
            elif name.endswith("bias"):
                weights.normal_(0, 0.1)
    facts = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config = {"architecture": ARCHITECTURE, "model_args": arguments, "pretrained_cfg": facts}
    with written_whole(folder) as partial:
        partial.mkdir()
        save_file(model.state_dict(), partial / "model.safetensors")
        (partial / "config.json").write_text(json.dumps(config))
    return folder


def encoder_engine(depth: int, precision: str = "fp32", small: bool = False) -> Path:
    """Its engine, proven."""
    from stpath_export.encoders.exporter import export_encoder

    folder = encoder_folder(depth, small)
    path = folder.with_name(f"{folder.name}-{precision}-engine")
    if not path.exists():
        export_encoder(str(folder), path, precision)
    return path


def slide_image(path: Path, tiles_a_side: int) -> Path:
    """A slide image like one by Aperio: one square of real tissue, in JPEG, over and over; the file holds one."""
    from PIL import Image

    from helpers import CROP

    with Image.open(CROP) as picture:
        square = picture.convert("RGB").crop((200, 500, 456, 756))
    written = io.BytesIO()
    square.save(written, "JPEG", quality=75, subsampling="4:2:0")
    side = 224 * tiles_a_side
    squares = (-(-side // 256)) ** 2
    description = f"Aperio Image Library v11\r\n{side}x{side} (256x256) JPEG/RGB Q=75|AppMag = 20|MPP = 0.5\0".encode()
    jpeg = written.getvalue()
    tags = {  # TIFF 6.0: the number of a tag -> its type (3: 16 bits, 4: 32 bits, 2: text), and its values
        256: ("I", 4, [side]),
        257: ("I", 4, [side]),
        258: ("H", 3, [8, 8, 8]),
        259: ("H", 3, [7]),  # JPEG
        262: ("H", 3, [6]),  # YCbCr
        270: ("B", 2, list(description)),
        277: ("H", 3, [3]),
        322: ("I", 4, [256]),
        323: ("I", 4, [256]),
        324: ("I", 4, [8] * squares),  # every tile is where the first is
        325: ("I", 4, [len(jpeg)] * squares),
        530: ("H", 3, [2, 2]),
    }
    start = 8 + len(jpeg) + len(jpeg) % 2
    beyond = start + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for number, (form, kind, numbers) in tags.items():
        raw = struct.pack(f"<{len(numbers)}{form}", *numbers)
        inside = raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack("<I", beyond + len(values))
        entries += struct.pack("<HHI", number, kind, len(numbers)) + inside
        values += b"" if len(raw) <= 4 else raw + bytes(len(raw) % 2)
    content = struct.pack("<2sHI", b"II", 42, start) + jpeg.ljust(start - 8, b"\0")
    path.write_bytes(content + struct.pack("<H", len(tags)) + entries + bytes(4) + values)
    return path
