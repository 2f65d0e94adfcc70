"""Every command and code block of README and docs/ runs, from the top of a page to its end, in a folder of its own."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest
from pages import (
    ROOT,
    Block,
    blocks,
    check_extras,
    check_options,
    check_parses,
    check_path,
    check_target,
    commands,
    inline_commands,
    run_command,
    write_file,
)

from stpath_runtime.machine import cpu_features

pytestmark = pytest.mark.docs

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LANGUAGES = ("bash", "python", "yaml", "csv", "json", "text")  # text: what a program prints, or a file that is named
HAS_BFLOAT16 = bool({"avx512_bf16", "amx_bf16"} & set(cpu_features()))


def nothing(command: str) -> None:
    """Of a program that is not ours there is nothing to check."""


# What does not run here: which commands, why, and what is checked of them instead. Everything else runs.
NOT_RUN = [
    (r"^pip install ", "the package is not on a package index", check_extras),
    (r"^make ", "the tests, or what takes minutes and has tests of its own", check_target),
    (r"^(python -m )?pytest |^STPATH_WEIGHTS=", "tests and benchmarks run by themselves", check_path),
    (r"^stpath bench compare ", "what it finds of two runs beside other tests is noise", check_parses),
    (r"^stpath .*--device cuda", "needs an NVIDIA GPU", check_parses),
    (r"^stpath .*--ray auto", "needs a Ray cluster and a folder that its machines share", check_parses),
    (r"^stpath export-encoder gigapath", "fetches gigabytes from a page with terms", check_parses),
    (r"^stpath data download", "fetches gigabytes from a page with terms", check_parses),
    (r"^stpath bench compare", "takes results of two runs; tests of its own", check_parses),
    (r"^stpath .*--backend NAME", "a name to be filled in", check_parses),
    (r"^stpath view (?!.*--save)", "serves until it is ended; tests of its own", check_parses),
    (r"^tritonserver ", "make test-triton starts a server with the same options", nothing),
    (r"^python run_batch_of_slides\.py ", "TRIDENT's, which is installed from its repository", nothing),
]
if not HAS_BFLOAT16:
    NOT_RUN.append((r"^stpath .*--precision bf16", "this CPU has no bfloat16", check_parses))
# Python blocks that import these are only parsed.
NOT_IMPORTED = {
    "lazyslide": "LazySlide is no dependency; its files are made by the library that owns their format",
    "tritonclient": "needs a server: make test-triton asks one",
}


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def given(made_once) -> Path:
    """The files that the pages name."""
    from given import fill

    return made_once("given_to_pages", fill)


@pytest.fixture
def folder(given, tmp_path, monkeypatch):
    """The current folder, filled for a page with the files that it names and does not make itself."""
    monkeypatch.chdir(tmp_path)

    def fill_for(page: Path) -> Path:
        ran = [command for block in blocks(page) for command in commands(block) if not reason_not_to_run(command)]
        made = {found for command in ran for found in re.findall(r"--out (\S+)", command)}
        for path in given.iterdir():
            if path.name in made or not re.search(rf"(?<![\w./-]){re.escape(path.name)}\b", page.read_text()):
                continue
            if path.is_dir():
                shutil.copytree(path, tmp_path / path.name)
            else:
                shutil.copy(path, tmp_path)
        return tmp_path

    return fill_for


def reason_not_to_run(command: str):
    """The entry of NOT_RUN that a command falls under, or None."""
    return next((entry for entry in NOT_RUN if re.search(entry[0], command)), None)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_page(page, folder, capsys):
    folder(page)
    run_page(page, capsys)


def run_page(page: Path, capsys) -> None:
    """Run the blocks of a page in the current folder."""
    names: dict[str, object] = {"__name__": "__page__"}
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: a block of {block.language or 'no language'}"
        if block.language == "python":
            run_python(block, names)
        elif block.language == "bash":
            for command in commands(block):
                if (entry := reason_not_to_run(command)) is not None:
                    entry[2](command)
                else:
                    run_command(command, str(block), capsys)
        else:
            write_file(block)


def run_python(block: Block, names: dict[str, object]) -> None:
    """Run a block with the names of those before it; tracebacks tell the page and the line."""
    tree = ast.parse(block.text, str(block))
    imported = {node.module if isinstance(node, ast.ImportFrom) else alias.name
                for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                for alias in node.names}  # fmt: skip
    if any(str(module).split(".")[0] in NOT_IMPORTED for module in imported):
        return
    exec(compile(tree, str(block), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_page_names_in_the_repository_is_there(page):
    text = page.read_text()
    files = re.findall(r"`((?:stpath_runtime|stpath_train|export|tests|benchmarks|docs)/[\w./*]*)(?:::\w+)?`", text)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    files = [path for path in files if "NAME" not in path and "_build" not in path]  # made by make docs
    missing = [path for path in files if not list(ROOT.glob(path.rstrip("/")))]
    missing += [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_what_a_text_names_is_a_command(page):
    checks = {"stpath": check_options, "make": check_target, "pytest": check_path, "pip": check_extras}
    for command in inline_commands(page):
        checks[command.split(maxsplit=1)[0]](command)


def test_no_entry_of_what_does_not_run_is_left_over():
    every = [command for page in PAGES for block in blocks(page) if block.language == "bash"
             for command in commands(block)]  # fmt: skip
    assert [entry[0] for entry in NOT_RUN if not any(re.search(entry[0], command) for command in every)] == []


FAULTS = {
    "```bash\nstpath info engine --al\n```": "No such option: --al",
    "```bash\nstpath info no_engine\n```": "no_engine: not an engine",
    "```bash\nstpath info no_engine | cat\n```": "exit code",
    "```bash\npip install 'stpath-engine[gpus]'\n```": "no extra .'gpus'",
    "```bash\nmake tests\n```": "make tests",
    "```bash\nstpath run x --engine y --ray auto --worker 2\n```": "No such option: --worker",
    "```bash\nstpath data downlod hest --out y\n```": "No such command",
    "```bash\npytest benchmarks/no_such.py\n```": "no_such",
    "```python\nassert False, 'a fault'\n```": "a fault",
    "```yaml x.yaml\na: [\n```": "while parsing",
    "```fortran\nend\n```": "page.md:3: a block of fortran",
    "    indented\n": "no language",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_page_is_found(fault, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{fault}\n")
    with pytest.raises(Exception, match=FAULTS[fault]):
        run_page(page, capsys)
