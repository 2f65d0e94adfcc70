"""Measured spots: checks, and several names of one gene."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from helpers import made_up_vocabulary
from stpath_runtime import Context, InputError, Slide
from stpath_runtime.errors import InputWarning
from stpath_runtime.readers import read_context
from stpath_runtime.slides.context import choose_spots

GENES = made_up_vocabulary(12)
SLIDE = Slide(np.arange(12).reshape(6, 2), np.ones((6, 3), np.float32), [f"spot{i}" for i in range(6)], name="s1")


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 12)), elements=st.integers(0, 50)),
    st.randoms(use_true_random=False),
)
def test_names_of_one_gene_are_resolved_by_the_maximum(counts, random):
    genes = [random.randrange(10) for _ in range(counts.shape[1])]
    names = [random.choice([f"GENE{g}", f"ALIAS{g}", f"ENSG{g:011d}", f"ENSG{g:011d}.3"]) for g in genes]
    spots = list(range(len(counts)))
    expected = np.zeros((len(counts), 12))
    for column, gene in enumerate(genes):
        expected[:, gene + 2] = np.maximum(expected[:, gene + 2], np.log1p(counts[:, column]))
    for matrix in (counts, sparse.csr_matrix(counts), sparse.csc_matrix(counts), counts.astype(np.float32)):
        rows = Context(spots, matrix, names).resolve(SLIDE, GENES)
        found = np.zeros((len(counts), 12))
        found[:, rows.tokens] = rows.log_counts.toarray()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert len(set(rows.tokens)) == len(rows.tokens)


def test_spots_by_barcode_and_by_position_are_the_same():
    counts = np.array([[1, 2], [3, 4]])
    by_name = Context(["spot4", b"spot1"], counts, ["GENE0", "GENE1"]).resolve(SLIDE, GENES)
    by_position = Context(np.array([4, 1]), counts, ["GENE0", "GENE1"]).resolve(SLIDE, GENES)
    assert by_name.spots.tolist() == by_position.spots.tolist() == [4, 1]


def test_damaged_sparse_counts_are_refused_and_do_not_crash():
    for indices in ([4_000_000], [-1]):
        counts = sparse.csr_matrix(np.array([[0, 1.0]]))
        counts.indices[:] = indices
        with pytest.raises(InputError, match="not a matrix"):
            Context([0], counts, ["GENE0", "GENE1"]).resolve(SLIDE, GENES)


def test_unknown_genes_of_a_context_are_left_out_with_a_warning():
    with pytest.warns(InputWarning, match="1 of 3 genes"):
        rows = Context([0], np.array([[1, 2, 3]]), ["GENE0", "MT-XYZ", "GENE3"]).resolve(SLIDE, GENES)
    assert rows.tokens.tolist() == [2, 5]


def test_spots_that_the_slide_does_not_have_are_left_out_and_said():
    with pytest.warns(InputWarning, match="1 of its 3 spots are not in the slide .* the first is 'x'; 2 are used"):
        rows = Context(["spot4", "x", "spot1"], [[1.0], [2.0], [3.0]], ["GENE0"]).resolve(SLIDE, GENES)
    assert rows.spots.tolist() == [4, 1]
    np.testing.assert_allclose(rows.log_counts.toarray(), np.log1p([[1.0], [3.0]]), rtol=1e-6)


SPARSE = [getattr(sparse, f"{kind}_{what}") for kind in ("csr", "csc", "coo", "lil", "dok", "dia", "bsr")
          for what in ("matrix", "array")]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    counts=hnp.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.integers(0, 9)),
    kind=st.sampled_from([np.asarray, np.asmatrix, np.asfortranarray, *SPARSE]),
    dtype=st.sampled_from(["<f4", ">f4", "<f8", ">f8", "<i4", ">i4", "<u2", "?"]),
    unsorted=st.booleans(),
)
def test_counts_as_libraries_hand_them(counts, kind, dtype, unsorted):
    """Every sparse format, any byte order, read-only and unsorted: the same numbers, and the caller's are untouched."""
    counts = counts.astype(dtype)
    native = kind(counts.astype(counts.dtype.newbyteorder("=")))
    handed = kind(counts) if not sparse.issparse(native) else native
    parts = [getattr(handed, name) for name in ("data", "indices", "indptr") if hasattr(handed, name)]
    if unsorted and handed.__class__.__name__.startswith(("csr", "csc")):
        for i in range(len(handed.indptr) - 1):
            row = slice(handed.indptr[i], handed.indptr[i + 1])
            handed.indices[row], handed.data[row] = handed.indices[row][::-1].copy(), handed.data[row][::-1].copy()
        handed.has_sorted_indices = False
    for part in parts:
        if isinstance(part, np.ndarray):
            part.flags.writeable = False
    before = [part.tobytes() for part in parts if isinstance(part, np.ndarray)]
    genes = [f"GENE{i}" for i in range(counts.shape[1])]
    rows = Context(range(len(counts)), handed, genes).resolve(SLIDE, GENES)
    exact = np.log1p(counts.astype(np.float64))
    np.testing.assert_allclose(rows.log_counts.toarray(), exact, rtol=1e-6)
    assert rows.log_counts.dtype == np.float32
    assert rows.log_counts.data.dtype.isnative
    assert [part.tobytes() for part in parts if isinstance(part, np.ndarray)] == before


