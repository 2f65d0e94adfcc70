"""The simulated cohort: real genes, and features and counts that go back to the same cell types."""

from __future__ import annotations

import numpy as np
import pytest

from stpath_runtime.slides.sample import CELL_TYPES
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.cohort import MARKERS, N_FEATURES, N_GENES, World, demo_vocabulary, simulate_slide, simulate_tissue


@pytest.fixture(scope="module")
def world():
    return World.create(0)


@pytest.fixture(scope="module")
def slide(world):
    rng = np.random.default_rng(0)
    coords, fractions = simulate_tissue(rng)
    return coords, fractions, *simulate_slide(world, coords, fractions, rng)


def test_the_genes_are_real_and_hold_the_markers():
    vocabulary, published = demo_vocabulary(), GeneVocabulary.published()
    assert len(vocabulary.ensembl_ids) == N_GENES
    assert list(MARKERS) == list(CELL_TYPES)
    names = " ".join(MARKERS.values()).split()
    assert len(set(names)) == len(names) == 90
    assert vocabulary.gene_ids(vocabulary.tokens(names)) == published.gene_ids(published.tokens(names))
    assert set(vocabulary.species) == {"Homo sapiens"}


def test_a_tissue_is_a_hexagonal_grid_with_fractions(slide):
    coords, fractions, *_ = slide
    step = np.linalg.norm(coords - coords[100], axis=1)
    assert np.sort(step)[1] == pytest.approx(200, abs=1)
    assert (fractions >= 0).all()
    np.testing.assert_allclose(fractions.sum(axis=1), 1)
    assert 400 < len(coords) < 2000


def test_markers_follow_their_cell_type_and_features_tell_of_it(world, slide):
    from sklearn.linear_model import RidgeCV

    _, fractions, features, counts = slide
    assert features.shape == (len(fractions), N_FEATURES)
    for row, names in enumerate(MARKERS.values()):
        if fractions[:, row].std() < 0.05:
            continue
        columns = world.vocabulary.tokens(names.split()) - 2
        of_type = np.log1p(counts[:, columns]).mean(axis=1)
        assert np.corrcoef(of_type, fractions[:, row])[0, 1] > 0.5
    train = np.arange(len(fractions)) % 2 == 0
    fitted = RidgeCV(alphas=np.logspace(0, 6, 7)).fit(features[train], fractions[train])
    assert fitted.score(features[~train], fractions[~train]) > 0.3


def test_patients_differ_and_a_seed_repeats_them(world, slide):
    coords, fractions, features, counts = slide
    rng = np.random.default_rng(0)
    simulate_tissue(rng)
    again = simulate_slide(world, coords, fractions, rng)
    np.testing.assert_array_equal(again[0], features)
    np.testing.assert_array_equal(again[1], counts)
    other = simulate_slide(world, coords, fractions, rng)
    means = [np.log1p(part).mean(axis=0) for part in (counts, other[1])]
    assert np.abs(means[0] - means[1]).mean() > 0.1
