"""What the documentation says is so: its commands run or at least parse, its links, paths and names lead somewhere.

A fence's info string says what becomes of a block (pages show its first word alone): ```bash and ```python run here, page by page and in
order, in a sandbox where what the pages take for granted lies ready, and what a command serves stays up for the blocks below; ```bash slow
trains and runs with `-m slow`; ```... elsewhere needs a cluster, a licence, the network, an installation or a finished run, and does not
run. Every command of all of them is parsed by the parser that it is for.

Sizes that would take long are made small by `SMALLER` alone, each entry of which must occur in a block that runs.
"""

import argparse
import ast
import dataclasses
import gzip
import importlib
import json
import pydoc
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import mirrors
import numpy as np
import pdoc
import pytest
import torch
from launched import ROOT, in_this_process
from served import served

from experiments import launch
from tenrec_jax import __main__ as tenrec_jax_command
from tenrec_jax import artifact
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.interop.original import load_state
from torch_mlu_backend import __main__ as mirror_command

PAGES = (
    *("README.md", "tenrec_jax/GLOSSARY.md", "CONTRIBUTING.md"),
    *("data/README.md", "experiments/README.md", "torch_mlu_backend/README.md"),
)
SMALLER = {
    "--rows 300000": "--rows 2000",
    "range(1, 100)": "range(1, 6)",
    "bench exported --device cpu": "bench exported --device cpu --batch 20",
}
COMMANDS = {"tenrec-jax": tenrec_jax_command, "python -m torch_mlu_backend": mirror_command}
LAUNCH = "python experiments/launch.py"
TRAIN_RIVAL = "python experiments/baselines/train.py"
SERVE = "tenrec-jax serve "
# Where pages reach the server that they start.
ADDRESS = "localhost:8080"
# The commands that a block without a language must not hold.
UNMARKED = re.compile(r"^\s*(\$|tenrec-jax|python|make|pip|sbatch|kubectl|source|import|from) ?", re.MULTILINE)
# Files that the repository keeps; others with a slash are what a run leaves.
SOURCE_PATH = re.compile(r"(?<![\w./-])[\w.-]+(?:/[\w.-]+)+\.(?:py|md|sbatch|yaml|cfg|toml)\b")


