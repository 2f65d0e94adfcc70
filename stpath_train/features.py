"""Features of the patches of a slide, by a tile encoder of timm: HEST patches files in, features files out.

A patches file is as HEST-1k has them: `img` uint8 [N, H, W, 3] with H and W of 224 or more, `coords` [N, 2] and
`barcode` [N, 1]. A features file is as STPath reads them: `embeddings` float32 [N, F], `coords`, `barcodes`, and
attributes that say how they were computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stpath_runtime.errors import (
    DeviceError,
    EncoderError,
    FileError,
    InstallError,
    MemoryLimitError,
    OutputError,
    first_line,
    warn,
)
from stpath_runtime.files import require_writable, sha256
from stpath_runtime.progress import OnTile
from stpath_runtime.readers import BARCODES
from stpath_runtime.slides.vocabulary import nearest_names

from .download import HUB, hub_errors

if TYPE_CHECKING:
    import h5py
    import torch
    from torch import nn

SIZE = 224  # pixels that an encoder sees
PREPROCESSING = f"centre crop {SIZE}, no resizing, /255, normalised by mean and std"  # as STPath's features
DTYPE = "float32"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std
DONE = "done"  # rows that are computed, in a file that is not whole


@dataclass(frozen=True)
class Published:
    """How the authors of an encoder create it with timm."""

    repo: str  # on the Hub
    hub: dict[str, Any]  # arguments with which it comes from there
    architecture: str
    arguments: dict[str, Any]  # the same model, for weights of a file


ENCODERS = {
    "gigapath": Published(
        "prov-gigapath/prov-gigapath",
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
        "MahmoodLab/uni",
        {"init_values": 1e-5, "dynamic_img_size": True},
        "vit_large_patch16_224",
        {"img_size": SIZE, "patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True},
    ),
}


@dataclass(frozen=True, eq=False)
class Encoder:
    """A tile encoder, ready; make one with `load_encoder`."""

    model: nn.Module
    device: torch.device
    mean: tuple[float, ...]  # of each colour, of values from 0 to 1
    std: tuple[float, ...]
    width: int  # F
    about: dict[str, str]  # name, weights and preprocessing, as a features file says them

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Features [n, F] of patches [n, H, W, 3], each axis of 224 pixels or more."""
        import torch
        from torchvision.transforms import functional

        with torch.inference_mode():
            pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
            cropped = functional.center_crop(pixels, [SIZE, SIZE]).float() / 255
            found = self.model(functional.normalize(cropped, list(self.mean), list(self.std)))
            features: npt.NDArray[np.float32] = found.float().cpu().numpy()
        return features