@settings(max_examples=60, deadline=None)
@given(
    entries=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 127)), min_size=1, max_size=12),
    kind=st.sampled_from(["coo", "csr", "csc", "bsr"]),
    dtype=st.sampled_from(["u1", "i1", "?", "i2", "f4", "u8"]),
)
def test_entries_that_stand_twice_are_added_up_in_a_type_that_holds_their_sum(entries, kind, dtype):
    row, column, value = (np.array(part) for part in zip(*entries, strict=True))
    value = value.astype(dtype)
    exact = np.zeros((3, 2))
    np.add.at(exact, (row, column), value.astype(np.float64))
    coo = sparse.coo_array((value, (row, column)), shape=(3, 2))
    if kind != "coo":  # as a file may hold it: scipy itself would add up here
        order = np.argsort(row if kind != "csc" else column, kind="stable")
        minor = (column if kind != "csc" else row)[order]
        pointers = np.searchsorted((row if kind != "csc" else column)[order], range(4 if kind != "csc" else 3))
        data = value[order] if kind != "bsr" else value[order][:, None, None]
        coo = getattr(sparse, f"{kind}_array")((data, minor, pointers), shape=(3, 2))
    rows = Context(range(3), coo, ["GENE0", "GENE1"]).resolve(SLIDE, GENES)
    np.testing.assert_allclose(rows.log_counts.toarray(), np.log1p(exact), rtol=1e-6)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ma.masked_equal([[1, 9]], 9), "1 entries are masked"),
        (torch.ones(1, 2, requires_grad=True), "detach"),
        (torch.ones(1, 2, dtype=torch.bfloat16), "BFloat16"),
        ([[1, 2], [3]], "not a matrix"),
        (pd.DataFrame({"a": [1], "b": ["2"]}), "type object"),
        (pd.DataFrame({"a": [1], "b": pd.array([None], dtype="Int64")}), "1 counts are NaN"),
    ],
)
def test_counts_that_are_none(counts, message):
    with pytest.raises(InputError, match=message):
        Context([0], counts, ["GENE0", "GENE1"]).resolve(SLIDE, GENES)


def test_tables_of_nullable_numbers_are_counts():
    counts = pd.DataFrame({"a": pd.array([3], dtype="Int64"), "b": pd.array([2], dtype="UInt8")})
    rows = Context([0], counts, ["GENE0", "GENE1"]).resolve(SLIDE, GENES)
    np.testing.assert_allclose(rows.log_counts.toarray(), np.log1p([[3, 2]]), rtol=1e-6)


