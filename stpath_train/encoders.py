"""Tile encoders as the Hugging Face Hub has them: which we know, and how one is read, block by block.

A folder of the Hub holds `config.json` (architecture, model_args, pretrained_cfg) and the weights, `model.safetensors`
or `pytorch_model.bin`. Nothing of it is unpickled but tensors, and a tensor is read when it is asked for: the largest
encoders have 4.5 GB of them.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stpath_runtime.errors import EncoderError, FileError, InstallError, first_line
from stpath_runtime.images.encoder import CONFIG, HUB_PREFIXES
from stpath_runtime.slides.vocabulary import nearest_names

from .download import HUB, hub_errors

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there
TOKEN, MEAN, TOKEN_AND_MEAN = "token", "mean", "token and mean"  # how tokens become features
POOLINGS = {"token": TOKEN, "avg": MEAN, "": TOKEN_AND_MEAN}  # by timm's global_pool
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std


@dataclass(frozen=True)
class Known:
    """An encoder that we know by name: where it is, and what its page says beyond its config."""

    repo: str  # on the Hub
    pooling: str = TOKEN
    microns_a_pixel: float = 0.5  # that it was trained at
    arguments: dict[str, Any] = field(default_factory=dict)  # of timm, which its config leaves out


KNOWN = {
    "gigapath": Known("prov-gigapath/prov-gigapath"),
    "uni": Known("MahmoodLab/uni", arguments={"init_values": 1e-5}),
    "uni2-h": Known("MahmoodLab/UNI2-h"),
    "h-optimus-0": Known("bioptimus/H-optimus-0"),
    "h-optimus-1": Known("bioptimus/H-optimus-1"),
    "virchow2": Known("paige-ai/Virchow2", TOKEN_AND_MEAN),
    "h0-mini": Known("bioptimus/H0-mini", TOKEN),
}


class Weights(Mapping[str, Any]):
    """The tensors of a file by name, each read when it is asked for.

    Raises
    ------
    InputError
        If the file is missing, damaged, or a pickle of more than tensors.
    """

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        if not path.is_file():
            raise FileError(f"{path}: no such file; expected the weights of an encoder")
        try:
            if path.suffix == ".safetensors":
                from safetensors import safe_open

                file: Any = safe_open(path, framework="pt")
                self._names = list(file.keys())
                self._read: Callable[[str], torch.Tensor] = file.get_tensor
            else:
                zipped = zipfile.is_zipfile(path)  # as PyTorch has written them since 1.6; others cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
                state = state.get("state_dict", state) if isinstance(state, dict) else state
                if not isinstance(state, dict) or not all(isinstance(t, torch.Tensor) for t in state.values()):
                    raise ValueError("it holds other things than tensors by name")
                self._names, self._read = list(state), state.__getitem__
        except Exception as error:  # PyTorch and safetensors raise errors of their own
            raise EncoderError(
                f"{path}: not weights of an encoder, or more than tensors, which is not unpickled "
                f"({first_line(error)}); give a .safetensors or a state_dict"
            ) from error

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, eq=False)
class EncoderModel:
    """An encoder: timm's module without weights (on PyTorch's device `meta`), its weights, and what is known of it."""

    name: str
    model: Any  # timm's VisionTransformer
    weights: Weights
    pooling: str
    mean: tuple[float, ...]  # of each colour, of values from 0 to 1
    std: tuple[float, ...]
    microns_a_pixel: float | None  # that it was trained at
    licence: str
    architecture: str

    @property
    def size(self) -> int:
        """Pixels of a side of the tile that it takes."""
        return int(self.model.patch_embed.img_size[0])

    @property
    def width(self) -> int:
        """Features of a tile."""
        return int(self.model.embed_dim) * (2 if self.pooling == TOKEN_AND_MEAN else 1)

    @property
    def depth(self) -> int:
        """Blocks."""
        return len(self.model.blocks)

    def pooled(self, output: torch.Tensor) -> torch.Tensor:
        """Features [n, F] from what timm's module gives: [n, F], or all tokens [n, T, d]."""
        import torch

        if output.ndim == 2:
            return output
        if self.pooling == TOKEN:
            return output[:, 0]
        return torch.cat([output[:, 0], output[:, self.model.num_prefix_tokens :].mean(dim=1)], dim=1)

    def normalized(self, tiles: torch.Tensor) -> torch.Tensor:
        """Tiles uint8 [n, S, S, 3] as timm takes them: [n, 3, S, S], in float64."""
        import torch

        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.mean, self.std))
        return ((tiles.double() / 255 - mean) / std).permute(0, 3, 1, 2)

    def whole(self) -> nn.Module:
        """The model in float32, with all its weights, that gives features [n, F] of normalised tiles [n, 3, S, S]."""
        import torch

        class Whole(torch.nn.Module):
            def __init__(self, encoder: EncoderModel) -> None:
                super().__init__()
                self.model, self._encoder = copy.deepcopy(encoder.model), encoder
                state = {name: encoder.weights[name].float() for name in self.model.state_dict()}
                self.model.load_state_dict(state, assign=True)

            def forward(self, tiles: torch.Tensor) -> torch.Tensor:
                return self._encoder.pooled(self.model(tiles))

        return Whole(self).eval()

    def parts(self, dtype: torch.dtype) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """The forward pass of timm in parts, with the weights of one at a time in memory, in a type.

        The tokens of normalised tiles, each block, and the features: composed, they are the model.
        """
        model = copy.deepcopy(self.model)
        outside = {name: self.weights[name].to(dtype) for name in model.state_dict() if not name.startswith("blocks.")}
        model.load_state_dict(outside, strict=False, assign=True)
        yield lambda tiles: model.norm_pre(model._pos_embed(model.patch_embed(tiles)))
        for i, block in enumerate(model.blocks):
            own = {name: self.weights[f"blocks.{i}.{name}"].to(dtype) for name in block.state_dict()}
            block.load_state_dict(own, assign=True)
            yield block
            block.to("meta")
        yield lambda state: self.pooled(model.forward_head(model.norm(state)))


