"""Nothing that is read can run code: no pickle, no eval, no shell. The sources are scanned; the scanner is tried on what it must find."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tenrec_jax", "torch_mlu_backend", "experiments", "tests")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
UNSAFE_CALLS = {
    "eval",
    "exec",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "pandas.read_pickle",
    "pd.read_pickle",
}
# By file, what it may have, and why.
EXCEPTIONS = {
    "tenrec_jax/interop/original.py": {
        "import of pickle": "the error alone, which torch raises for a file that it refuses"
    },
    "tests/hostile_files.py": {"import of pickle": "makes files that try to run code"},
    "tests/test_original.py": {"import of pickle": "makes files that try to run code"},
}


def found_in(source: str) -> Iterator[str]:
    """What could run code that a file holds."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"import of {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES)
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {each.arg: each.value for each in node.keywords}
        if called in UNSAFE_CALLS:
            yield f"call of {called}"
        if called.endswith("torch.load") or called == "load_pt":
            weights_only = options.get("weights_only")
            if not (isinstance(weights_only, ast.Constant) and weights_only.value is True):
                yield "torch.load without weights_only=True"
        for name in ("allow_pickle", "shell"):
            value = options.get(name)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                yield f"{name} that is not False"
        if called.endswith("import_module"):
            names = [each.value for each in node.args if isinstance(each, ast.Constant)]
            yield from (f"import of {name}" for name in names if str(name).split(".")[0] in UNSAFE_MODULES)


SOURCES = sorted(path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", SOURCES)
def test_no_source_reads_what_can_run_code(name: str) -> None:
    assert set(found_in((ROOT / name).read_text(encoding="utf-8"))) - set(EXCEPTIONS.get(name, {})) == set()


def test_every_exception_is_needed() -> None:
    for name, reasons in EXCEPTIONS.items():
        assert set(reasons) == set(found_in((ROOT / name).read_text(encoding="utf-8"))), name


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "import pickle as p, os",
        "from pickle import loads",
        "import joblib",
        "from dill import load",
        "importlib.import_module('cloudpickle')",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "pd.read_pickle(path)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_scanner_finds(snippet: str) -> None:
    assert list(found_in(snippet))


@pytest.mark.parametrize(
    "snippet",
    [
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "model.eval()",
        "subprocess.run(['ls'])",
    ],
)
def test_the_scanner_passes_over(snippet: str) -> None:
    assert not list(found_in(snippet))
