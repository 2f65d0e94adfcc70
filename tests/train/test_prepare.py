"""Public data sets as they are downloaded: what is in the files is in the store, and a faulty slide stops no run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from helpers import made_up_vocabulary, write_slide
from stpath_runtime.cli.app import main
from stpath_runtime.errors import InputError, InputWarning
from stpath_runtime.slides.slide import Slide
from stpath_train.prepare import LOCK, Options, prepare, prepare_slide
from stpath_train.sources import Layout, Source
from stpath_train.store import Store, highly_variable

GENES = 30
VOCABULARY = made_up_vocabulary(GENES + 2)
HEST_CSV = (
    "dataset_title,id,image_filename,organ,disease_state,oncotree_code,species,patient,st_technology,nb_genes\n"
    '"Kidney, of mice",INT1,INT1.tif,Kidney,Cancer,CCRCC,Homo sapiens,Patient 1,Visium,12\n'
    "FFPE Breast,TENX2,TENX2.tif,Breast,Healthy,,Homo sapiens,,Xenium,12\n"
    "Old,MEND3,MEND3.tif,Prostate,Healthy,,Mus musculus,Patient 1,Spatial Transcriptomics,12\n"
)
HEST_SLIDES = ("INT1", "TENX2", "MEND3")


def expression(seed: int, spots: int = 9) -> pd.DataFrame:
    """Raw counts [spots, 14]: 12 genes of the vocabulary, one of them by two names, and one that it lacks."""
    rng = np.random.default_rng(seed)
    names = [*rng.choice(np.array(VOCABULARY.symbols[1:]), 12, replace=False), "BLANK_0001"]
    names.append("ALIAS" + names[0].removeprefix("GENE"))
    barcodes = [f"AAAC{seed}{i:03d}-1" for i in range(spots)]
    return pd.DataFrame(1 + rng.poisson(2, (spots, len(names))), barcodes, names)


def write_h5ad(table: pd.DataFrame, path: Path, **uns) -> Path:
    """Counts as HEST-1k has them."""
    rng = np.random.default_rng(len(table))
    obs = pd.DataFrame({"in_tissue": True, "array_row": range(len(table))}, index=table.index)
    obs["region"] = rng.choice(["tumor", "stroma"], len(table))
    adata = AnnData(csr_matrix(table.to_numpy(np.float32)), obs, pd.DataFrame(index=table.columns), uns=uns)
    adata.obsm["spatial"] = rng.integers(0, 5000, (len(table), 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(path)
    return path


def write_features(barcodes, path: Path, width: int = 5) -> Path:
    """Features of a spot that tell its barcode: the first is its place in `barcodes`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(barcodes))
    features = rng.standard_normal((len(barcodes), width)).astype(np.float32)
    features[:, 0] = np.arange(len(barcodes))
    coords = rng.permutation(len(barcodes) * 2).reshape(-1, 2) * 100
    return write_slide(Slide(coords, features, list(barcodes)), path)


def write_hest(folder: Path) -> dict[str, pd.DataFrame]:
    """HEST-1k of three slides, and their features in `features`: the counts of each."""
    (folder / "st").mkdir(parents=True)
    (folder / "HEST_v1_0_0.csv").write_text("id,organ,st_technology\n")
    (folder / "HEST_v1_1_0.csv").write_text(HEST_CSV)
    tables = {slide: expression(seed) for seed, slide in enumerate(HEST_SLIDES)}
    for slide, table in tables.items():
        write_h5ad(table, folder / "st" / f"{slide}.h5ad")
        write_features(list(table.index)[::-1], folder / "features" / f"{slide}.h5")
    return tables


def write_bench(folder: Path) -> dict[str, pd.DataFrame]:
    tables = {slide: expression(seed) for seed, slide in enumerate(HEST_SLIDES)}
    for slide, table in tables.items():
        write_h5ad(table, folder / "KIDNEY" / "adata" / f"{slide}.h5ad")
        write_features(list(table.index)[::-1], folder / "features" / f"{slide}.h5")
    (folder / "HEST_v1_1_0.csv").write_text(HEST_CSV)
    splits = folder / "KIDNEY" / "splits"
    splits.mkdir()
    (folder / "KIDNEY" / "var_50genes.json").write_text(json.dumps({"genes": ["GENE1", "GENE2"]}))
    row = "{0},patches/{0}.h5,adata/{0}.h5ad\n"
    for fold, (test, *train) in enumerate([("INT1", "TENX2", "MEND3"), ("MEND3", "INT1")]):
        for side, slides in (("train", train), ("test", [test])):
            text = "sample_id,patches_path,expr_path\n" + "".join(row.format(slide) for slide in slides)
            (splits / f"{side}_{fold}.csv").write_text(text)
    return tables


