"""The training store: what goes in comes out, in spatial order, and faults are named."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import an_adata, made_up_vocabulary
from stpath_runtime.errors import InputError
from stpath_train.store import Failure, Record, Store, Task, highly_variable, measured, open_slide


@pytest.fixture
def vocabulary():
    return made_up_vocabulary(40)


@pytest.fixture
def store(tmp_path, vocabulary) -> Store:
    made = Store.create(tmp_path / "store", vocabulary)
    made.add(Record("A", "Breast", "Visium", patient="p1"), an_adata(vocabulary))
    made.add(Record("B", "Kidney", "", counts="log1p"), an_adata(vocabulary, seed=1))
    return Store.open(made.path)


def test_a_slide_comes_back_as_it_went_in(store, vocabulary):
    given_in, found = an_adata(vocabulary), store.read("A")
    assert set(found.obs_names) == set(given_in.obs_names)
    same = given_in[found.obs_names]
    assert (found.X != same.X).nnz == 0
    np.testing.assert_array_equal(found.obsm["spatial"], same.obsm["spatial"])
    np.testing.assert_array_equal(found.obsm["features"], same.obsm["features"])
    assert store.records["A"] == Record("A", "Breast", "Visium", patient="p1", spots=130, genes=12)
    assert store.n_features == 6


def test_near_spots_are_near_in_the_file(store):
    coords = store.read("A").obsm["spatial"].astype(float)
    step = np.linalg.norm(np.diff(coords, axis=0), axis=1)
    shuffled = np.random.default_rng(0).permutation(coords)
    assert np.median(step) < np.median(np.linalg.norm(np.diff(shuffled, axis=0), axis=1))


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, 129), min_size=1))
def test_rows_are_read_whatever_their_gaps(tmp_path_factory, spots):
    vocabulary = made_up_vocabulary(40)
    path = tmp_path_factory.getbasetemp() / "rows"
    if not path.exists():
        Store.create(path, vocabulary).add(Record("A", "Breast", "Visium"), an_adata(vocabulary))
    store = Store.open(path)
    rows, whole = np.array(sorted(spots)), store.read("A")
    features, log_counts = open_slide(store, "A").read(rows)
    np.testing.assert_array_equal(features, whole.obsm["features"][rows])
    np.testing.assert_array_equal(log_counts.toarray(), np.log1p(whole.X[rows].toarray()))


def test_counts_that_are_log_transformed_stay_so(store):
    whole, slide = store.read("B"), open_slide(store, "B")
    np.testing.assert_array_equal(slide.read(np.arange(5))[1].toarray(), whole.X[:5].toarray())
    context = store.as_context(whole, "B", np.arange(5))
    np.testing.assert_array_equal(context.counts.toarray(), np.rint(np.expm1(whole.X[:5].toarray())))


def test_names_of_one_gene_are_merged_by_the_maximum(vocabulary):
    counts = [[1, 5, 0, 2], [4, 0, 3, 0]]
    found = measured(counts, ["GENE3", "ALIAS3", "unheard of", "GENE1"], vocabulary, "slide")
    assert list(found.var["symbol"]) == ["GENE1", "GENE3"]
    np.testing.assert_array_equal(found.X.toarray(), [[2, 5], [0, 4]])


def test_highly_variable_genes_are_among_those_that_many_spots_have():
    vocabulary, rng = made_up_vocabulary(402), np.random.default_rng(0)
    counts = rng.poisson(3, (300, 400))
    counts[:, 2] = 3 * rng.integers(0, 3, 300)  # of a like mean, and more variance
    counts[:, 5] = 0
    counts[:29, 5] = 30  # varies, but in too few spots
    adata = measured(counts, vocabulary.symbols, vocabulary, "slide")
    chosen = highly_variable(adata, 20, adata.X.log1p())
    assert chosen.sum() == 20
    assert chosen[2]
    every = highly_variable(adata, 399, adata.X.log1p())
    assert list(np.flatnonzero(~every)) == [5]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda s: Store.create(s.path, made_up_vocabulary(41)), "a store of another vocabulary"),
        (lambda s: Store.create(s.path / "slides", s.vocabulary), "is not a training store"),
        (lambda s: Store.open(s.path / "nowhere"), "not a training store"),
        (lambda s: s.read("a"), "no slide 'a' .did you mean A"),
        (lambda s: s.task("IDC"), "no task 'IDC'; it has none"),
        (lambda s: s.add(Record("C", "Lung", ""), an_adata(s.vocabulary, features=5)), "5 wide, those of the store 6"),
        (lambda s: Record("../x", "Lung", ""), "cannot name a slide"),
        (lambda s: Record("x", "Lnug", ""), "unknown organ 'Lnug'"),
        (lambda s: measured([[1.0]], ["no gene"], s.vocabulary, "x"), "none of its 1 genes is known"),
        (lambda s: measured([[-1.0]], ["GENE1"], s.vocabulary, "x"), "negative"),
    ],
)
def test_faults_are_named(store, fault, message):
    with pytest.raises(InputError, match=message):
        fault(store)


def test_a_changed_vocabulary_or_a_damaged_slide_is_refused(store):
    store.slide_path("A").write_bytes(b"not HDF5")
    with pytest.raises(InputError, match="prepare it again"):
        open_slide(store, "A")
    with pytest.raises(InputError, match="prepare the slide again"):
        store.read("A")
    made_up_vocabulary(30).write(store.path / "genes.tsv.gz")
    with pytest.raises(InputError, match="not the vocabulary"):
        Store.open(store.path)


def test_tasks_and_failures_are_kept(store):
    task = Task(["GENE1"], [{"train": ["A"], "test": ["B"]}])
    store.add_task("IDC", task)
    assert store.task("IDC") == task
    store.write_failures({"C": Failure("gene", "no gene")})
    assert (store.path / "failures.csv").read_text() == "slide,code,reason\nC,gene,no gene\n"
    store.write_failures({})
    assert not (store.path / "failures.csv").exists()
