"""Lets timm be imported: it and torchvision are where the Makefile puts them.

torchvision's wheels on the package index are built for CUDA: beside a PyTorch for the CPU they load only if the
operators that they lack are declared.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.append(str(Path(sys.prefix) / "features"))
if "+cpu" in torch.__version__ and find_spec("torchvision") and "+cpu" not in version("torchvision"):
    TORCHVISION = torch.library.Library("torchvision", "DEF")
    TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
