"""The models `stpath` and `stpath_tiles` of a Triton Inference Server: `stpath triton` copies this file to model.py.

The first takes features, the second tiles, of which the encoder beside its engine makes features.

It runs in a process of Triton's Python backend, which gives it `triton_python_backend_utils`, and whose Python has
`stpath_runtime`. An engine of the runtime does the work, so the numbers are those of `Engine.predict`; see
docs/triton.md. Source of the interface: https://github.com/triton-inference-server/python_backend.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from stpath_runtime.engine import Engine
from stpath_runtime.errors import GeneError, InputError, MemoryLimitError, SlideError
from stpath_runtime.flow_engine import FlowEngine
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.results.output import DEVIATION
from stpath_runtime.slides.slide import Slide, text

ALL_GENES = "all"
LARGEST = 2**31 - 2**20  # bytes of expression: gRPC carries less than 2 GiB, as Triton says only after the work


class TritonPythonModel:
    """Slides in, expression out; Triton asks for a class of this name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine beside this file, its hashes checked, and its graphs, on the device that config.pbtxt names.

        Raises
        ------
        InputError
            If the engine is damaged or the device is not there; Triton then reports that the model is unavailable.
        """
        engine = Path(args["model_repository"], args["model_version"], "engine")
        on_gpu = args["model_instance_kind"] == "GPU"
        self.engine = Engine.load(engine, device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")
        # The warm-up would load the graphs, too; but a server whose warm-up fails may die without a word (2.51 does).
        spot = Slide(np.zeros((1, 2)), np.zeros((1, self.engine.manifest.model.n_features), np.float32))
        if isinstance(self.engine, FlowEngine):
            self.engine.predict(spot)
        else:
            self.engine.decode(self.engine.embed(spot), self.engine.vocabulary.ensembl_ids[:1])
        self.encoder: TileEncoder | None = None
        if (encoder := engine.with_name("encoder")).is_dir():
            self.encoder = TileEncoder.load(encoder, device=self.engine.backend.device)
            self.encoder(np.zeros((1, self.encoder.size, self.encoder.size, 3), np.uint8))

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, with an error of one line where its input is at fault."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            found, columns = self._predict(request)
        except InputError as error:
            return _refusal(str(error), pb_utils.TritonError.INVALID_ARG)
        except MemoryError as error:
            reason = f"not enough memory ({error}); ask for fewer genes or smaller slides"
            return _refusal(reason, pb_utils.TritonError.UNAVAILABLE)
        except Exception as error:  # the trace, with paths of the server, is for its log alone
            pb_utils.Logger.log_error(traceback.format_exc())
            reason = f"{type(error).__name__}: {error}; a fault of stpath-engine: see the server's log and report it"
            return _refusal(reason, pb_utils.TritonError.INTERNAL)
        names = np.array([name.encode() for name in columns], dtype=object)
        tensors = [pb_utils.Tensor(name, array) for name, array in {**found, "columns": names}.items()]
        return pb_utils.InferenceResponse(tensors)

    def finalize(self) -> None:
        """Free what the engine holds; Triton calls this as it unloads the model."""
        self.engine.close()
        if self.encoder is not None:
            self.encoder.close()

    def _predict(self, request: Any) -> tuple[dict[str, npt.NDArray[np.float32]], list[str]]:
        """Expression [N, G] of a request, and the gene of each column: each once, in the order asked.

        Of STFlow with it the standard deviation of the samples, [N, G]; of one sample there is none, [0, 0].
        """
        names = _texts(request, "genes")
        if not names:
            raise GeneError(f"no gene is asked for; name some, or give {ALL_GENES!r} alone for all")
        genes = None if names == [ALL_GENES] else names
        panel, given = (
            self.engine.vocabulary.panel(genes),
            _array(request, "features" if self.encoder is None else "tiles"),
        )
        coords = _array(request, "coords")
        _check_size(len(given), len(panel))  # errors are found before the work
        if self.encoder is not None and len(coords) != len(given):
            raise SlideError(f"{len(given):,} tiles but {len(coords):,} rows of coords; give one of each a spot")
        slide = Slide(
            coords=coords,  # [N, 2]
            features=given if self.encoder is None else self.encoder(given),  # [N, F], of tiles [N, S, S, 3]
            organ=_one_text(request, "organ"),
            technology=_one_text(request, "technology"),
            name="request",
        )
        if isinstance(self.engine, FlowEngine):
            adata = self.engine.predict(slide, genes=panel.names, **_sampling(request))
            std = adata.layers.get(DEVIATION, np.empty((0, 0), np.float32))
            return {"expression": np.asarray(adata.X), "std": np.asarray(std)}, panel.names
        return {"expression": self.engine.decode(self.engine.embed(slide), panel.gene_ids)}, panel.names


def _check_size(spots: int, genes: int) -> None:
    if spots * genes * 4 > LARGEST:
        raise MemoryLimitError(
            f"{spots:,} spots of {genes:,} genes are {spots * genes * 4:,} bytes of expression, more than a response "
            f"holds; ask for at most {LARGEST // (4 * spots):,} genes at a time"
        )


def _array(request: Any, name: str) -> npt.NDArray[Any]:
    """An input of numbers; Triton lets a request pass that lacks one, where others are optional."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        raise SlideError(f"the input {name!r} is missing; give it with coords and genes")
    array: npt.NDArray[Any] = tensor.as_numpy()
    return array


def _sampling(request: Any) -> dict[str, Any]:
    """The optional inputs of one whole number each; those that are left out are left to the engine."""
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in ("steps", "seed", "samples")}
    return {name: int(tensor.as_numpy().ravel()[0]) for name, tensor in tensors.items() if tensor is not None}


def _texts(request: Any, name: str) -> list[str]:
    """An input of strings, [n]; none if it is left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else [text(word, name) for word in tensor.as_numpy().ravel()]


def _one_text(request: Any, name: str) -> str | None:
    """An optional input of one string; None, as for `Slide`, only if it is left out."""
    words = _texts(request, name)
    return words[0] if words else None


def _refusal(reason: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(" ".join(reason.split()), code))