def find_encoder(name: str) -> EncoderModel:
    """An encoder by a name that we know, a name of the Hub (hf-hub:OWNER/NAME), or its folder.

    Raises
    ------
    InputError
        If it is none of these, cannot be fetched, its config cannot be read, or its weights do not fit it.
    """
    if Path(name).is_dir():
        return read_encoder(Path(name))
    known = KNOWN.get(name.lower())
    if known is None and not name.startswith(HUB_PREFIXES):
        near = nearest_names(name, KNOWN)
        what = "is a file; give its folder" if Path(name).exists() else f"no such folder, and no encoder known{near}"
        raise EncoderError(f"{name}: {what}; give {', '.join(KNOWN)}, hf-hub:OWNER/NAME, or a folder of the Hub")
    repo = known.repo if known is not None else name[len(HUB_PREFIXES[0]) :]
    known = known or next((one for one in KNOWN.values() if one.repo.lower() == repo.lower()), None)
    return read_encoder(_fetched(repo), name.lower() if name.lower() in KNOWN else name, known)


def read_encoder(folder: Path, name: str | None = None, known: Known | None = None) -> EncoderModel:
    """An encoder from a folder as the Hub has it.

    Raises
    ------
    InputError
        If its config cannot be read, names no architecture of timm, or its weights do not fit it.
    """
    config = _config(folder / CONFIG)
    path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if path is None:
        raise FileError(f"{folder}: no weights; expected {' or '.join(WEIGHTS)} beside {CONFIG}")
    weights = Weights(path)
    given, facts = config.get("model_args") or {}, config.get("pretrained_cfg") or {}
    architecture = config.get("architecture") or facts.get("architecture")
    if not isinstance(given, dict) or not isinstance(facts, dict) or not isinstance(architecture, str):
        raise EncoderError(
            f"{folder / CONFIG}: architecture, model_args or pretrained_cfg is missing or of another type"
        )
    arguments = {
        **(known.arguments if known is not None else {}),
        **given,
        **(_mlp(weights) if architecture.startswith("vit") else {}),
    }
    if "global_pool" not in arguments and isinstance(config.get("global_pool"), str):
        arguments["global_pool"] = config["global_pool"]
    arguments.pop("num_classes", None)
    model = create_model(architecture, arguments, str(folder / CONFIG))
    _require_fit(model, weights, architecture)
    mean, std = (_colours(facts, key, folder / CONFIG) for key in ("mean", "std"))
    return EncoderModel(
        name=name or folder.resolve().name,
        model=model,
        weights=weights,
        pooling=known.pooling if known is not None else POOLINGS[model.global_pool],
        mean=mean,
        std=std,
        microns_a_pixel=known.microns_a_pixel if known is not None else None,
        licence=str(facts.get("license") or _card(folder) or "not stated"),
        architecture=architecture,
    )


def create_model(architecture: str, arguments: Mapping[str, Any], where: str) -> Any:
    """Timm's module without weights, checked to be what we export.

    Raises
    ------
    InputError
        If timm does not know it, takes other arguments, or it is no plain vision transformer.
    """
    import torch

    timm = import_timm()
    if not timm.is_model(architecture):
        near = nearest_names(architecture, timm.list_models())
        raise EncoderError(f"{where}: timm {timm.__version__} has no architecture {architecture!r}{near}")
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments).eval()
    except Exception as error:  # timm asserts, and passes arguments on to whatever takes them
        raise EncoderError(f"{where}: timm cannot make {architecture} of model_args ({first_line(error)})") from error
    if reason := _not_plain(model):
        raise EncoderError(f"{where}: {architecture} has {reason}; only plain vision transformers are exported")
    return model