def test_a_path_is_no_anndata():
    with pytest.raises(InputError, match="expected an AnnData, got str; read_context reads files"):
        Context.from_anndata("c.h5ad")


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_a_mask_of_any_separator(separator, tmp_path):
    mask = tmp_path / "m.csv"
    mask.write_text(separator.join(["barcode", "context"]) + f"\nspot1{separator}1\nspot0{separator}0\n")
    counts = Context(["spot0", "spot1"], [[1.0], [2.0]], ["GENE0"])
    assert choose_spots(counts, SLIDE, str(mask)).ids == ["spot1"]


def test_an_anndata_in_memory_is_the_context_that_its_file_is(tmp_path):
    counts = sparse.random(4, 3, 0.5, "csr", "f4", rng=0)
    counts.data = np.ceil(counts.data * 9)
    obs, var = pd.DataFrame(index=["spot1", "spot0", "spot3", "spot5"]), pd.DataFrame(index=["GENE1", "GENE0", "GENE4"])
    adata = AnnData(counts, obs=obs, var=var, layers={"twice": 2 * counts})
    adata.write_h5ad(tmp_path / "c.h5ad")
    backed = anndata.read_h5ad(tmp_path / "c.h5ad", backed="r")
    expected = read_context(tmp_path / "c.h5ad").resolve(SLIDE, GENES)
    for held in (adata, adata[:, :], backed):
        rows = Context.from_anndata(held).resolve(SLIDE, GENES)
        np.testing.assert_array_equal(rows.spots, expected.spots)
        np.testing.assert_array_equal(rows.log_counts.toarray(), expected.log_counts.toarray())
    twice = Context.from_anndata(adata, layer="twice").resolve(SLIDE, GENES).log_counts.toarray()
    np.testing.assert_allclose(np.expm1(twice), 2 * np.expm1(expected.log_counts.toarray()), rtol=1e-5)
    with pytest.raises(InputError, match="no layer 'twic' .did you mean twice"):
        Context.from_anndata(adata, layer="twic")
    with pytest.raises(InputError, match="holds no X"):
        Context.from_anndata(AnnData(obs=obs))


def test_counts_that_look_log_transformed_warn():
    with pytest.warns(InputWarning, match="not whole numbers"):
        Context([0], np.log1p([[1.0, 2.0]]), ["GENE0", "GENE1"]).resolve(SLIDE, GENES)


@pytest.mark.parametrize(
    ("ids", "counts", "genes", "message"),
    [
        ([0, 1], [[1.0]], ["GENE0"], r"\[1, 1\]; expected \[2 spots, 1 genes\]"),
        ([0], [[1.0, 2.0]], ["GENE0"], "expected"),
        (["spot9", "spot8"], [[1.0], [2.0]], ["GENE0"], "none of its 2 barcodes is in the slide, the first is 'spot9'"),
        (["spot1", "spot1"], [[1.0], [2.0]], ["GENE0"], "spot 'spot1' appears twice"),
        ([6], [[1.0]], ["GENE0"], "spot 6 is not in 0..5"),
        ([-1], [[1.0]], ["GENE0"], "spot -1"),
        ([1, 1], [[1.0], [2.0]], ["GENE0"], "twice"),
        ([1, "spot2"], [[1.0], [2.0]], ["GENE0"], "all barcodes or all integer"),
        ([True, False], [[1.0], [2.0]], ["GENE0"], "all barcodes or all integer"),
        ([0], [[-1.0]], ["GENE0"], "negative"),
        ([0], [[np.nan]], ["GENE0"], "NaN"),
        ([0], [[1.0]], ["FOO"], "none of its 1 genes"),
        ([0], np.zeros((1, 0)), [], "none of its 0 genes"),
        ([0], [["many"]], ["GENE0"], "not a matrix"),
        ([0], [[1j]], ["GENE0"], "not a matrix"),
        ([0], [[1.0]] * 5, "GENE0", "not one text"),
    ],
)
def test_a_faulty_context_is_refused(ids, counts, genes, message):
    with pytest.raises(InputError, match=message):
        Context(ids, np.array(counts), genes).resolve(SLIDE, GENES)


