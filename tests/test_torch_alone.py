"""The mirror runs where there is PyTorch and nothing else: no JAX, no tenrec_jax, not even NumPy."""

import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import mirrors
import pytest

from tenrec_jax.interop.export import export

PACKAGE = Path(__file__).parents[1] / "torch_mlu_backend"
# Stands before the command: whatever else is installed, importing it fails.
PYTORCH_ALONE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jax", "jaxlib", "flax", "tenrec_jax", "numpy", "safetensors", "pyarrow", "ml_dtypes"}:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
from torch_mlu_backend.__main__ import main
sys.exit(main())
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    export(mirrors.write_recommender(root / "recommender"), root / "exported")
    return root / "exported"


def assert_serves(python: list[str | Path], exported: Path, folder: Path) -> None:
    def run(*arguments: str | Path) -> str:
        done = subprocess.run([*python, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "PASSED on cpu" in run("verify", exported, "--device", "cpu")
    found = json.loads(run("recommend", exported, "--user", "505", "--k", "5", "--device", "auto", "--json"))
    assert len(found["items"]) == 5


def test_it_serves_without_jax_and_numpy(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "torch_mlu_backend")
    assert_serves([sys.executable, "-W", "ignore", "-c", PYTORCH_ALONE], exported, tmp_path)


@pytest.mark.slow
def test_it_installs_and_serves_in_an_environment_of_pytorch_alone(exported: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for path in sorted(set(files_of("torch"))):  # PyTorch is large: that of this environment is lent
        target = site / path.name
        if not target.exists():
            target.symlink_to(path)
    source = shutil.copytree(PACKAGE, tmp_path / "source")  # pip builds in the folder itself
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", source], check=True)
    assert subprocess.run([python, "-c", "import jax"], capture_output=True, check=False).returncode == 1
    assert_serves([python, "-W", "ignore", "-m", "torch_mlu_backend"], exported, tmp_path)


def files_of(name: str) -> Iterator[Path]:
    """The top-level folders and modules of a distribution and of all that it requires."""
    distribution = metadata.distribution(name)
    for file in distribution.files or ():
        top = Path(str(distribution.locate_file(file.parts[0]))).resolve()
        if file.parts[0] not in ("..", "__pycache__") and top.exists():
            yield top
    for requirement in distribution.requires or ():
        if "extra ==" in requirement:
            continue
        try:
            yield from files_of(re.split(r"[^\w.-]", requirement)[0])
        except metadata.PackageNotFoundError:  # of another platform
            continue
