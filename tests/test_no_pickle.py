"""Nothing that is read can run code: no pickle, no eval, no shell. The sources are scanned; the scanner is tried on what it must find."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tenrec_jax", "torch_mlu_backend", "experiments", "tests")
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
UNSAFE_CALLS = {
    *("eval", "exec", "builtins.eval", "builtins.exec", "os.system", "os.popen"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle"),
    *(f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")),
}
# By file, what it may have, and why.
EXCEPTIONS = {
    "tenrec_jax/interop/original.py": {
        "import of pickle.UnpicklingError": "the error alone, which torch raises for a file that it refuses"
    },
    "tests/hostile_files.py": {"import of pickle": "makes files that try to run code"},
    "tests/test_original.py": {"import of pickle": "makes files that try to run code"},
}


def found_in(source: str) -> Iterator[str]:
    """What could run code that a file holds."""
    tree = ast.parse(source)
    names = dict(imported_names(tree))
    yield from (f"import of {full}" for full in names.values() if full.split(".")[0] in UNSAFE_MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from found_in_call(node, names)


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """The names by which a file knows modules and what is in them, and their full names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((each.asname or each.name.split(".")[0], each.name) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((each.asname or each.name, f"{node.module}.{each.name}") for each in node.names)


def found_in_call(node: ast.Call, names: dict[str, str]) -> Iterator[str]:
    first, _, rest = ast.unparse(node.func).partition(".")
    called = ".".join(filter(None, [names.get(first, first), rest]))
    options = dict(given(node))
    if called in UNSAFE_CALLS:
        yield f"call of {called}"
    if called == "torch.load" and not is_constant(options.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    if called == "numpy.load" and len(node.args) > 2:
        options["allow_pickle"] = node.args[2]
    for name in ("allow_pickle", "shell"):
        if name in options and not is_constant(options[name], False):
            yield f"{name} that is not False"
    if called in ("importlib.import_module", "__import__"):
        modules = [each.value for each in node.args if isinstance(each, ast.Constant)]
        yield from (f"import of {name}" for name in modules if str(name).split(".")[0] in UNSAFE_MODULES)


def given(node: ast.Call) -> Iterator[tuple[str, ast.expr]]:
    """The named arguments of a call, those in a literal `**{...}` too."""
    for each in node.keywords:
        if each.arg is not None:
            yield each.arg, each.value
        elif isinstance(each.value, ast.Dict):
            pairs = zip(each.value.keys, each.value.values, strict=True)
            yield from ((str(key.value), value) for key, value in pairs if isinstance(key, ast.Constant))


def is_constant(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


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
        "import importlib\nimportlib.import_module('cloudpickle')",
        "numpy.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "eval(text)",
        "exec(text)",
        "yaml.load(text)",
        "import pandas as pd\npd.read_pickle(path)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, **{'shell': True})",
        "from torch import load\nload(path)",
        "import torch as t\nt.load(path)",
        "import numpy as np\nnp.load(path, None, True)",
        "import builtins\nbuiltins.eval(text)",
        "__import__('pickle')",
        "from pandas import read_pickle\nread_pickle(path)",
        "from yaml import load\nload(text)",
        "import yaml\nyaml.load_all(text)",
        "import os\nos.system(command)",
        "import subprocess\nsubprocess.getoutput(command)",
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
