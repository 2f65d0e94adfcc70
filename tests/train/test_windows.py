"""Masked windows: what is shown, what is asked for, and how batches are put together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import a_store, an_adata
from stpath_runtime.errors import InputError
from stpath_train.config import Data, Masking
from stpath_train.store import Record, open_slide
from stpath_train.windows import DrawSampler, Windows, collate, masked_window, nearest_spots, require_windows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return a_store(tmp_path_factory.mktemp("windows") / "store")


def tokens_of(rows, n, width=40):
    """The rows as a dense matrix over all tokens [n, width]."""
    dense = np.zeros((n, width), np.float32)
    dense[np.ix_(rows.spots.numpy(), rows.tokens.numpy())] = rows.dense().numpy()
    return dense


maskings = st.builds(
    Masking,
    ratio=st.tuples(st.floats(0.5, 10), st.floats(0.5, 10)),
    whole=st.floats(0, 1),
    genes_lost=st.floats(0, 1),
    highly_variable=st.sampled_from([0, 0.5, 1]),
    technology_dropped=st.floats(0, 1),
)


@settings(max_examples=60, deadline=None)
@given(maskings, st.integers(2, 130), st.integers(0, 10**6))
def test_a_window_shows_and_asks_for_what_the_masking_says(store, masking, n, seed):
    slide = open_slide(store, "S0")
    truth = np.zeros((130, 40), np.float32)
    truth[:, slide.tokens] = slide.read(np.arange(130))[1].toarray()
    rng = np.random.default_rng(seed)
    spots = nearest_spots(slide.coords, int(rng.integers(130)), n)
    window = masked_window(slide, spots, masking, rng)

    assert len(window.features) == len(spots) == n
    masked, known = window.asked.spots.numpy(), window.known.spots.numpy()
    whole = np.setdiff1d(np.arange(n), known)
    part = np.intersect1d(masked, known)
    assert len(masked) >= 1
    assert len(whole) == int(masking.whole * len(masked))
    assert set(whole) <= set(masked)

    asked = window.asked.tokens.numpy()
    assert set(asked) in (set(slide.tokens), set(slide.tokens[slide.highly_variable]))
    np.testing.assert_array_equal(window.asked.dense().numpy(), truth[np.ix_(spots[masked], asked)])

    shown, expected = tokens_of(window.known, n), truth[spots]
    expected[whole] = 0
    unmasked = np.setdiff1d(known, part)
    np.testing.assert_array_equal(shown[unmasked], expected[unmasked])
    hidden = (shown[part] != expected[part]).any(axis=0)
    assert hidden.sum() <= int(masking.genes_lost * len(asked))
    assert set(np.flatnonzero(hidden)) <= set(asked)


def test_half_of_the_genes_asked_for_are_lost_by_the_spots_masked_in_part(store):
    slide = open_slide(store, "S0")
    masking = Masking(ratio=(1e6, 1), whole=0, highly_variable=0)
    window = masked_window(slide, np.arange(130), masking, np.random.default_rng(0))
    shown = tokens_of(window.known, 130)[window.asked.spots.numpy()].any(axis=0)
    assert shown.sum() == len(slide.tokens) - len(slide.tokens) // 2


def test_the_technology_is_dropped_for_the_share_of_spots(store):
    slide = open_slide(store, "S0")
    for share, least, most in ((0, 130, 130), (1, 0, 0), (0.8, 10, 45)):
        masking = Masking(technology_dropped=share)
        told = masked_window(slide, np.arange(130), masking, np.random.default_rng(0)).technology
        assert least <= int((told == 2).sum()) <= most
        assert set(told.tolist()) <= {0, 2}


def test_the_nearest_spots_are_nearest():
    coords = np.random.default_rng(0).random((50, 2)).astype(np.float32)
    distance = np.linalg.norm(coords - coords[7], axis=1)
    np.testing.assert_array_equal(nearest_spots(coords, 7, 10), np.sort(np.argsort(distance)[:10]))
    assert len(nearest_spots(coords, 7, 80)) == 50


def test_a_draw_is_the_same_whoever_draws_it_and_new_in_each_epoch(store):
    data = Data(store=store.path, spots=(16, 64))
    windows = Windows(store, ["S0", "S1"], data, Masking(), [0, 0])
    again = Windows(store, ["S0", "S1"], data, Masking(), [0, 0])
    [again[i] for i in (5, 1)]
    assert torch.equal(windows[3].features, again[3].features)
    assert torch.equal(windows[3].asked.spots, again[3].asked.spots)
    assert not torch.equal(windows[1].asked.spots, windows[3].asked.spots)
    other_seed = Windows(store, ["S0", "S1"], data, Masking(), [1, 0])
    assert not torch.equal(windows[3].asked.spots, other_seed[3].asked.spots)


def test_processes_share_the_draws_of_an_epoch(store):
    windows = Windows(store, ["S0", "S1", "S2", "S3"], Data(store=store.path), Masking(), [0, 0])
    shares = [DrawSampler(windows, 2, rank, shuffle=True, seed=0) for rank in (0, 1)]
    for share in shares:
        share.set_epoch(3)
    assert sorted([*shares[0], *shares[1]]) == [12, 13, 14, 15]


@pytest.mark.parametrize("neighbors", [0, 5])
def test_a_batch_is_its_windows_one_after_another(store, neighbors):
    data = Data(store=store.path, spots=(16, 64))
    parts = [Windows(store, ["S0", "S1", "S2"], data, Masking(), [0, 0])[i] for i in range(3)]
    batch = collate(parts, neighbors)
    n = sum(batch.sizes)
    assert len(batch.features) == len(batch.coords) == len(batch.organ) == n
    together = tokens_of(batch.known, n)
    start = 0
    for part, asked, size in zip(parts, batch.asked, batch.sizes, strict=True):
        np.testing.assert_array_equal(together[start : start + size], tokens_of(part.known, size))
        np.testing.assert_array_equal(asked.spots, part.asked.spots + start)
        start += size
    assert (batch.blocks is not None) == (neighbors > 0)


def test_a_slide_whose_windows_would_be_empty_is_refused(tmp_path):
    store = a_store(tmp_path / "store", slides=1)
    store.add(Record("ONE", "Breast", ""), an_adata(store.vocabulary)[:1].copy())
    with pytest.raises(InputError, match="ONE: 1 spots, and a window has two or more"):
        require_windows(open_slide(store, "ONE"), Masking())
    slide = open_slide(store, "S0")
    slide.highly_variable[:] = False
    with pytest.raises(InputError, match="S0: none of its genes is marked as highly variable"):
        require_windows(slide, Masking(highly_variable=0.1))
    require_windows(slide, Masking(highly_variable=0))
