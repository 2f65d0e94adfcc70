"""The commands and code blocks of a page, and what runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from typer.main import get_command

from stpath_runtime.cli import app as cli
from stpath_train.config import FlowTrainConfig, read_config

ROOT = Path(__file__).parents[2]
SHELL = re.compile(r"[|>*$]|&&|^[A-Z_]+=")  # what takes a shell
# What training takes in a test of the pages: everything else is as the page has it.
SMALL_RUN = {"epochs": 1, "accelerator": "cpu"}
SMALL_MODEL = {"d_model": 16, "n_layers": 1, "d_mlp": 32}
SMALL_FLOW = {"kind": "stflow", "d_model": 16, "d_edge": 8, "n_layers": 1}
SMALL_WINDOWS = {"spots": [8, 32], "workers": 0}


@dataclass(frozen=True)
class Block:
    """A fenced block: of a language, perhaps with the name of a file that it is."""

    page: Path
    line: int
    language: str
    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, from top to bottom; directives of the site are not code."""
    found = []
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        if token.type in ("fence", "code_block") and not token.info.startswith("{"):
            language, _, file = token.info.strip().partition(" ")
            found.append(Block(page, token.map[0] + 1, language, file, token.content))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a block, comments aside; a line that ends in a backslash goes on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    found = (re.sub(r"(^|\s)#\s.*$", "", line).strip() for line in lines)
    return [command for command in found if command]


def run_command(command: str, where: str, capsys) -> None:
    """Run a command in the current folder; `stpath` in this process, unless it takes a shell."""
    if command.startswith("stpath train ") and "--example" not in command:
        make_small(Path(command.rsplit(maxsplit=1)[-1]))
    if SHELL.search(command) or not command.startswith("stpath "):
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", command],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PATH": path},
        )
        code, errors = done.returncode, done.stderr
    else:
        capsys.readouterr()
        code = cli.main(shlex.split(command)[1:])
        errors = capsys.readouterr().err
    assert code == 0, f"{where}: {command}\nexit code {code}: {errors}"


def make_small(config: Path) -> None:
    """Make a config of a run one that takes seconds: what it says stays, but for sizes."""
    of_flow = isinstance(read_config(config), FlowTrainConfig)
    sections = yaml.safe_load(config.read_text())
    sections["run"] |= SMALL_RUN
    sections["data"] |= {"workers": 0} if of_flow else SMALL_WINDOWS
    if of_flow:
        sections["model"] = SMALL_FLOW
    elif not sections.get("model", {}).get("checkpoint"):
        sections["model"] = sections.get("model", {}) | SMALL_MODEL
    config.write_text(yaml.safe_dump(sections))


def inline_commands(page: Path) -> list[str]:
    """The commands that a page names in its text."""
    every = (token for part in MarkdownIt("commonmark").parse(page.read_text()) for token in part.children or [])
    texts = [token.content for token in every if token.type == "code_inline"]
    return [text for text in texts if re.match(r"(stpath|make|pytest|pip install) ", text)]


def check_options(command: str) -> None:
    """Check that a command of `stpath`, of which a text may name a part, is one, and has the options named."""
    cli._add_commands()
    group, words = get_command(cli.app), shlex.split(command)[1:]
    while hasattr(group, "commands") and words and not words[0].startswith("-"):
        if not words[0].isupper():  # stpath COMMAND
            assert words[0] in group.commands, command
            group = group.commands[words[0]]
        words = words[1:]
    known = {name for option in group.params for name in (*option.opts, *option.secondary_opts)} | {"--help", "--debug"}
    assert {word for word in words if word.startswith("--")} <= known, command


def check_parses(command: str) -> None:
    """Check that a command of `stpath` is one, with options that it has."""
    cli._add_commands()
    name, words, group = "stpath", shlex.split(command, comments=True)[1:], get_command(cli.app)
    context = group.make_context(name, list(words))
    while hasattr(group, "commands"):
        name, group, words = group.resolve_command(context, words)
        context = group.make_context(name, list(words), parent=context)


def check_extras(command: str) -> None:
    """Check that `pip install 'stpath-engine[a,b]'` names extras that there are."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in shlex.split(command):
        if word.startswith("stpath-engine["):
            wanted = word.removeprefix("stpath-engine[").removesuffix("]").split(",")
            assert set(wanted) <= set(extras), f"{command}: no extra {sorted(set(wanted) - set(extras))}"


def check_target(command: str) -> None:
    """Check that `make TARGET` names a target of the Makefile."""
    for target in shlex.split(command)[1:]:
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command


def check_path(command: str) -> None:
    """Check that what `pytest` or `python` is given is in the repository."""
    words = shlex.split(command)
    paths = [word for word in words if word.startswith(("tests/", "benchmarks"))]
    assert paths, command
    for path in paths:
        assert (ROOT / path.partition("::")[0]).exists(), command


def write_file(block: Block) -> None:
    """Write a block that names a file, and check what it says as far as its kind is known."""
    if block.language == "yaml":
        assert isinstance(yaml.safe_load(block.text), dict), block
    if block.language == "json":
        json.loads(block.text)
    if block.file:
        path = Path(block.file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
