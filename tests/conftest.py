"""Settings of the test session, made before JAX starts."""

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import pytest
import short_training

PROOF = "proof"
LONG = ("test_kills.py", "test_worker_kills.py", "test_notebooks.py", "test_page.py", "test_training.py")
# Compiling is most of what these tests do, and their arrays are tiny: XLA's optimisations would cost more than they save.
QUICK = "--xla_backend_optimization_level=0"
# From 0.11.1 on XLA does not know the first of these flags, and one that it does not know ends the process. The others keep compilation on
# one thread, since each worker has one core; they were not tried with later versions.
if jax.__version_info__ < (0, 11, 1):
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    QUICK += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
# Traced programs are many objects that live on: looking for garbage among them as often as usual takes a tenth of the time.
gc.set_threshold(200_000, 20, 50)
# The CPU also where there is a GPU, unless the environment names one: here and in the processes that tests start.
jax.config.update("jax_platforms", os.environ.setdefault("JAX_PLATFORMS", "cpu"))
# Four virtual CPU devices, so that data parallelism is tested for real.
jax.config.update("jax_num_cpu_devices", 4)
# Several tests compile the same small models: the second one reads the first one's result.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="tenrec_jax_xla_"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Code is compiled as `short_training` does it."""
    short_training.quick_compilation()
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def short_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of `short_training`."""
    folder = tmp_path_factory.mktemp("log")
    short_training.write_table(folder)
    return folder / "table"


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds one small artefact of each kind, whole; not to be changed."""
    # It brings PyTorch along, which most tests do without.
    import small_artefacts

    root = tmp_path_factory.mktemp("artefacts")
    small_artefacts.write(root)
    return root


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without matplotlib."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Tells a count of a proof, which the session prints at its end."""
    return partial(record_property, PROOF)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files whose tests take longest come first, so that no core stands idle at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for state in ("passed", "failed") for report in terminalreporter.stats.get(state, [])]
    told = [text for report in reports for name, text in report.user_properties if name == PROOF]
    if told:
        terminalreporter.section("proofs")
        terminalreporter.write_line("\n".join(dict.fromkeys(told)))
