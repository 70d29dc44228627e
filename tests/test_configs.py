"""The experiments: every config and variant, what each says of itself, and the table of them all."""

import json
import re
import runpy
from pathlib import Path

import pytest
from launched import in_this_process

from experiments import launch
from tenrec_jax import artifact
from tenrec_jax.config import RunConfig, from_mapping
from tenrec_jax.config_files import listed
from tenrec_jax.errors import UserError
from tenrec_jax.plan import EXAMPLE_VOCABULARY
from tenrec_jax.run_data import refuse_uneven_micro_batches
from tenrec_jax.step_costs import ExampleBatches, programs
from tenrec_jax.sweep.record import read_sweep, with_settings
from tenrec_jax.sweep.search import next_round

ROOT = Path(__file__).parents[1]
EXPERIMENTS = ROOT / "experiments"
CONFIGS = [entry.name for entry in listed(EXPERIMENTS / "configs")]
SWEEPS = [entry.name for entry in listed(EXPERIMENTS / "sweeps")]


def config_of(name: str) -> RunConfig:
    file, _, variant = name.partition(":")
    get_config = runpy.run_path(str(EXPERIMENTS / "configs" / file))["get_config"]
    config: RunConfig = from_mapping((get_config(variant) if variant else get_config()).to_dict())
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_and_variant_gives_models_and_steps_of_its_own_name(name: str) -> None:
    """What a dry run does, without compiling; the dry runs themselves are slow tests of test_pipeline.py."""
    config = config_of(name)
    assert config.name == name.replace(".py", "").replace(":", "_")
    artifact.two_tower(config.retrieval.model, EXAMPLE_VOCABULARY)
    if config.ranking.enabled:
        artifact.ranker(config.ranking.model, EXAMPLE_VOCABULARY)
    for program in programs(config):
        rows, length = ExampleBatches(program.config, EXAMPLE_VOCABULARY, devices=1).shape
        assert 0 <= program.config.events_per_batch - rows * length < length
        refuse_uneven_micro_batches(program.stage, program.config, rows)


def test_the_original_systems_hyperparameters_are_those_that_its_readme_states() -> None:
    config = config_of("original.py")
    encoder = config.ranking.model.encoder
    assert (encoder.width, encoder.hidden, encoder.num_layers, encoder.num_heads) == (512, 1024, 12, 8)
    assert (config.ranking.events_per_batch, config.retrieval.events_per_batch) == (8192, 1024)
    assert config.retrieval.negatives == 127
    assert encoder.remat == "nothing_saveable"


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_has_settings_that_its_config_can_take(name: str) -> None:
    sweep = read_sweep(EXPERIMENTS / "sweeps" / name)
    base = with_settings(config_of(Path(sweep.base).name), sweep.settings)
    drawn = next_round(sweep, ())
    assert len({json.dumps(settings) for settings in drawn}) == len(drawn) > 1
    for settings in drawn:
        with_settings(base, settings)


@pytest.mark.parametrize("name", [*CONFIGS, *SWEEPS])
def test_every_docstring_has_a_command_of_its_own_file_and_what_is_expected(name: str) -> None:
    folder, file = ("sweeps" if name in SWEEPS else "configs"), name.partition(":")[0]
    doc = runpy.run_path(str(EXPERIMENTS / folder / file))["__doc__"]
    command = re.search(r"^Command: +(.*)$", doc, re.MULTILINE)
    assert command
    assert re.match(r"python experiments/launch\.py( |$)", command[1])
    assert f"experiments/{folder}/{file}" in command[1] or file == launch.QUICK_START.name
    assert re.search(r"^Expected: +\S", doc, re.MULTILINE)


def test_the_readme_has_the_table_that_the_launcher_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with in_this_process(monkeypatch, "--list") as arguments:
        assert launch.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(f"`{name}`" in printed for name in (*CONFIGS, *SWEEPS))
    readme = (EXPERIMENTS / "README.md").read_text()
    for table in printed.strip().split("\n\n"):
        assert table in readme, (
            "copy the tables that `python experiments/launch.py --list` prints to experiments/README.md"
        )


def test_a_docstring_without_its_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text('"""Mine.\n\nHardware:  a laptop\n"""\n')
    with pytest.raises(UserError, match=r'mine\.py: its docstring has no line "Time:'):
        listed(tmp_path)
