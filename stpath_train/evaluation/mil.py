"""Attention-based multiple-instance learning: Ilse, Tomczak and Welling, ICML 2018, with gated attention.

A bag is a slide, an instance a spot: n spots of a bag, F features, K classes, S bags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Bag = npt.NDArray[Any]  # [n, F]
HIDDEN, ATTENTION = 128, 64  # widths
EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 30, 5e-4, 1e-4  # the last two as in the paper; a step is a bag, as there


class GatedAttentionMil(nn.Module):
    """Class scores of a bag from the mean of its instances, weighted by softmax(w' (tanh(V h) * sigmoid(U h)))."""

    def __init__(self, n_features: int, n_classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(n_features, HIDDEN), nn.ReLU())
        self.V, self.U = nn.Linear(HIDDEN, ATTENTION), nn.Linear(HIDDEN, ATTENTION)
        self.w = nn.Linear(ATTENTION, 1)
        self.classify = nn.Linear(HIDDEN, n_classes)

    def forward(self, bag: Tensor) -> Tensor:
        """Class scores [K] of a bag [n, F]."""
        h = self.embed(bag)  # [n, HIDDEN]
        weight = torch.softmax(self.w(torch.tanh(self.V(h)) * torch.sigmoid(self.U(h))), dim=0)  # [n, 1]
        return self.classify((weight * h).sum(dim=0))


class MilClassifier:
    """The module with the scaling of its features, trained; make one with `fit_mil`."""

    def __init__(self, scaler: Any, module: GatedAttentionMil) -> None:
        self.scaler = scaler
        self.module = module

    def predict(self, bags: Sequence[Bag]) -> npt.NDArray[np.float64]:
        """Probabilities of the classes, [S, K]."""
        with torch.inference_mode():
            rows = [torch.softmax(self.module(self.scaled(bag)).double(), dim=0).numpy() for bag in bags]
        return np.stack(rows)

    def scaled(self, bag: Bag) -> Tensor:
        """A bag with its features at mean 0 and deviation 1 over the training spots."""
        return torch.from_numpy(self.scaler.transform(bag).astype(np.float32))


def fit_mil(bags: Sequence[Bag], classes: npt.NDArray[np.int64], n_classes: int, seed: int) -> MilClassifier:
    """Train on bags of classes 0..K-1 [S], one bag a step; the same numbers for the same seed."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    for bag in bags:
        scaler.partial_fit(bag)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        fitted = MilClassifier(scaler, GatedAttentionMil(bags[0].shape[1], n_classes))
        optimizer = torch.optim.Adam(fitted.module.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        inputs, targets = [fitted.scaled(bag) for bag in bags], torch.from_numpy(classes)
        for _ in range(EPOCHS):
            for i in torch.randperm(len(bags)).tolist():
                optimizer.zero_grad()
                loss = F.cross_entropy(fitted.module(inputs[i]), targets[i])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    fitted.module.requires_grad_(False).eval()
    return fitted