def import_timm() -> Any:
    """Timm.

    Raises
    ------
    InputError
        If it cannot be loaded.
    """
    try:
        import timm
        import timm.data
    except (ImportError, RuntimeError) as error:
        raise InstallError(
            f"timm cannot be loaded ({error}); install torch and torchvision of one build, both for CUDA or for CPU"
        ) from error
    return timm


def _not_plain(model: Any) -> str:
    """What a model has that the exporter does not know; empty if it knows all."""
    from timm.layers import PatchEmbed
    from timm.models.vision_transformer import VisionTransformer
    from torch import nn

    if type(model) is not VisionTransformer:
        return f"the class {type(model).__name__}"
    embed = model.patch_embed
    (height, width), (patch, patch_width) = embed.img_size, embed.patch_size
    faults = [
        (model.global_pool not in POOLINGS or model.pool_include_prefix, f"the pooling {model.global_pool!r}"),
        (not model.has_class_token and model.global_pool != "avg", "no class token"),
        (type(embed) is not PatchEmbed or height != width or patch != patch_width, "patches that are not squares"),
        (
            height % patch or not isinstance(embed.norm, nn.Identity),
            "patches that do not fill the tile, or are normalised",
        ),
        *(fault for block in model.blocks for fault in _faults_of_block(block)),
    ]
    return next((reason for applies, reason in faults if applies), "")


def _faults_of_block(block: Any) -> list[tuple[bool, str]]:
    from timm.layers import GluMlp, Mlp, SwiGLU
    from timm.models.vision_transformer import Attention, Block
    from torch import nn

    attention, mlp = block.attn, block.mlp
    act = getattr(mlp, "act", None)
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm")] + [getattr(mlp, "norm", None)]
    return [
        (type(block) is not Block, f"blocks of the class {type(block).__name__}"),
        (type(attention) is not Attention, f"an attention of the class {type(attention).__name__}"),
        (getattr(attention, "gate", None) is not None, "a gate in its attention"),
        (type(mlp) not in (Mlp, GluMlp, SwiGLU), f"an mlp of the class {type(mlp).__name__}"),
        (not all(isinstance(norm, nn.Identity) for norm in norms), "norms within attention or mlp"),
        (not isinstance(act, nn.GELU if type(mlp) is Mlp else nn.SiLU), f"the activation {type(act).__name__}"),
        (getattr(act, "approximate", "none") != "none", "an approximate GELU"),
    ]


def _mlp(weights: Weights) -> dict[str, Any]:
    """Arguments of timm for a gated mlp, which a config cannot name: the shapes of the weights tell it."""
    from timm.layers import SwiGLU, SwiGLUPacked
    from torch import nn

    if "blocks.0.mlp.fc1_g.weight" in weights:
        return {"mlp_layer": SwiGLU, "act_layer": nn.SiLU}
    first, second = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
    if first in weights and second in weights and len(weights[first]) == 2 * weights[second].shape[-1]:
        return {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    return {}


def _require_fit(model: nn.Module, weights: Weights, architecture: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected and not name.startswith(("head.", "mask_token"))]
    if missing or unknown:
        what = f"lack {missing[0]!r}" if missing else f"hold {unknown[0]!r}, which it has not"
        raise EncoderError(
            f"{weights.path}: not weights of {architecture} by its {CONFIG}: they {what} "
            f"({len(missing) + len(unknown):,} tensors in all)"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise EncoderError(
                f"{weights.path}: not weights of {architecture} by its {CONFIG}: {name!r} is "
                f"{list(weights[name].shape)}, expected {list(shape)}"
            )


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileError(f"{path.parent}: no {CONFIG}; give the folder of an encoder as the Hub has it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise FileError(f"{path}: cannot be read as JSON ({error}); download it again") from error
    if not isinstance(config, dict):
        raise FileError(f"{path}: holds no object; download it again")
    return config


def _colours(facts: Mapping[str, Any], key: str, path: Path) -> tuple[float, ...]:
    """Three numbers, of red, green and blue, each from 0 to 1; as divisors they are not 0."""
    found = facts.get(key)
    values = found if isinstance(found, list) else []
    numbers = [value for value in values if type(value) in (int, float) and 0 <= value <= 1]
    if len(values) != 3 or len(numbers) != 3 or (key == "std" and 0 in numbers):
        raise EncoderError(f"{path}: pretrained_cfg.{key} is {found!r}; expected three numbers from 0 to 1")
    return tuple(float(value) for value in values)


def _card(folder: Path) -> str:
    """The licence that the head of README.md states; empty if it states none."""
    path = folder / "README.md"
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    stated = [line.partition(":")[2].strip() for line in lines[:60] if line.startswith("license:")]
    return stated[0] if stated else ""


def _fetched(repo: str) -> Path:
    """The folder of a repository of the Hub, fetched into its cache."""
    from huggingface_hub import snapshot_download

    with hub_errors(repo, f"{HUB}/{repo}"):
        return Path(snapshot_download(repo, allow_patterns=[CONFIG, "README.md", *WEIGHTS]))
