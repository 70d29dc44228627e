"""The notebooks: whole pairs, and each runs from top to bottom, at a small size, and shows what it promises."""

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jupytext
import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))
KERNEL, ROWS, SECONDS = "this-python", 3000, 240


class Executed(NamedTuple):
    """What a notebook has shown: printed text, warnings and progress, HTML, and the number of pictures; and where it ran."""

    text: str
    errors: str
    html: str
    pictures: int
    folder: Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebooks run, one after the other as a reader would: a run that one has finished, another finds."""
    where = tmp_path_factory.mktemp("notebooks")
    write_kernel_spec(str(where / "jupyter" / "kernels" / KERNEL))
    return where


@pytest.fixture
def execute(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Executed]:
    """Executes a notebook by this interpreter, apart from the user's own Jupyter."""
    for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder / "jupyter"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    monkeypatch.setenv("TENREC_NOTEBOOK_ROWS", str(ROWS))

    def run(name: str) -> Executed:
        document = read(name)
        where = {"metadata": {"path": str(folder)}}
        NotebookClient(document, kernel_name=KERNEL, timeout=SECONDS, resources=where).execute()
        outputs = [output for cell in code_cells(document) for output in cell.outputs]
        streams = {kind: "".join(o.text for o in outputs if o.get("name") == kind) for kind in ("stdout", "stderr")}
        shown = [output.data for output in outputs if "data" in output]
        pages = "".join(data.get("text/html", "") for data in shown)
        return Executed(*streams.values(), pages, sum("image/png" in data for data in shown), folder)

    return run


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(document: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in document.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_script_says(name: str) -> None:
    script, document = jupytext.read(FOLDER / f"{name}.py"), read(name)
    assert [(c.cell_type, c.source) for c in document.cells] == [(c.cell_type, c.source) for c in script.cells]
    assert document.metadata == script.metadata


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_kept_without_outputs(name: str) -> None:
    document = read(name)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(document))
    assert not any(cell.metadata for cell in document.cells)
    assert len({cell.id for cell in document.cells}) == len(document.cells)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_begins_with_its_badge_and_one_install_cell(name: str) -> None:
    badge, install = read(name).cells[:2]
    address = (
        r"\(https://colab\.research\.google\.com/github/([^/]+/[^/]+)/blob/main/experiments/notebooks/(\w+)\.ipynb\)"
    )
    repository, named = re.search(address, badge.source).groups()
    assert named == name
    assert f'REPOSITORY = "{repository}"' in install.source
    assert [place for place, cell in enumerate(read(name).cells) if '"pip"' in cell.source] == [1]
    assert "What to do next" in read(name).cells[-1].source


def results_stand_beside_popularity(run: Executed) -> None:
    results = json.loads((run.folder / f"runs/notebook_{ROWS}/eval/test.json").read_text())
    model, baselines = results["retrieval"]["recall@10"], results["baselines"]
    popularity = baselines["popularity"]["retrieval"]["recall@10"]
    row = re.search(r"recall@10 +(\S+) \[(\S+), (\S+)\] +(\S+) \[", run.text)
    expected = [model["value"], model["low"], model["high"], popularity["value"]]
    assert [float(number) for number in row.groups()] == pytest.approx(expected, abs=1e-4)
    assert "rule diversity: removed 0" in run.text
    assert len(re.findall(r"^ +\d+  item +\d+  score [\d.]+  P\(click\) 0\.\d+", run.text, re.MULTILINE)) == 10


def leaks_are_flagged_and_the_report_is_shown(run: Executed) -> None:
    assert re.search(r"^flagged: watching_times ", run.text, re.MULTILINE)
    report = (run.folder / f"runs/tenrec_{ROWS}/run/report.html").read_text()
    assert html.escape(report) in run.html


def text_ids_are_recommended(run: Executed) -> None:
    log = (run.folder / f"runs/magazine_{ROWS}/magazine.csv").read_text()
    listed = re.findall(r"^ +\d+  (story-\d{6})", run.text, re.MULTILINE)
    assert len(listed) == 8
    assert all(f',"{story}",' in log or f",{story}," in log for story in listed)
    assert "there is no column 'storey'" in run.text


def torch_and_jax_agree(run: Executed) -> None:
    assert re.search(r"^PASSED on cpu", run.text, re.MULTILINE)
    worths = re.findall(r"worth ([\d.]+) in JAX, ([\d.]+) in PyTorch", run.text)
    assert len(worths) == 5
    assert [float(jax) for jax, _ in worths] == pytest.approx([float(torch) for _, torch in worths], abs=1e-5)
    assert "torch_mlu" in run.text


def the_fastformer_keeps_its_promises(run: Executed) -> None:
    changes = re.search(r"'isolated': '(\S+)', 'joint': '(\S+)'", run.text)
    assert float(changes[1]) <= 1e-6 < 1e-4 < float(changes[2])
    pools, encodings = re.findall(r"^largest difference (\S+) of", run.text, re.MULTILINE)
    assert max(float(pools), float(encodings)) <= 1e-5
    rows = re.findall(r"^ +(\d+)  (additive|softmax) .* ([\d.]+|nan)$", run.text, re.MULTILINE)
    assert [(int(length), kind) for length, kind, _ in rows] == [
        (length, kind) for kind in ("additive", "softmax") for length in (256, 512, 1024)
    ]


SHOWS: dict[str, Callable[[Executed], None]] = {
    "01_quick_start": results_stand_beside_popularity,
    "02_tenrec_from_csv_to_report": leaks_are_flagged_and_the_report_is_shown,
    "03_your_own_log": text_ids_are_recommended,
    "04_from_jax_to_pytorch_and_mlu": torch_and_jax_agree,
    "05_inside_the_fastformer": the_fastformer_keeps_its_promises,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_what_it_promises(name: str, execute: Callable[[str], Executed]) -> None:
    run = execute(name)
    assert run.pictures >= 1
    assert "Warning" not in run.errors
    SHOWS[name](run)
