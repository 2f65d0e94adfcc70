"""Downloads: what is asked of the Hub, and its errors in a line. Nothing is fetched."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from stpath_runtime.cli.app import main
from stpath_runtime.errors import InputError
from stpath_train.download import download, hub_errors

HEST = (
    *("HEST_v1_0_0.csv", "HEST_v1_1_0.csv", "README.md", "st/TENX99.h5ad", "st/TENX9.h5ad", "patches/TENX99.h5"),
    *("wsis/TENX99.tif", "cellvit_seg/TENX99_cellvit_seg.zip"),
)
BENCH = (
    "IDC/adata/TENX99.h5ad",
    "IDC/patches/TENX99.h5",
    "IDC/splits/test_0.csv",
    "IDC/var_50genes.json",
    "fm_v1/x.bin",
)
STIMAGE = (
    *("meta/meta_all_gene.csv", "meta/bib.txt", "ST/gene_exp/A_B_count.csv", "ST/coord/A_B_coord.csv"),
    *("ST/image/A_B.png", "annotation/A_B_anno.csv", "Visium/gene_exp/C_count.csv", "Visium/coord/C_coord.csv"),
)


@pytest.fixture
def hub(monkeypatch):
    """A Hub of three data sets, which gives empty files; a list of what was asked of it."""
    calls = []

    def snapshot_download(repo, *, repo_type, local_dir, allow_patterns):
        calls.append((repo, repo_type))
        files = {"MahmoodLab/hest": HEST, "MahmoodLab/hest-bench": BENCH, "jiawennnn/STimage-1K4M": STIMAGE}[repo]
        for file in files:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                path = Path(local_dir) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def fetched(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "arguments", "files"),
    [
        ("hest", {}, {*HEST[:2], *HEST[3:6]}),
        ("hest", {"slides": ["TENX9"]}, {*HEST[:2], "st/TENX9.h5ad"}),
        ("hest", {"patterns": ["wsis/TENX99*"]}, {"wsis/TENX99.tif"}),
        ("hest-bench", {}, {*BENCH[:4]}),
        ("stimage", {}, {*STIMAGE} - {"ST/image/A_B.png"}),
        ("stimage", {"slides": ["C"]}, {*STIMAGE[:2], *STIMAGE[6:]}),
    ],
)
def test_the_files_that_are_needed_are_fetched(tmp_path, hub, name, arguments, files):
    assert download(name, tmp_path / "x", **arguments) == tmp_path / "x"
    assert fetched(tmp_path / "x") == files
    assert hub[0][1] == "dataset"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hests", {}, "unknown data set 'hests' .did you mean hest"),
        ("hest", {"slides": ["TENX1"]}, "has no file st/TENX1.h5ad or patches/TENX1.h5 .TENX1."),
        ("hest", {"patterns": ["wsi/*"]}, "has no file wsi/.* .--pattern."),
        ("hest", {"slides": ["A"], "patterns": ["*"]}, "give one of them"),
        ("hest", {"slides": ["TENX*"]}, "is not a slide's id"),
    ],
)
def test_faults_of_the_call_are_named(tmp_path, hub, name, arguments, message):
    with pytest.raises(InputError, match=message):
        download(name, tmp_path, **arguments)


def refused(kind: type[Exception], status: int) -> Exception:
    request = httpx2.Request("GET", "https://huggingface.co/api/datasets/MahmoodLab/hest")
    return kind(f"{status} Client Error\nmore lines", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            refused(errors.GatedRepoError, 403),
            "accept its terms on https://huggingface.co/datasets/MahmoodLab/hest, then run: hf auth login",
        ),
        (refused(errors.RepositoryNotFoundError, 401), "not to be seen without a login"),
        (refused(errors.RevisionNotFoundError, 404), "the Hub refused (404 Client Error); see"),
        (refused(errors.HfHubHTTPError, 503), "the Hub refused (503 Client Error); see"),
        (errors.LocalTokenNotFoundError("no token"), "no login"),
        (errors.LocalEntryNotFoundError("no snapshot"), "the Hub cannot be reached"),
        (errors.OfflineModeIsEnabled("offline"), "the Hub cannot be reached"),
        (httpx2.ConnectError("name or service not known"), "the Hub cannot be reached"),
        (TimeoutError(), "the Hub cannot be reached"),
    ],
)
def test_errors_of_the_hub_are_a_line_on_what_to_do(tmp_path, monkeypatch, capsys, error, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert main(["data", "download", "hest", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error[download]: MahmoodLab/hest: ")
    assert message in line


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), hub_errors("a/b", "page"):
        _ = 1 / 0


def test_the_command_takes_several_patterns(tmp_path, hub, capsys):
    arguments = ["--pattern", "wsis/*", "--pattern", "README.md", "--out", str(tmp_path)]
    assert main(["data", "download", "hest", *arguments]) == 0
    assert fetched(tmp_path) == {"wsis/TENX99.tif", "README.md"}
    assert capsys.readouterr().out == f"{tmp_path}: downloaded\n"


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        (
            "ALL_PROXY",
            "socks://127.0.0.1:9/",
            ValueError("Unknown scheme for proxy URL"),
            "the proxy of ALL_PROXY=socks:",
        ),
        ("https_proxy", "socks5://127.0.0.1:9/", ImportError("Using SOCKS proxy, but"), r"httpx\[socks\]"),
        ("SSL_CERT_FILE", "/nowhere/cacert.pem", FileNotFoundError(2, "No such file"), "SSL_CERT_FILE names /nowhere"),
        ("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem", OSError("Could not find a suitable TLS"), "REQUESTS_CA_BUNDLE names"),
    ],
)
def test_settings_of_the_surroundings_are_named(name, value, error, words, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words), hub_errors("a/b", "https://page"):
        raise error


def test_an_error_that_is_ours_stays_one():
    with pytest.raises(ValueError, match="ours"), hub_errors("a/b", "https://page"):
        raise ValueError("ours")