def write_stimage(folder: Path) -> dict[str, pd.DataFrame]:
    """STImage-1K4M of three slides; the first has annotations."""
    slides = {"Human_Breast_Andersson_10142021_ST_A1": "ST", "GSE144239_GSM1": "Visium", "Mouse_10X": "VisiumHD"}
    tables = {}
    (folder / "meta").mkdir(parents=True)
    header = '"slide","species","tissue","pmid","title","tech","spot_num","gene_num"\n'
    rows = [f'"{s}","human","kidney","3257,3803","Title, 1","{tech}","9","14"\n' for s, tech in slides.items()]
    (folder / "meta" / "meta_all_gene.csv").write_text(header + "".join(rows))
    for seed, (slide, technology) in enumerate(slides.items()):
        table = expression(seed)
        table.index = [f"{slide}_{1 + i // 3}x{1 + i % 3}" for i in range(len(table))]
        for part in ("gene_exp", "coord"):
            (folder / technology / part).mkdir(parents=True)
        table.to_csv(folder / technology / "gene_exp" / f"{slide}_count.csv")
        coords = pd.DataFrame({"yaxis": 1.5, "xaxis": np.arange(9.0), "r": 54.3}, table.index)
        coords.to_csv(folder / technology / "coord" / f"{slide}_coord.csv")
        write_features(list(table.index)[::-1], folder / "features" / f"{slide}.h5")
        tables[slide] = table
    (folder / "annotation").mkdir()
    first = next(iter(slides))
    labels = pd.Series("cancer", tables[first].index[:4], name="label")
    labels.to_csv(folder / "annotation" / f"{first}_anno.csv")
    return tables


def write_stpath(folder: Path) -> dict[str, pd.DataFrame]:
    tables = {slide: expression(seed) for seed, slide in enumerate(HEST_SLIDES)}
    for slide, table in tables.items():
        write_h5ad(table, folder / f"{slide}.h5ad")
        write_features(list(table.index)[::-1], folder / f"{slide}.h5")
    rows = "".join(f"{slide},Kidney,Visium,p{i}\n" for i, slide in enumerate(tables))
    (folder / "metadata.csv").write_text("id,organ,technology,patient\n" + rows)
    return tables


WRITE = {"hest": write_hest, "hest-bench": write_bench, "stimage": write_stimage, "stpath": write_stpath}


@pytest.fixture
def genes(tmp_path) -> Path:
    VOCABULARY.write(tmp_path / "genes.tsv.gz")
    return tmp_path / "genes.tsv.gz"


@pytest.fixture
def run(tmp_path, genes):
    """Prepare the slides of a folder of HEST-1k."""

    def prepared(layout="hest", **options):
        source, features = tmp_path / layout, None if layout == "stpath" else tmp_path / layout / "features"
        options = {"features": features, "genes": genes, "hvg": 4} | options
        return prepare(source, layout, tmp_path / "store", **options)

    return prepared


def expected(table: pd.DataFrame) -> pd.DataFrame:
    """What the store is to hold: by symbol, the highest of several names of one gene."""
    known = {name: VOCABULARY.find(name) for name in table}
    columns = {}
    for name, token in known.items():
        if token is not None:
            symbol = VOCABULARY.names([token])[0]
            columns[symbol] = np.maximum(columns.get(symbol, 0), table[name])
    return pd.DataFrame(columns, table.index)


