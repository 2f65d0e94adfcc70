"""Multiple-instance learning: separable bags are told apart, shuffled labels are not, and the seed repeats it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stpath_runtime.errors import InputError
from stpath_train.evaluation.classification import cross_validate, patients_of, require_labels
from stpath_train.evaluation.metrics import auc_of_classes
from stpath_train.evaluation.mil import GatedAttentionMil, fit_mil
from stpath_train.store import Record


def some_bags(classes, seed: int = 0) -> list[np.ndarray]:
    """Bags of noise, of which a fifth of the spots, and only these, show the class."""
    rng = np.random.default_rng(seed)
    bags = [rng.standard_normal((20, 6)).astype(np.float32) for _ in classes]
    for bag, of in zip(bags, classes, strict=True):
        bag[:4, of] += 5
    return bags


@pytest.mark.parametrize("n_classes", [2, 3])
def test_separable_bags_are_told_apart(n_classes):
    classes = np.arange(18) % n_classes
    fold, probabilities = cross_validate(some_bags(classes), classes, [f"p{i}" for i in range(18)], 3, seed=0)
    assert auc_of_classes(classes, probabilities) == 1
    assert sorted(np.bincount(fold)) == [6, 6, 6]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)


def test_shuffled_labels_are_not():
    classes = np.arange(24) % 2
    shuffled = np.random.default_rng(5).permutation(classes)
    _, probabilities = cross_validate(some_bags(classes), shuffled, [f"p{i}" for i in range(24)], 3, seed=0)
    assert 0.2 < auc_of_classes(shuffled, probabilities) < 0.8


def test_slides_of_one_patient_stay_in_one_fold():
    classes = np.arange(16) // 2 % 2
    patients = [f"p{i // 2}" for i in range(16)]
    fold, _ = cross_validate(some_bags(classes), classes, patients, 2, seed=1)
    assert all(fold[2 * i] == fold[2 * i + 1] for i in range(8))
    records = [
        Record("A", "Breast", "", patient="p"),
        Record("p", "Breast", ""),
        Record("B", "Breast", "", patient="p"),
    ]
    assert patients_of(records)[0] == patients_of(records)[2] != patients_of(records)[1]


def test_the_seed_repeats_training_and_leaves_the_callers_random_numbers_alone():
    classes = np.arange(6) % 2
    bags = some_bags(classes)
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first = fit_mil(bags, classes, 2, seed=4).predict(bags)
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(first, fit_mil(bags, classes, 2, seed=4).predict(bags))
    assert not np.array_equal(first, fit_mil(bags, classes, 2, seed=5).predict(bags))


def test_attention_is_the_papers_formula():
    torch.manual_seed(0)
    module = GatedAttentionMil(6, 2)
    bag = torch.randn(7, 6)
    h = torch.relu(bag @ module.embed[0].weight.T + module.embed[0].bias)
    scores = [
        module.w.weight[0] @ (torch.tanh(module.V(spot)) * torch.sigmoid(module.U(spot))) + module.w.bias[0]
        for spot in h
    ]
    weights = torch.exp(torch.stack(scores)) / torch.exp(torch.stack(scores)).sum()
    expected = module.classify(sum(weight * spot for weight, spot in zip(weights, h, strict=True)))
    torch.testing.assert_close(module(bag), expected)


def test_labels_that_cannot_be_cross_validated_are_refused():
    def record(slide, label, patient=""):
        return Record(slide, "Breast", "", patient=patient, label=label)

    two = [record("A", "x", "p"), record("B", "x", "p"), record("C", "y"), record("D", "y")]
    assert require_labels([record("A", "x"), record("B", "x"), *two[2:]], folds=2) == ["x", "y"]
    with pytest.raises(InputError, match="label 'x': 1 patient for 2 folds"):
        require_labels(two, folds=2)
    with pytest.raises(InputError, match="slide E: no label"):
        require_labels([*two, record("E", "")], folds=2)
    with pytest.raises(InputError, match="all 2 slides have the label 'x'"):
        require_labels(two[:2], folds=2)
    classes = np.array([0, 0, 1, 1])
    with pytest.raises(InputError, match="takes all slides of a label"):
        cross_validate(some_bags(classes), classes, ["p", "p", "q", "r"], 2, seed=0)
