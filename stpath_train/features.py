"""The tile encoders of timm in PyTorch: what `stpath features` and `stpath predict` run where no engine is named.

The reference of tile encoders' engines, and the way to encoders that are not exported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stpath_runtime.errors import DeviceError, EncoderError, MemoryLimitError, first_line
from stpath_runtime.files import sha256
from stpath_runtime.images.encoder import HUB_PREFIXES
from stpath_runtime.slides.vocabulary import nearest_names

from .download import HUB, hub_errors
from .encoders import IMAGENET, KNOWN, find_encoder, import_timm

if TYPE_CHECKING:
    import torch
    from torch import nn

SIZE = 224  # pixels that an encoder sees
PREPROCESSING = f"centre crop {SIZE}, no resizing, /255, normalised by mean and std"  # as STPath's features
DTYPE = "float32"
BATCH = 64  # tiles
LIBRARIES = ("torch", "timm", "torchvision", "huggingface_hub", "safetensors")


@dataclass(frozen=True)
class Published:
    """How the authors of an encoder create it with timm; where it is on the Hub, `KNOWN` says."""

    hub: dict[str, Any]  # arguments with which it comes from there
    architecture: str
    arguments: dict[str, Any]  # the same model, for weights of a file


ENCODERS = {
    "gigapath": Published(
        {},
        "vit_giant_patch14_dinov2",
        {
            "img_size": SIZE,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
        },
    ),
    "uni": Published(
        {"init_values": 1e-5, "dynamic_img_size": True},
        "vit_large_patch16_224",
        {"img_size": SIZE, "patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True},
    ),
}


@dataclass(frozen=True, eq=False)
class TimmEncoder:
    """A tile encoder in PyTorch, ready; make one with `load_encoder`."""

    model: nn.Module
    device: torch.device
    mean: tuple[float, ...]  # of each colour, of values from 0 to 1
    std: tuple[float, ...]
    name: str
    width: int  # F
    about: dict[str, str]  # name, weights and preprocessing, as a features file says them
    size: int = SIZE
    microns: float | None = None  # that a tile shows: not known, so as STPath wants it

    def batch(self) -> int:
        """Tiles at once."""
        return BATCH

    def __call__(self, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Features [n, F] of tiles [n, 224, 224, 3]."""
        import torch
        from torchvision.transforms import functional

        try:
            with torch.inference_mode():
                pixels = torch.from_numpy(tiles).to(self.device).permute(0, 3, 1, 2).float() / 255
                found = self.model(functional.normalize(pixels, list(self.mean), list(self.std)))
                features: npt.NDArray[np.float32] = found.float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"{self.device}: not enough memory; run again with a smaller --batch-size"
            ) from error
        return features