@pytest.mark.parametrize("layout", [layout.value for layout in Layout])
def test_what_is_in_the_files_is_in_the_store(tmp_path, run, layout):
    tables = WRITE[layout](tmp_path / layout)
    summary = run(layout)
    assert not summary.failed
    store = Store.open(tmp_path / "store")
    assert set(store.records) == set(tables)
    for slide, table in tables.items():
        found, exact = store.read(slide), expected(table)
        assert set(found.obs_names) == set(table.index)
        got = pd.DataFrame(found.X.toarray(), found.obs_names, found.var["symbol"])
        np.testing.assert_array_equal(got.loc[exact.index, exact.columns], exact)
        np.testing.assert_array_equal(found.var["highly_variable"], highly_variable(found, 4, found.X.log1p()))
        place = {barcode: i for i, barcode in enumerate(list(table.index)[::-1])}
        assert list(found.obsm["features"][:, 0]) == [place[barcode] for barcode in found.obs_names]
        assert (store.records[slide].spots, store.records[slide].genes) == (9, 12)


def test_the_metadata_of_hest(tmp_path, run):
    write_hest(tmp_path / "hest")
    run(label="oncotree_code")
    records = Store.open(tmp_path / "store").records
    assert [records[slide].organ for slide in HEST_SLIDES] == ["Kidney", "Breast", "Prostate"]
    assert [records[slide].technology for slide in HEST_SLIDES] == ["Visium", "Xenium", "Spatial Transcriptomics"]
    # Patient 1 of one data set is not Patient 1 of another.
    assert [records[slide].patient for slide in HEST_SLIDES] == ["Kidney, of mice: Patient 1", "", "Old: Patient 1"]
    first = records["INT1"]
    assert (first.species, first.source, first.label) == ("Homo sapiens", "Kidney, of mice", "CCRCC")


def test_the_metadata_and_tables_of_stimage(tmp_path, run):
    slides = list(write_stimage(tmp_path / "stimage"))
    run("stimage")
    store = Store.open(tmp_path / "store")
    found = [store.records[slide] for slide in slides]
    assert [record.technology for record in found] == ["Spatial Transcriptomics", "Visium", "Visium HD"]
    assert {(record.organ, record.source, record.patient) for record in found} == {("Kidney", "PMID 3257,3803", "")}
    obs = store.read(slides[0]).obs
    assert (obs["label"] == "cancer").sum() == 4
    assert obs["r"].to_list() == [54.3] * 9
    assert "label" not in store.read(slides[1]).obs


def test_annotations_are_kept_and_what_cannot_be_written_is_not(tmp_path):
    table = expression(0)
    counts = write_h5ad(table, tmp_path / "a.h5ad")
    features = write_features(table.index, tmp_path / "a.h5")
    odd = tmp_path / "odd.csv"
    pd.DataFrame({"_index": "x", "score": 0.5, "region": "not this"}, table.index).to_csv(odd)
    adata = prepare_slide(Source("a", counts, features, tables=(odd,)), VOCABULARY, Options(Layout.HEST, 4))
    assert list(adata.obs) == ["in_tissue", "array_row", "region", "score"]
    assert set(adata.obs["region"]) == {"tumor", "stroma"}
    adata.write_h5ad(tmp_path / "again.h5ad")


@settings(max_examples=15, deadline=None)
@given(
    st.permutations(range(9)).flatmap(lambda order: st.integers(1, 9).map(lambda n: order[:n])),
    st.sets(st.integers(0, 11), min_size=1),
)
def test_spots_in_both_files_are_kept(tmp_path_factory, counted, imaged):
    folder = tmp_path_factory.mktemp("join")
    names = [f"spot{i}" for i in range(12)]
    table = expression(0)
    table.index = names[:9]
    table = table.iloc[list(counted)]
    counts = write_h5ad(table, folder / "a.h5ad")
    of_features = [names[i] for i in sorted(imaged)]
    features = write_features(of_features, folder / "a.h5")
    common = [name for name in of_features if name in table.index]
    source, options = Source("a", counts, features), Options(Layout.HEST, 4)
    if len(common) < 2:
        with pytest.raises(
            InputError, match=f"{len(common) or 'no'} barcode in common.*{table.index[0]}.*{of_features[0]}"
        ):
            prepare_slide(source, VOCABULARY, options)
        return
    adata = prepare_slide(source, VOCABULARY, options)
    assert list(adata.obs_names) == common
    exact = expected(table.loc[common])
    got = pd.DataFrame(adata.X.toarray(), adata.obs_names, adata.var["symbol"])
    np.testing.assert_array_equal(got[exact.columns], exact)
    assert list(adata.obsm["features"][:, 0]) == [of_features.index(name) for name in common]