def load_encoder(name: str, weights: str | Path | None = None, device: str = "cpu") -> Encoder:
    """Load a tile encoder.

    Parameters
    ----------
    name
        Of `ENCODERS`, or a model of timm, such as vit_small_patch16_224 or hf-hub:OWNER/NAME.
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
    import torch

    timm = _timm()
    where = _device(device)
    published = ENCODERS.get(name)
    if published is None and not timm.is_model(name) and not name.startswith(("hf-hub:", "hf_hub:")):
        near = nearest_names(name, [*ENCODERS, *timm.list_models()])
        raise EncoderError(f"unknown encoder {name!r}{near}; give {', '.join(ENCODERS)} or a model of timm")
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
    }
    return Encoder(model, where, tuple(mean), tuple(std), shape[1], about)


def extract(
    patches: str | Path, out: str | Path, encoder: Encoder, batch_size: int = 64, on_batch: OnTile | None = None
) -> int:
    """Compute the features of a slide's patches, and write them; a run that was stopped goes on where it was.

    Parameters
    ----------
    patches
        A patches file.
    out
        The features file; it has its name only when it is whole. One that is there already, computed in the same way
        from the same patches, is left as it is.
    on_batch
        Called with the number of patches done, and in all.

    Returns
    -------
    int
        The number of patches.

    Raises
    ------
    InputError
        If the patches file is at fault, `out` is something else, or memory is short.
    """
    import h5py
    import torch

    patches, out = Path(patches), Path(out)
    about = {**encoder.about, "patches": _identity(patches)}
    total = check_patches(patches)
    if out.exists():
        _require_same(out, about)
        return total
    require_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    half = out.with_name(f".{out.name}.partial")
    with h5py.File(patches, "r") as source:
        if not _goes_on(half, about):
            _begin(half, source, encoder.width, about)
        try:
            with h5py.File(half, "r+") as file:
                for start in range(int(file[DONE][()]), total, batch_size):
                    stop = min(start + batch_size, total)
                    file["embeddings"][start:stop] = encoder(_images(source, start, stop, patches))
                    file.flush()  # before the count of them: a kill leaves no row that is counted and not there
                    file[DONE][()] = stop
                    file.flush()
                    if on_batch is not None:
                        on_batch(stop, total)
                del file[DONE]
            half.replace(out)
        except torch.OutOfMemoryError as error:
            raise MemoryLimitError(
                f"{encoder.device}: not enough memory; run again with a smaller --batch-size"
            ) from error
        except OSError as error:
            raise OutputError(f"{out}: cannot be written ({error}); free some space, and run again") from error
    return total


def find_targets(patches: Sequence[Path], out: Path) -> list[Path]:
    """The features file of each patches file, all of them checked: `out`, or NAME.h5 in the folder `out`.

    Raises
    ------
    InputError
        If a patches file is at fault, `out` is one file for several, or a target would overwrite one of them.
    """
    is_file = out.suffix == ".h5" and not out.is_dir()
    if is_file and len(patches) > 1:
        raise OutputError(f"--out {out}: one file for {len(patches)} patches files; give a folder")
    if not is_file and out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: a file is there; give a folder, or a name that ends in .h5")
    targets = [out] if is_file else [out / f"{path.stem}.h5" for path in patches]
    inputs = {path.resolve() for path in patches}
    for i, (path, target) in enumerate(zip(patches, targets, strict=True)):
        if target.resolve() in inputs:
            raise OutputError(f"--out {out}: {target} would overwrite the patches; choose another folder")
        if target in targets[:i]:
            first = patches[targets.index(target)]
            raise OutputError(f"{first} and {path} would both be written to {target}; run them into two folders")
        check_patches(path)
        require_writable(target)
    return targets


def check_patches(path: Path) -> int:
    """The number of patches in a patches file.

    Raises
    ------
    InputError
        If it is missing, damaged or no patches file.
    """
    import h5py

    if not path.is_file():
        raise FileError(f"{path}: no such patches file")
    try:
        with h5py.File(path, "r") as file:
            if "img" not in file or "coords" not in file:
                held = ", ".join(sorted(file)) or "nothing"
                raise FileError(f"{path}: not a patches file; expected datasets 'img' and 'coords', found: {held}")
            images, rows = file["img"], {name: len(file[name]) for name in ("coords", *BARCODES) if name in file}
            shape, dtype = images.shape, images.dtype
    except (OSError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: cannot be read as HDF5 ({error}); download it again") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape[1:3]) < SIZE or shape[0] == 0:
        raise FileError(
            f"{path}: img is {dtype} {list(shape)}; expected uint8 [N, H, W, 3], H and W of {SIZE} pixels or more"
        )
    for name, count in rows.items():
        if count != shape[0]:
            raise FileError(f"{path}: {shape[0]:,} images but {count:,} rows of {name!r}; download it again")
    return int(shape[0])


def _begin(half: Path, source: h5py.File, width: int, about: dict[str, str]) -> None:
    import h5py
    import timm

    with h5py.File(half, "w") as file:
        file.create_dataset("embeddings", (len(source["img"]), width), DTYPE)
        file["coords"] = source["coords"][()]
        for name in BARCODES:
            if name in source and "barcodes" not in file:
                file["barcodes"] = source[name][()]
        file[DONE] = 0
        file.attrs["timm"] = timm.__version__
        file.attrs.update(about)


def _goes_on(half: Path, about: dict[str, str]) -> bool:
    """Whether a file of an earlier run can be continued."""
    import h5py

    found: dict[str, str] = {}
    with suppress(OSError), h5py.File(half, "r") as file:  # it may be damaged, or not be there
        found = dict(file.attrs) if DONE in file else {}
    different = _differences(found, about)
    if found and different:
        warn(f"{half}: begun with other {different}; it starts over")
    return bool(found) and not different


def _require_same(out: Path, about: dict[str, str]) -> None:
    import h5py

    found: dict[str, str] = {}
    with suppress(OSError), h5py.File(out, "r") as file:
        found = dict(file.attrs)
    if different := _differences(found, about):
        raise OutputError(f"{out}: exists, and is of other {different}; choose another name, or delete it")


def _differences(found: dict[str, str], about: dict[str, str]) -> str:
    return ", ".join(name for name, value in about.items() if found.get(name) != value)


def _identity(path: Path) -> str:
    stat = path.stat() if path.is_file() else None
    return json.dumps([path.name, stat.st_size, stat.st_mtime_ns] if stat else [path.name])


def _images(source: h5py.File, start: int, stop: int, path: Path) -> npt.NDArray[np.uint8]:
    try:
        images: npt.NDArray[np.uint8] = source["img"][start:stop]
    except OSError as error:
        raise FileError(f"{path}: patches {start} to {stop} cannot be read ({error}); download it again") from error
    return images


def _timm() -> Any:
    try:
        import timm
        import timm.data
    except (ImportError, RuntimeError) as error:
        raise InstallError(
            f"timm cannot be loaded ({error}); install torch and torchvision of one build, both for CUDA or for CPU"
        ) from error
    return timm


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
    return f"hf-hub:{ENCODERS[name].repo}" if name in ENCODERS else name


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