def load_encoder(name: str, weights: str | Path | None = None, device: str = "cpu") -> TimmEncoder:
    """Load a tile encoder.

    Parameters
    ----------
    name
        Of `stpath_train.encoders.KNOWN`, or a model of timm, such as vit_small_patch16_224 or hf-hub:OWNER/NAME.
    weights
        Its weights, .safetensors or a state_dict of PyTorch; left out: from the Hugging Face Hub.
    device
        "cpu" or "cuda:N". What is asked for runs, or an error is raised.

    Raises
    ------
    InputError
        If there is no such encoder or device, its weights cannot be had or are of another model, or it takes no
        patches of 224 x 224 pixels.
    """
    from .cli import require

    require(LIBRARIES, "features")
    import torch

    timm = import_timm()
    where = _device(device)
    published = ENCODERS.get(name)
    if name not in KNOWN and not timm.is_model(name) and not name.startswith(HUB_PREFIXES):
        near = nearest_names(name, [*KNOWN, *timm.list_models()])
        raise EncoderError(
            f"unknown encoder {name!r}{near}; give the folder of an encoder's engine, {', '.join(KNOWN)}, or a model "
            "of timm"
        )
    model: nn.Module
    if name in KNOWN and published is None:
        if weights is not None:
            raise EncoderError(
                f"--weights {weights}: of {name} give the folder as the Hub has it to stpath export-encoder"
            )
        found = find_encoder(name)
        model, mean, std = found.whole().to(where), found.mean, found.std
    else:
        model = (_from_file(name, Path(weights)) if weights is not None else _from_hub(name)).eval().to(where)
        config = timm.data.resolve_model_data_config(model)
        mean, std = IMAGENET if published is not None else (config["mean"], config["std"])
    try:
        with torch.inference_mode():
            shape = model(torch.zeros(1, 3, SIZE, SIZE, device=where)).shape
    except (AssertionError, RuntimeError) as error:
        raise EncoderError(f"encoder {name}: does not run on patches of {SIZE} x {SIZE} pixels ({error})") from error
    if len(shape) != 2:
        raise EncoderError(f"encoder {name}: gives the shape {list(shape)} for a patch; expected [1, features]")
    about = {
        "encoder": name,
        "weights": f"sha256 {sha256(Path(weights))}" if weights is not None else _hub_name(name),
        "preprocessing": f"{PREPROCESSING} (mean {_shown(mean)}, std {_shown(std)})",
        "dtype": DTYPE,
        "timm": timm.__version__,
    }
    return TimmEncoder(model, where, tuple(mean), tuple(std), name, shape[1], about)


def _device(name: str) -> torch.device:
    import torch

    if name == "cpu":
        return torch.device(name)
    match = re.fullmatch(r"cuda:(\d+)", name)
    if match is None:
        raise DeviceError(f"unknown device {name!r}; give cpu or cuda:N")
    if not torch.cuda.is_available():
        raise DeviceError(f"{name}: PyTorch {torch.__version__} finds no GPU here; give cpu")
    if int(match[1]) >= torch.cuda.device_count():
        raise DeviceError(f"{name}: there are {torch.cuda.device_count()} GPUs, counted from cuda:0")
    return torch.device(name)


def _hub_name(name: str) -> str:
    return f"hf-hub:{KNOWN[name].repo}" if name in KNOWN else name


def _from_hub(name: str) -> nn.Module:
    import timm

    repo = _hub_name(name).removeprefix("hf-hub:").removeprefix("hf_hub:")
    arguments = ENCODERS[name].hub if name in ENCODERS else {}
    page = f"{HUB}/{repo}" if "/" in repo else f"{HUB}/timm"
    with hub_errors(repo, page):
        try:
            return timm.create_model(_hub_name(name), pretrained=True, num_classes=0, **arguments)
        except RuntimeError as error:
            raise EncoderError(f"encoder {name}: cannot be loaded from the Hub ({error}); see {page}") from error


def _from_file(name: str, weights: Path) -> nn.Module:
    import timm
    from timm.models import load_state_dict

    if not weights.is_file():
        raise EncoderError(f"--weights {weights}: no such file")
    published = ENCODERS.get(name)
    architecture, arguments = (published.architecture, published.arguments) if published is not None else (name, {})
    model: Any = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments)
    try:
        state = load_state_dict(str(weights), weights_only=True)
        missing, unexpected = model.load_state_dict(state, strict=False)
    except Exception as error:  # PyTorch and safetensors raise errors of their own on a file that is no weights
        raise EncoderError(f"--weights {weights}: not weights of {architecture} ({first_line(error)})") from error
    classifiers = model.pretrained_cfg.get("classifier") or ()
    heads = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    unexpected = [key for key in unexpected if not key.startswith(tuple(f"{head}." for head in heads))]
    if missing or unexpected:
        key = f"lacks {missing[0]!r}" if missing else f"holds {unexpected[0]!r}"
        raise EncoderError(
            f"--weights {weights}: not weights of {architecture} ({key}; {len(missing) + len(unexpected):,} in all)"
        )
    return model


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