def test_highly_variable_genes_of_the_file_come_first(tmp_path, run):
    tables = write_hest(tmp_path / "hest")
    table = tables["INT1"]
    named = [*table.columns[[3, 1]], "BLANK_0001", *table.columns[[5, 7, 9]]]
    write_h5ad(table, tmp_path / "hest" / "st" / "INT1.h5ad", raw_hvg_names=np.array(named))
    run(hvg=4)
    var = Store.open(tmp_path / "store").read("INT1").var
    assert set(var["symbol"][var["highly_variable"]]) == {named[0], named[1], named[3]}


def test_units_are_checked(tmp_path, run):
    tables = write_hest(tmp_path / "hest")
    logged = write_h5ad(np.log1p(tables["INT1"]), tmp_path / "hest" / "st" / "INT1.h5ad")
    assert "not whole numbers" in run().failed["INT1"].reason
    summary = run(counts="log1p")
    assert set(summary.failed) == {"TENX2", "MEND3"}
    assert "leave out --counts log1p" in summary.failed["TENX2"].reason
    store = Store.open(tmp_path / "store")
    assert store.records["INT1"].counts == "log1p"
    read = anndata.read_h5ad(logged)
    assert store.read("INT1").X.max() == read.X.max()


def test_a_slide_that_fails_stops_no_other(tmp_path, run):
    tables, folder = write_hest(tmp_path / "hest"), tmp_path / "hest"
    faults = {
        "none": (tables["INT1"].set_axis([f"BLANK_{i}" for i in range(14)], axis=1), "none of its 14 genes is known"),
        "zero": (tables["INT1"] * 0, "every count is 0"),
        "low": (tables["INT1"] - 20, "negative"),
        "twice": (pd.concat([tables["INT1"], tables["INT1"]]), "name spot 'AAAC0000-1' twice"),
        "nowhere": (tables["INT1"], "the metadata have no row of it"),
        "unheard": (tables["INT1"], "unknown organ 'Knee'"),
        "lacking": (tables["INT1"], "no features: "),
        "wide": (tables["INT1"], "features are 6 wide, those of the store 5"),
        "empty": (tables["INT1"].iloc[:0], "holds no counts"),
        "damaged": (tables["INT1"], "cannot be read"),
    }
    rows = ""
    for name, (table, _) in faults.items():
        path = write_h5ad(table, folder / "st" / f"z{name}.h5ad")
        if name == "damaged":
            path.write_bytes(path.read_bytes()[:2000])
        if name != "lacking":
            write_features(tables["INT1"].index, folder / "features" / f"z{name}.h5", 6 if name == "wide" else 5)
        if name != "nowhere":
            rows += f"T,z{name},,{'Knee' if name == 'unheard' else 'Kidney'},,,,,Visium,\n"
    (folder / "HEST_v1_1_0.csv").write_text(HEST_CSV + rows)
    summary = run()
    assert set(Store.open(tmp_path / "store").records) == set(HEST_SLIDES)
    assert set(summary.failed) == {f"z{name}" for name in faults}
    for name, (_, message) in faults.items():
        assert message in summary.failed[f"z{name}"].reason, name
    assert summary.failed["zwide"].code == "features"
    written = pd.read_csv(tmp_path / "store" / "failures.csv", index_col="slide")
    assert {slide: tuple(row) for slide, row in zip(written.index, written.to_numpy(), strict=True)} == summary.failed
    for name in faults:  # what is fixed, or gone, is no failure of the next run
        (folder / "st" / f"z{name}.h5ad").unlink()
    write_h5ad(tables["INT1"], folder / "st" / "zzero.h5ad")
    again = run()
    assert (again.failed, again.skipped, len(again.records)) == ({}, 3, 4)