class Fence(NamedTuple):
    """A fenced block: its page, the line of its first content, the words of its info string, and its text."""

    page: str
    line: int
    info: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its commands, one a line, without comments and continued lines."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def fences(page: str) -> Iterator[Fence]:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    edges = [number for number, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        info = tuple(lines[start].removeprefix("```").split())
        yield Fence(page, start + 2, info, "\n".join(lines[start + 1 : end]) + "\n")


FENCES = [fence for page in PAGES for fence in fences(page)]
SCRIPTS = [fence for fence in FENCES if fence.info[:1] == ("bash",)]


def prose(page: str) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def inline(text: str) -> list[str]:
    """What stands between backticks on a line."""
    return re.findall(r"`([^`\n]+)`", text)


def examples_in(help_text: str) -> list[str]:
    """The commands below "examples:", without the remarks that two spaces set off."""
    _, _, below = help_text.partition("examples:\n")
    lines = [line for line in below.partition("\n\n")[0].splitlines() if line.startswith("  ")]
    return [re.split(r"\s{2,}(?!\")", line.strip())[0].partition(" | ")[0] for line in lines]


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def known_command(line: str) -> str | None:
    """Which of `COMMANDS` a line calls."""
    return next((name for name in COMMANDS if line == name or line.startswith(f"{name} ")), None)


def parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the parser of a command judge a line; lines of other commands pass.

    Raises:
        SystemExit, UserError: it refuses the line.
    """
    words = shlex.split(line, comments=True)
    name = known_command(line)
    if name is not None:
        COMMANDS[name]._parser().parse_args(words[len(name.split()) :])
    elif line.startswith(LAUNCH):
        if "--help" not in words:
            with in_this_process(monkeypatch, *words[2:]) as arguments:
                launch._parse(arguments)
    elif line.startswith(TRAIN_RIVAL):
        # A script, which finds the models in its own folder.
        monkeypatch.syspath_prepend(ROOT / "experiments" / "baselines")
        importlib.import_module("train")._parse(words[2:])
    elif words[0] == "make":
        assert words[1:], line
        for target in words[1:]:
            assert "=" in target or re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The folder from which a reader runs commands."""
    monkeypatch.chdir(ROOT)
    return monkeypatch


@pytest.mark.parametrize("name", COMMANDS)
def test_every_subcommand_teaches_by_examples_that_parse(name: str, at_root: pytest.MonkeyPatch) -> None:
    parser = COMMANDS[name]._parser()
    examples = examples_in(parser.format_help())
    if name == "tenrec-jax":
        by_command = {command: examples_in(sub.format_help()) for command, sub in subcommands(parser).items()}
        assert not [command for command, lines in by_command.items() if not lines]
        for command, lines in by_command.items():
            assert any(line.startswith(f"{name} {command} ") for line in lines), command
        examples += [line for lines in by_command.values() for line in lines]
    assert len(examples) >= 4
    for line in examples:
        assert known_command(line), line
        parse(line, at_root)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_commands_says_what_it_is(page: str) -> None:
    for fence in fences(page):
        if fence.info:
            language, *how = fence.info
            assert language in ("bash", "python"), fence.name
            assert how in ([], ["slow"], ["elsewhere"]), fence.name
        else:
            assert not UNMARKED.search(fence.text), f"{fence.name} holds commands: mark it bash or python"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_command_of_a_block_parses(script: Fence, at_root: pytest.MonkeyPatch) -> None:
    for line in script.commands:
        parse(line, at_root)


@pytest.mark.parametrize("script", [fence for fence in FENCES if fence.info[:1] == ("python",)], ids=lambda f: f.name)
def test_every_python_block_parses(script: Fence) -> None:
    ast.parse(script.text)


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_running_text_name_commands_and_flags_that_exist(page: str, at_root: pytest.MonkeyPatch) -> None:
    for line in inline(prose(page)):
        name = known_command(line)
        if name is not None:
            words, known = line.removeprefix(name).split(), subcommands(COMMANDS[name]._parser())
            if words:
                options = {option for action in known[words[0]]._actions for option in action.option_strings}
                assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, line
        elif (line.startswith(LAUNCH) and "=..." not in line) or line.startswith("make "):
            parse(line, at_root)


def test_the_commands_of_the_launcher_and_of_every_config_parse(at_root: pytest.MonkeyPatch) -> None:
    files = [ROOT / "experiments" / "launch.py", *(ROOT / "experiments" / "configs").glob("*.py")]
    for file in files:
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        commands = re.findall(rf"{LAUNCH}(?: \S+)*", text)
        assert commands, file
        for line in commands:
            parse(line, at_root)


class Sandbox(NamedTuple):
    """A folder in which the blocks of a page run, in this process.

    Attributes:
        names: what its Python blocks know.
        servers: what its commands serve, until the page's end. addresses: those of the servers, by the one that the page says.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    names: dict[str, object]
    servers: ExitStack
    addresses: dict[str, str]

    def run(self, fence: Fence) -> None:
        """Run a block; Python blocks know what those before them named."""
        text = fence.text
        for old, new in SMALLER.items():
            text = text.replace(old, new)
        if fence.info[0] == "python":
            script = self.folder / "block.py"
            script.write_text(text, encoding="utf-8")
            found = runpy.run_path(str(script), init_globals=self.names)
            self.names.update({name: value for name, value in found.items() if not name.startswith("__")})
            return
        for line in fence._replace(text=text).commands:
            words, name = shlex.split(line, comments=True), known_command(line)
            if line.startswith(SERVE):
                options = COMMANDS["tenrec-jax"]._parser().parse_args(words[1:])
                port = self.servers.enter_context(served(options.folder)).port
                self.addresses[ADDRESS] = f"127.0.0.1:{port}"
            elif words[0] == "curl":
                if shutil.which("curl") is None:
                    pytest.skip("curl is not installed, so what follows on this page was not run")
                asked = [word.replace(ADDRESS, self.addresses[ADDRESS]) for word in words[1:]]
                answer = subprocess.run(
                    ["curl", "--fail-with-body", "--silent", *asked], capture_output=True, check=False
                )
                assert answer.returncode == 0, f"{fence.name}: {line}: {answer.stdout!r}"
                assert json.loads(answer.stdout)["items"], f"{fence.name}: {line}"
            elif name is not None:
                assert COMMANDS[name].main(words[len(name.split()) :]) == 0, f"{fence.name}: {line}"
            else:
                assert line.startswith(LAUNCH), f"{fence.name}: {line} cannot run here; mark the block elsewhere"
                with in_this_process(self.patch, *words[2:]) as arguments:
                    assert launch.main(arguments) == 0, f"{fence.name}: {line}"


def write_logs(folder: Path) -> None:
    """The logs that pages name as the reader's own."""
    random = np.random.default_rng(0)
    rows = [(user, *random.integers(0, 2, 2)) for user in range(1, 41) for _ in range(8)]
    lines = [f"{u},{random.integers(1, 30)},{w},{li},topic {w},{t}" for t, (u, w, li) in enumerate(rows)]
    events = "\n".join(["uid,vid,watched,liked,topic,at", *lines]) + "\n"
    (folder / "events.csv").write_text(events)
    (folder / "events.csv.gz").write_bytes(gzip.compress(events.encode()))
    clicks = [" ".join(map(str, [user, *random.permutation(60)[:8] + 1])) for user in range(1, 201)]
    (folder / "log.txt").write_text("\n".join(clicks) + "\n")
    write_twin(folder / "data" / "tenrec" / "QK-video.csv", kind="qb_video", rows=2000, seed=0, progress=False)


def write_recommender(folder: Path) -> None:
    """A recommender that knows the users and items that pages ask for."""
    mirrors.write_recommender(folder)
    loaded = artifact.load(folder)
    users, items = len(loaded.catalogue.user_id), len(loaded.catalogue.item_id)
    user_id = np.roll(np.arange(users), 1) * (np.arange(users) > 0)  # those with most events are not the last ones
    item_id = np.where(np.arange(items) == 38, 99, np.arange(items))
    catalogue = dataclasses.replace(loaded.catalogue, user_id=user_id, item_id=item_id)
    artifact.seal(folder, loaded.identity, catalogue, loaded.serving)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pages take for granted: the repository's experiments, a run, logs, a checkpoint of the original system."""
    folder = tmp_path_factory.mktemp("sandbox")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    write_logs(folder)
    (folder / "runs" / "quickstart").mkdir(parents=True)
    write_recommender(folder / "runs" / "quickstart" / "recommender")
    state = load_state(ROOT / "tests" / "fixtures" / "tenrec_ranker.npz")
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, folder / "ranker.pt")
    return folder


@pytest.fixture
def sandbox(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A fresh copy of it, in which commands run."""
    folder = Path(shutil.copytree(made, tmp_path / "sandbox", symlinks=True))
    monkeypatch.chdir(folder)
    with ExitStack() as servers:
        yield Sandbox(folder, monkeypatch, arrays(), servers, {})


def arrays() -> dict[str, object]:
    """The arrays that a page's Python blocks take for granted."""
    random = np.random.default_rng(0)
    vectors, queries, two_vectors = (random.standard_normal((rows, 8), np.float32) for rows in (60, 20, 2))
    return {"vectors": vectors, "item_ids": np.arange(1, 61), "queries": queries, "two_vectors": two_vectors}


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run_in_order(page: str, sandbox: Sandbox) -> None:
    for fence in fences(page):
        if fence.info in (("bash",), ("python",)):
            sandbox.run(fence)


@pytest.mark.slow
@pytest.mark.parametrize("script", [fence for fence in FENCES if fence.info[1:] == ("slow",)], ids=lambda f: f.name)
def test_a_block_that_trains_runs(script: Fence, sandbox: Sandbox) -> None:
    sandbox.run(script)


def test_what_is_made_smaller_stands_in_a_block_that_runs() -> None:
    texts = [fence.text for fence in FENCES if fence.info in (("bash",), ("python",))]
    assert not [old for old in SMALLER if not any(old in text for text in texts)]


@pytest.mark.parametrize("page", PAGES)
def test_links_paths_and_names_lead_somewhere(page: str) -> None:
    text = prose(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" not in target:
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target
    for path in SOURCE_PATH.findall("\n".join(inline(text))):
        assert any((base / path).exists() for base in (ROOT, (ROOT / page).parent)), path
    for name in re.findall(r"`((?:tenrec_jax|torch_mlu_backend)(?:\.\w+)+)(?:\(\))?`", text):
        assert pydoc.locate(name) is not None, name
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")), name


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_reference_renders_without_warnings_and_needs_no_network(tmp_path: Path) -> None:
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("tenrec_jax.models.pooling", output_directory=tmp_path)
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    page = pages["tenrec_jax/models/pooling.html"]
    assert "prefix_pools" in page
    assert "the neutral element of" in page
    for text in pages.values():
        assert not re.search(r"""<(script|link|img|iframe)[^>]*=\s*["'](https?:)?//|@import|url\(["']?http""", text)