BARCODES = [f"spot{i}" for i in range(200)]
SECTION = Slide(np.random.default_rng(0).integers(0, 999, (200, 2)), np.ones((200, 3)), BARCODES, name="s2")
FULL = Context(
    BARCODES[::-1], np.arange(200)[::-1, None], ["GENE1"]
)  # in another order; the count is the spot's number


@pytest.mark.parametrize(("share", "spots"), [("5%", 10), ("20 %", 40), ("12.5%", 25)])
def test_a_share_by_the_published_rule(share, spots):
    found = choose_spots(FULL, SECTION, share)
    assert len(found.ids) == spots
    rightmost = SECTION.coords[np.argmax(SECTION.coords[:, 0])]
    distance = np.linalg.norm(SECTION.coords - rightmost, axis=1)
    assert set(found.ids) == {BARCODES[i] for i in np.argsort(distance)[-spots:]}
    assert [f"spot{int(count)}" for count in found.counts.toarray()[:, 0]] == list(found.ids)


def test_spots_by_name_and_by_mask(tmp_path):
    names, mask = tmp_path / "names.txt", tmp_path / "mask.csv"
    names.write_text("spot7\nspot3\n")
    mask.write_text("barcode,x,context\nspot7,0,1\nspot3,0,True\nspot4,0,false\nspot5,0,0\n")
    for which in ("spot7,spot3", str(names), str(mask)):
        found = choose_spots(FULL, SECTION, which)
        assert list(found.ids) == ["spot7", "spot3"]
        np.testing.assert_array_equal(found.counts.toarray(), [[7], [3]])


def test_a_share_of_one_spot_is_that_spot():
    one = Slide([[3, 4]], np.ones((1, 3)), ["spot7"])
    assert choose_spots(FULL, one, "5%").ids == ["spot7"]


def test_a_list_longer_than_the_name_of_a_file():
    assert choose_spots(FULL, SECTION, ",".join(BARCODES)).ids == BARCODES


def test_a_spot_that_has_two_rows_of_counts_is_refused():
    twice = Context(["spot1", "spot2", "spot1"], [[1], [2], [3]], ["GENE1"])
    with pytest.raises(InputError, match="context of s2: spot 'spot1' appears twice"):
        choose_spots(twice, SECTION, "spot1,spot2")


def test_spots_without_counts_are_told_of():
    few = Context(BARCODES[:150], np.ones((150, 1)), ["GENE1"])
    with pytest.warns(InputWarning, match="of the 100 spots that 50% chooses have no counts"):
        found = choose_spots(few, SECTION, "50%")
    assert 0 < len(found.ids) < 100


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("0%", "above 0% and below 100%"),
        ("100%", "above 0% and below 100%"),
        ("spot1,spotx", "1 of 2 barcodes have no counts, the first is 'spotx'"),
        (",", "names no barcode"),
        ("missing.csv", "no such file"),
    ],
)
def test_choices_that_are_none(which, message):
    with pytest.raises(InputError, match=message):
        choose_spots(FULL, SECTION, which)


def test_a_share_of_which_no_spot_has_counts():
    elsewhere = Context(["spot-x"], np.ones((1, 1)), ["GENE1"])
    with pytest.warns(InputWarning), pytest.raises(InputError, match="5% chooses no spot that has counts"):
        choose_spots(elsewhere, SECTION, "5%")


@pytest.mark.parametrize(
    "text", ["spot,context\nspot1,1\n", "barcode,context\nspot1,maybe\n", "barcode,context\nspot1\n", ""]
)
def test_files_that_are_no_mask(text, tmp_path):
    (tmp_path / "mask.csv").write_text(text)
    with pytest.raises(InputError, match="not a mask|chooses no spot"):
        choose_spots(FULL, SECTION, str(tmp_path / "mask.csv"))