def test_failures_of_another_data_set_are_kept(tmp_path, run):
    write_hest(tmp_path / "hest")
    (tmp_path / "hest" / "features" / "INT1.h5").unlink()
    run()
    write_stpath(tmp_path / "stpath")
    (tmp_path / "stpath" / "INT1.h5").rename(tmp_path / "stpath" / "other.h5")
    (tmp_path / "stpath" / "INT1.h5ad").rename(tmp_path / "stpath" / "other.h5ad")
    assert set(run("stpath").failed) == {"other"}
    assert list(pd.read_csv(tmp_path / "store" / "failures.csv")["slide"]) == ["INT1", "other"]


def test_what_is_there_and_unchanged_is_skipped(tmp_path, run):
    tables = write_hest(tmp_path / "hest")
    done = []
    run()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store" / "slides").iterdir()}
    os.utime(tmp_path / "hest" / "features" / "TENX2.h5", ns=(1, 1))
    summary = run(on_slide=lambda *counts: done.append(counts))
    assert (summary.skipped, len(summary.records), done) == (2, 3, [(3, 3)])
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "store" / "slides").iterdir()}
    assert {name for name in times if after[name] != times[name]} == {"TENX2.h5ad"}
    (tmp_path / "hest" / "HEST_v1_1_0.csv").write_text(HEST_CSV.replace("Kidney,Cancer", "Liver,Cancer"))
    assert run().skipped == 2
    assert Store.open(tmp_path / "store").records["INT1"].organ == "Liver"
    assert run(hvg=5).skipped == 0
    Store.open(tmp_path / "store").slide_path("INT1").unlink()
    assert run(hvg=5).skipped == 2
    assert set(Store.open(tmp_path / "store").read("INT1").obs_names) == set(tables["INT1"].index)


