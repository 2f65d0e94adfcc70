"""`stpath evaluate`: each task's files against figures computed here, and one line for each fault."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from evaluation_helpers import GENES, fill_store
from scipy.stats import spearmanr
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from helpers import made_up_vocabulary
from stpath_runtime.slides.context import masked_spots
from stpath_train.evaluation.clustering import leiden_clusters
from stpath_train.evaluation.predictor import CheckpointPredictor
from stpath_train.evaluation.results import Evaluation, write_evaluation
from stpath_train.store import Record, Store, Task

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def predictor(store, tiny_checkpoint) -> CheckpointPredictor:
    return CheckpointPredictor(tiny_checkpoint, store.vocabulary)


@pytest.fixture
def of_slide(store, predictor):
    """Measured and predicted expression of GENES on a slide, with every n-th spot as context where n is given."""

    def give(name: str, context_spots=None) -> tuple[np.ndarray, np.ndarray]:
        adata = store.read(name)
        context = store.as_context(adata, name, context_spots) if context_spots is not None else None
        embedding = predictor.embed(store.as_slide(adata, name), context=context)
        ids = store.vocabulary.gene_ids(store.vocabulary.tokens(GENES))
        return np.log1p(adata.to_df()[ids].to_numpy()), predictor.decode(embedding, GENES)

    return give


def mean_pearson(truth, predicted) -> float:
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(truth.T, predicted.T, strict=True)]))


def read_results(result) -> tuple[dict, pd.DataFrame]:
    """The JSON and the table of an evaluation that went well, with all its pictures."""
    code, out, err, folder = result
    assert code == 0, err
    report = json.loads((folder / "results.json").read_text())
    assert report["task"] in out
    assert {path.name for path in folder.iterdir()} == {"results.json", "results.csv", *report["pictures"]}
    assert report["pictures"]
    assert all((folder / name).read_bytes().startswith(PNG) for name in report["pictures"])
    assert len(report["model"]["checkpoint"]) == 64
    assert report["seed"] == 0
    assert "scipy" in report["versions"]
    return report, pd.read_csv(folder / "results.csv")


def figure(report: dict, **about) -> dict:
    (found,) = [row for row in report["figures"] if about.items() <= row.items()]
    return found


def test_expression_by_both_protocols(evaluate, of_slide):
    report, table = read_results(evaluate("expression", "--benchmark", "TINY", "--baselines"))
    parts = {name: of_slide(name) for name in ("S0", "S3", "S4")}
    truth, predicted = (np.concatenate([parts[name][i] for name in ("S3", "S4", "S0")]) for i in range(2))
    pooled = figure(report, protocol="pooled")
    assert pooled["value"] == pytest.approx(mean_pearson(truth, predicted), abs=1e-6)
    assert pooled["low"] < pooled["value"] < pooled["high"]
    assert pooled["spots"] == 192
    both = mean_pearson(*(np.concatenate([parts["S3"][i], parts["S4"][i]]) for i in range(2)))
    by_fold = [both, mean_pearson(*parts["S0"])]
    folds = figure(report, protocol="folds", predictor="model", metric="Pearson")
    assert (folds["value"], folds["std"]) == pytest.approx((np.mean(by_fold), np.std(by_fold)), abs=1e-6)
    # A constant has no correlation: of 6 genes in 2 folds none is defined.
    constant = figure(report, protocol="folds", predictor="mean", metric="Pearson")
    assert (constant["value"], constant["undefined_genes"]) == (None, 12)
    assert figure(report, predictor="ridge", metric="Pearson")["value"] > 0.2
    assert set(report["protocols"]) >= {"pooled", "folds"}
    assert len(table) == 6 + 3 * 2 * 6  # genes pooled, and of three predictors in two folds
    assert set(table["fold"].dropna()) == {"fold 0", "S0"}


def test_each_slide_named_is_a_fold_and_the_run_repeats(evaluate):
    words = ("expression", "--genes", "GENE0,GENE1", "--slides", "S1,S2", "--train-slides", "S3,S4", "--baselines")
    first, second = (evaluate(*words, out=out) for out in ("a", "b"))
    report, table = read_results(first)
    assert figure(report, protocol="folds", predictor="model", metric="Pearson")["folds"] == 2
    assert report["slides"] == ["S1", "S2"]
    assert set(table["fold"].dropna()) == {"S1", "S2"}
    for name in ("results.json", "results.csv"):
        assert (first[3] / name).read_bytes() == (second[3] / name).read_bytes()


def test_an_engine_is_evaluated_as_its_checkpoint(evaluate, tiny_engine):
    words = ("expression", "--genes", ",".join(GENES), "--slides", "S0,S1")
    by_checkpoint, _ = read_results(evaluate(*words, out="a"))
    by_engine, _ = read_results(evaluate(*words, out="b", model=("--engine", tiny_engine)))
    assert len(by_engine["model"]["engine"]) == 64
    for a, b in zip(by_checkpoint["figures"], by_engine["figures"], strict=True):
        assert a["value"] == pytest.approx(b["value"], abs=1e-4)


def test_imputation_scores_the_masked_spots_only(evaluate, store, of_slide):
    report, table = read_results(evaluate("imputation", "--genes", ",".join(GENES), "--slides", "S1,S2"))
    parts = []
    for name in ("S1", "S2"):
        masked = masked_spots(store.read(name).obsm["spatial"], 0.9)
        truth, predicted = of_slide(name, np.setdiff1d(np.arange(64), masked))
        parts.append((truth[masked], predicted[masked]))
    pooled = figure(report, protocol="pooled", masked=0.9, context="the other spots")
    expected = mean_pearson(*(np.concatenate([part[i] for part in parts]) for i in range(2)))
    assert pooled["value"] == pytest.approx(expected, abs=1e-6)
    assert pooled["spots"] == 2 * int(0.9 * 64)
    over = figure(report, protocol="slides", masked=0.9, context="the other spots")
    by_slide = [mean_pearson(*part) for part in parts]
    assert (over["value"], over["std"]) == pytest.approx((np.mean(by_slide), np.std(by_slide)), abs=1e-6)
    truth, predicted = of_slide("S1")
    masked = masked_spots(store.read("S1").obsm["spatial"], 0.9)
    without = table[(table["slide"] == "S1") & (table["masked"] == 0.9) & (table["context"] == "none")]
    assert without["pearson"].mean() == pytest.approx(mean_pearson(truth[masked], predicted[masked]), abs=1e-6)
    assert len(table) == 2 * 3 * 2 * 6  # slides, shares, with and without context, genes
    assert "map_S1.png" in report["pictures"]


def test_clustering_of_marked_spots_against_the_regions(evaluate, store, predictor):
    report, table = read_results(evaluate("clustering", "--slides", "S0", "--regions", "region"))
    assert set(table["input"]) == {"measured", "predicted", "embedding"}
    assert set(table["spots"]) == {61}  # three are not marked
    adata = store.read("S0")
    clusters = leiden_clusters(predictor.embed(store.as_slide(adata, "S0")), seed=0)
    marked = adata.obs["region"].notna().to_numpy()
    expected = adjusted_rand_score(adata.obs["region"][marked].astype(str), clusters[marked])
    assert figure(report, input="embedding", metric="ARI")["value"] == pytest.approx(expected)
    assert figure(report, input="measured", metric="homogeneity")["value"] > 0.8
    assert "resolution 1.0" in report["protocols"]["clusters"]


def test_biomarkers_follow_the_measured_genes_and_the_region(evaluate, store, of_slide):
    words = ("--genes", "GENE0,GENE5", "--slides", "S0,S1", "--regions", "region", "--positive", "tumour")
    report, table = read_results(evaluate("biomarkers", *words))
    scores = table.set_index(["slide", "gene", "metric"])["value"]
    truth, predicted = of_slide("S1")
    assert scores["S1", "GENE5", "Spearman"] == pytest.approx(spearmanr(truth[:, 5], predicted[:, 5])[0], abs=1e-6)
    assert scores["S1", "GENE5", "Pearson"] == pytest.approx(np.corrcoef(truth[:, 5], predicted[:, 5])[0, 1], abs=1e-6)
    regions = store.read("S1").obs["region"]
    marked = regions.notna().to_numpy()
    for kind, values in (("predicted", predicted), ("measured", truth)):
        expected = roc_auc_score(regions[marked] == "tumour", values[marked, 5])
        assert scores["S1", "GENE5", f"AUC, {kind}"] == pytest.approx(expected)
    mean = np.mean([scores[slide, "GENE0", "Pearson"] for slide in ("S0", "S1")])
    assert figure(report, gene="GENE0", metric="Pearson")["value"] == pytest.approx(mean)
    without, _ = read_results(evaluate("biomarkers", "--genes", "GENE0", "--slides", "S0", out="no region"))
    assert without["pictures"] == ["scores.png"]


@pytest.mark.parametrize("genes", [(), ("--genes", ",".join(GENES))])
def test_classification_of_slides_left_out(evaluate, genes):
    report, table = read_results(evaluate("classification", "--folds", "3", *genes))
    pooled = figure(report, protocol="pooled")
    expected = roc_auc_score(table["label"] == "malignant", table["probability malignant"])
    assert pooled["value"] == pytest.approx(expected)
    assert sorted(table["fold"].value_counts()) == [2, 2, 2]
    assert ("6 genes" in pooled["input"]) == bool(genes)


def test_an_earlier_evaluation_in_the_folder_makes_room(evaluate):
    read_results(evaluate("biomarkers", "--genes", "GENE0", "--slides", "S0"))
    report, _ = read_results(evaluate("expression", "--genes", "GENE0,GENE1", "--slides", "S0"))
    assert report["pictures"] == ["pearson.png"]


def test_simulated_slides_are_called_so(tiny, tiny_checkpoint, evaluate, tmp_path):
    from matplotlib.figure import Figure

    made = fill_store(tmp_path / "s", tiny.vocabulary, tiny.model.config.n_features, "Simulated from BSD", slides=1)
    result = evaluate("biomarkers", "--genes", "GENE0", data=made.path)
    assert "biomarkers (simulated)" in result[1]
    assert read_results(result)[0]["note"] == "simulated"
    picture = Figure()
    picture.suptitle("2 slides")
    write_evaluation(Evaluation("x", {}, [{}], [], {"a.png": picture}), tmp_path / "out2", {}, simulated=True)
    assert picture.get_suptitle() == "2 slides (simulated)"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("expresion --genes GENE0", ("expresion", "expression")),
        ("expression", ("needs genes", "--benchmark")),
        ("expression --benchmark TINI", ("no task 'TINI'", "TINY")),
        ("expression --benchmark TINY --genes GENE0", ("--genes beside --benchmark",)),
        ("expression --genes GENE0,NOGENE", ("unknown gene", "NOGENE")),
        ("expression --genes GENE0,GENE150", ("slide S0: 1 of 2 genes were not measured on it: GENE150",)),
        ("expression --genes , --slides S0", ("names no gene",)),
        ("expression --genes GENE0 --slides S0,s1", ("no slide 's1'", "S1")),
        ("expression --genes GENE0 --slides ,", ("names no slide",)),
        ("expression --genes GENE0 --baselines", ("need slides to learn from", "--train-slides")),
        ("expression --genes GENE0 --train-slides S1", ("add --baselines",)),
        ("expression --genes GENE0 --slides S1 --train-slides S1 --baselines", ("'S1'", "keep it on one side")),
        ("expression --genes GENE0 --regions region", ("--regions is not an option of expression", "clustering")),
        ("clustering", ("needs the regions", "--regions")),
        ("clustering --regions regions", ("slide S0: no obs column 'regions'", "did you mean region?", "everywhere")),
        ("clustering --regions everywhere", ("slide S0", "holds only 'tumour'")),
        ("clustering --regions region --genes GENE0", ("two genes or more",)),
        ("biomarkers", ("needs the markers",)),
        ("biomarkers --genes GENE0 --regions region", ("--positive", "both or neither")),
        ("biomarkers --genes GENE0 --regions region --positive tumor", ("--positive tumor: no slide", "tumour")),
        (
            "biomarkers --genes GENE0 --regions everywhere --positive tumour",
            ("every marked spot", "inside and outside"),
        ),
        ("classification --folds 4", ("label 'benign': 3 patients for 4 folds",)),
        ("classification --folds 1", ("2 folds or more",)),
        ("classification --slides S0,S2 --folds 2", ("all 2 slides have the label 'benign'",)),
    ],
)
def test_faults_are_one_line_and_leave_nothing(line, words, evaluate):
    task, *rest = line.split()
    assert_refused(evaluate(task, *rest), *words)


def assert_refused(result, *words):
    code, out, err, folder = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error[")
    assert err.count("\n") == 1, err
    assert not folder.exists()
    for word in words:
        assert word in err


def test_one_model_is_evaluated(evaluate, tiny_engine, tiny_checkpoint):
    words = ("expression", "--genes", "GENE0")
    assert_refused(evaluate(*words, model=()), "give one model")
    both = ("--engine", tiny_engine, "--checkpoint", tiny_checkpoint)
    assert_refused(evaluate(*words, model=both), "give one model")


def test_stores_that_cannot_be_evaluated_are_refused(evaluate, tiny, tmp_path):
    width = tiny.model.config.n_features
    other = fill_store(tmp_path / "other", made_up_vocabulary(60), width, slides=1)
    assert_refused(evaluate("expression", "--genes", "GENE0", data=other.path), "202 gene tokens", "has 60")
    narrow = fill_store(tmp_path / "narrow", tiny.vocabulary, 8, slides=1)
    assert_refused(evaluate("expression", "--genes", "GENE0", data=narrow.path), f"features {width} wide")
    empty = Store.create(tmp_path / "empty", tiny.vocabulary)
    empty.n_features = width
    empty._write_index()
    for task in ("expression", "biomarkers"):
        assert_refused(evaluate(task, "--genes", "GENE0", data=empty.path), "no test slide")


def test_slides_of_one_patient_or_without_labels_are_refused(evaluate, store, tiny, tmp_path):
    made = fill_store(tmp_path / "made", tiny.vocabulary, tiny.model.config.n_features, slides=1)
    made.add(Record("T", "Kidney", "Visium", patient="p0"), store.read("S1"))
    made.records["S0"] = Record("S0", "Kidney", "Visium", patient="p0", spots=64, genes=40)
    made.add_task("BAD", Task(["GENE0"], [{"train": ["S0"], "test": ["T", "S0"]}]))
    made.add_task("NONE", Task(["GENE0"], [{"train": ["S0"], "test": []}]))
    made._write_index()
    words = ("expression", "--genes", "GENE0", "--slides", "T", "--train-slides", "S0", "--baselines")
    assert_refused(evaluate(*words, data=made.path), "of one patient, 'p0'")
    assert_refused(evaluate("expression", "--benchmark", "BAD", data=made.path), "'S0' on both sides")
    assert_refused(evaluate("expression", "--benchmark", "NONE", data=made.path), "no test slide")
    assert_refused(evaluate("classification", data=made.path), "no slide has a label")


def test_genes_that_are_constant_are_counted_or_refused(evaluate, tiny, tmp_path):
    made = fill_store(tmp_path / "made", tiny.vocabulary, tiny.model.config.n_features, slides=1)
    adata = made.read("S0")
    adata.X = adata.X.multiply(np.arange(40) >= 2).tocsr()  # no counts of the first two genes
    made.add(made.records["S0"], adata)
    report, _ = read_results(evaluate("expression", "--genes", "GENE0,GENE1,GENE2", data=made.path))
    pooled = figure(report, protocol="pooled")
    assert pooled["undefined_genes"] == 2
    assert np.isfinite(pooled["value"])
    report, _ = read_results(evaluate("expression", "--genes", "GENE0,GENE1", data=made.path))
    assert figure(report, protocol="pooled")["value"] is None
    words = ("clustering", "--regions", "region", "--genes", "GENE0,GENE1")
    assert_refused(evaluate(*words, data=made.path, out="none"), "measured values are the same at every spot")


def test_results_are_not_written_over_other_things(evaluate, tmp_path):
    words = ("expression", "--genes", "GENE0,GENE1", "--slides", "S0")
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    for name, message in (("taken", "a file is there"), ("folder", "holds something else")):
        code, out, err, _ = evaluate(*words, out=name)
        assert (code, out) == (2, "")
        assert message in err
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes"]