def test_a_run_that_was_killed_goes_on(tmp_path, genes, run):
    write_hest(tmp_path / "hest")
    killed = f"""
import os, signal
from stpath_train.prepare import prepare
from stpath_train.store import Store
index = Store.index
def until(self, record, at_once=True):  # the file of the second slide is written, and the index does not name it
    if self.records:
        os.kill(os.getpid(), signal.SIGKILL)
    index(self, record, at_once)
Store.index = until
prepare({str(tmp_path / "hest")!r}, "hest", {str(tmp_path / "store")!r},
        features={str(tmp_path / "hest" / "features")!r}, genes={str(genes)!r}, hvg=4)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    slides = tmp_path / "store" / "slides"
    assert len(list(slides.iterdir())) == 2
    assert len(Store.open(tmp_path / "store").records) == 1
    (slides / ".TENX2.h5ad.123.partial").write_text("half")
    summary = run()
    assert (summary.skipped, len(summary.records), summary.failed) == (1, 3, {})
    assert len(list(slides.iterdir())) == 3


def test_several_workers_write_the_same_store(tmp_path, genes, run):
    write_hest(tmp_path / "hest")
    (tmp_path / "hest" / "features" / "MEND3.h5").unlink()
    run()
    (tmp_path / "store").rename(tmp_path / "one")
    run(workers=2)
    for name in ("slides.csv", "store.json", "failures.csv"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "store" / name).read_text(), name
    one, two = (Store.open(tmp_path / name).read("TENX2") for name in ("one", "store"))
    np.testing.assert_array_equal(one.X.toarray(), two.X.toarray())


def test_tasks_of_hest_bench(tmp_path, run):
    write_bench(tmp_path / "hest-bench")
    (tmp_path / "hest-bench" / "features" / "MEND3.h5").rename(tmp_path / "away.h5")
    failed = run("hest-bench").failed
    assert failed["KIDNEY"].reason == "the task is left out: it needs MEND3, not in the store"
    (tmp_path / "away.h5").rename(tmp_path / "hest-bench" / "features" / "MEND3.h5")
    assert not run("hest-bench").failed
    assert not (tmp_path / "store" / "failures.csv").exists()
    task = Store.open(tmp_path / "store").task("KIDNEY")
    assert task.genes == ["GENE1", "GENE2"]
    assert task.folds == [{"train": ["TENX2", "MEND3"], "test": ["INT1"]}, {"train": ["INT1"], "test": ["MEND3"]}]


def test_rules_of_exclusion(tmp_path, run):
    write_hest(tmp_path / "hest")
    rules = tmp_path / "rules.txt"
    rules.write_text("# as published\nTENX2\n\nspecies = mus musculus\nnot here\n")
    summary = run(exclude_rules=rules)
    assert [record.slide for record in summary.records] == ["INT1"]
    assert summary.excluded == {"TENX2": 1, "species = mus musculus": 1, "not here": 0}
    rules.write_text("INT1")
    with pytest.raises(InputError, match="holds INT1 of an earlier run, which the rules exclude; choose a new store"):
        run(exclude_rules=rules)
    rules.write_text("specie=Mus musculus\n")
    with pytest.raises(InputError, match="no column 'specie' .did you mean species"):
        run(exclude_rules=rules)
    rules.write_text("organ=Kidney\norgan=Breast\norgan=Prostate")
    with pytest.raises(InputError, match="exclude all of its 3 slides"):
        run(exclude_rules=rules)


def test_organs_that_become_others_are_told_of(tmp_path, run):
    write_hest(tmp_path / "hest")
    (tmp_path / "hest" / "HEST_v1_1_0.csv").write_text(
        HEST_CSV.replace("Breast,H", "Bladder,H").replace("Kidney,C", ",C")
    )
    with pytest.warns(InputWarning, match=r"become Others: none given \(1\), Bladder \(1\)"):
        run()
    assert Store.open(tmp_path / "store").records["TENX2"].organ == "Others"


def test_one_run_at_a_time(tmp_path, run):
    write_hest(tmp_path / "hest")
    run()
    with FileLock(tmp_path / "store" / LOCK), pytest.raises(InputError, match="another stpath data prepare"):
        run()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: (f / "HEST_v1_1_0.csv").write_text("id,organ\n"), {}, "no column 'st_technology'"),
        (lambda f: (f / "HEST_v1_1_0.csv").write_text(HEST_CSV + HEST_CSV), {}, "slide 'INT1' appears twice"),
        (lambda f: [path.unlink() for path in f.glob("*.csv")], {}, "give one with --metadata"),
        (
            lambda f: (f / "st").rename(f / "ts"),
            {},
            "holds no slide of the layout hest; expected HEST-1k: `st/ID.h5ad`",
        ),
        (lambda f: None, {"features": None}, "name a folder of ID.h5 with --features"),
        (
            lambda f: None,
            {"features": Path("nowhere")},
            "none of 3 slides could be taken, see .*failures.csv; the first, INT1: no features",
        ),
        (lambda f: None, {"label": "oncotree"}, "--label: .*no column 'oncotree' .did you mean oncotree_code"),
        (lambda f: None, {"genes": Path("nowhere")}, "no such gene vocabulary"),
        (lambda f: None, {"counts": "tpm"}, "counts are raw or log1p"),
        (lambda f: None, {"exclude_rules": Path("nowhere")}, "--exclude nowhere: cannot be read"),
    ],
)
def test_faults_of_the_call_are_named(tmp_path, run, change, options, message):
    write_hest(tmp_path / "hest")
    change(tmp_path / "hest")
    with pytest.raises(InputError, match=message):
        run(**options)


def test_the_command(tmp_path, genes, capsys):
    write_hest(tmp_path / "hest")
    features, store = tmp_path / "hest" / "features", tmp_path / "store"
    (tmp_path / "rules").write_text("MEND3")
    arguments = ["--layout", "hest", "--features", str(features), "--genes", str(genes), "--out", str(store)]
    arguments += ["--hvg", "4", "--exclude", str(tmp_path / "rules")]
    assert main(["data", "prepare", str(tmp_path / "hest"), *arguments]) == 0
    excluded, summary = capsys.readouterr().out.splitlines()
    assert excluded == "excluded by MEND3: 1"
    assert (
        summary
        == f"{store}: 2 slides (0 of them skipped, as they were there), 18 spots, 12 to 12 genes a slide, 0 failed"
    )
    (features / "INT1.h5").unlink()
    assert main(["data", "prepare", str(tmp_path / "hest"), *arguments]) == 1
    failed, closing = capsys.readouterr().err.splitlines()
    assert failed == f"failed[data]: INT1: no features: {features / 'INT1.h5'} is missing"
    assert closing == f"1 failed, see {store / 'failures.csv'}"
    (features / "TENX2.h5").unlink()
    assert main(["data", "prepare", str(tmp_path / "hest"), *arguments]) == 2
