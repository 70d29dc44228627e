"""Sweeps: what they try, how their units are run, stopped and resumed, and the order in which they end."""

import dataclasses
import itertools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny_run
from launched import DEADLINE, ROOT, in_this_process

from experiments import launch
from tenrec_jax.__main__ import main
from tenrec_jax.config import RunConfig, from_mapping
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.compare import compare
from tenrec_jax.files import locked
from tenrec_jax.sweep.leaderboard import leaderboard, text
from tenrec_jax.sweep.pool import Job, Pool
from tenrec_jax.sweep.record import Choices, Domain, Integers, Interval, Sweep, read_sweep, short_names, with_settings
from tenrec_jax.sweep.run import run_sweep, unit_command
from tenrec_jax.sweep.search import Trial, next_round
from tenrec_jax.sweep.units import Unit, read_units
from tenrec_jax.training.stopping import Stopped

RATE = "retrieval.train.optimizer.learning_rate"
DOMAINS: dict[str, Domain] = {
    RATE: Interval(1e-4, 1e-1, log=True),
    "width": Integers(2, 9),
    "on": Choices((True, False)),
}


def sweep_of(**changes: Any) -> Sweep:
    given: dict[str, Any] = {
        "base": "c.py",
        "parameters": {RATE: Choices((1e-3, 1e-2))},
        "objective": "retrieval ndcg@10",
    }
    return Sweep(**(given | changes))


def played(sweep: Sweep, before: int = 0) -> list[dict[str, Any]]:
    """All settings of a sweep whose objective is near a rate of 0.01; the first trials are told again, as after an interruption."""
    tried: list[Trial] = []
    while drawn := next_round(sweep, tried):
        if len(tried) < before:
            drawn = next_round(sweep, [Trial(dict(trial.settings), trial.value) for trial in tried])
        tried += [Trial(settings, -abs(settings[RATE] - 0.01) if settings["on"] else None) for settings in drawn]
    return [dict(trial.settings) for trial in tried]


def test_a_grid_is_every_combination_once() -> None:
    sweep = sweep_of(parameters={"a": Choices((1, 2, 3)), "b": Choices(("x", "y")), "c": Choices(((1, 2), (3, 4)))})
    drawn = next_round(sweep, ())
    assert [tuple(settings.values()) for settings in drawn] == list(
        itertools.product((1, 2, 3), ("x", "y"), ((1, 2), (3, 4)))
    )
    assert next_round(sweep, [Trial(settings, 0.0) for settings in drawn]) == []


def test_an_ablation_changes_one_setting_at_a_time() -> None:
    sweep = sweep_of(parameters={RATE: Choices((2.0, 3.0)), "on": Choices((False,))}, search="ablation")
    drawn = next_round(sweep, ())
    assert drawn == [{}, {RATE: 2.0}, {RATE: 3.0}, {"on": False}]
    assert next_round(sweep, [Trial(settings, 0.0) for settings in drawn]) == []


@pytest.mark.parametrize("search", ["random", "tpe"])
def test_draws_lie_in_their_domains_differ_and_follow_from_seed_and_results_alone(search: str) -> None:
    sweep = sweep_of(parameters=DOMAINS, search=search, trials=18, seed=3)
    drawn = played(sweep)
    assert drawn == played(sweep, before=9)
    assert drawn != played(dataclasses.replace(sweep, seed=4))
    assert len(drawn) == 18 == len({json.dumps(settings) for settings in drawn})
    for settings in drawn:
        assert 1e-4 <= settings[RATE] <= 1e-1
        assert settings["width"] in range(2, 10)
        assert settings["on"] in (True, False)


def test_a_search_ends_when_nothing_new_is_left() -> None:
    for search in ("random", "tpe"):
        sweep = sweep_of(parameters={RATE: Choices((1.0, 2.0)), "on": Choices((True, False))}, search=search, trials=9)
        assert len(played(sweep)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {}}, "parameters is empty"),
        ({"parameters": {"data.split_seed": Choices((0, 1))}}, "data.split_seed cannot vary"),
        (
            {"parameters": {"evaluation.exclude_seen": Choices((True, False))}},
            "cannot vary: it decides what is measured",
        ),
        ({"settings": {RATE: 0.1}}, "stands in parameters and in settings"),
        ({"parameters": {RATE: Interval(0.1, 0.2)}}, "Interval, of which 'grid' cannot take every value"),
        ({"trials": 3}, "the search 'grid' takes every value"),
        ({"trials": 3, "search": "ablation"}, "the search 'ablation' takes every value"),
        ({"search": "tpe"}, "trials is 0"),
        ({"search": "gird"}, "search is 'gird'"),
        ({"objective": "retrieval auc"}, "objective is 'retrieval auc'"),
        ({"objective": "click pcoc"}, "one of click, like, share, follow and one of auc, gauc, log_loss, ece"),
        ({"objective": "klick auc"}, "objective is 'klick auc'"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep_of(**changes)


def test_the_direction_is_the_metrics_own() -> None:
    assert sweep_of(objective="click gauc").larger_is_better
    assert not sweep_of(objective="like log_loss").larger_is_better


def test_a_sweep_file_that_cannot_be_read_is_told_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.py"
    for source, message in (
        ("x = 1\n", r"sweep\.py must define get_sweep\(\)"),
        ("def get_sweep():\n    return nothing\n", r"sweep\.py:2: NameError"),
        ("def get_sweep(:\n", r"sweep\.py:1: SyntaxError"),
    ):
        file.write_text(source)
        with pytest.raises(UserError, match=message):
            read_sweep(file)


@pytest.mark.parametrize(
    ("parameters", "objective", "flags", "message"),
    [
        ("'seed': Choices((1, 2))", "retrieval mrr", ["--stages=data"], "--stages does not go together with --sweep"),
        ("'seed': Choices((1, 2))", "retrieval mrr", ["--num_processes=2"], "--num_processes does not go together"),
        ("'retrieval.trian.epochs': Choices((1, 2))", "retrieval mrr", [], "Did you mean config.retrieval.train?"),
        ("'retrieval.train.epochs': Choices((1, 0))", "retrieval mrr", [], "epochs is 0; it must be at least 1"),
        ("'seed': Choices((1, 2))", "click gauc", [], "is of the ranking stage, which is off"),
    ],
)
def test_the_command_line_refuses_a_sweep_that_cannot_be_before_any_work(
    parameters: str,
    objective: str,
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    file, base = tmp_path / "sweep.py", ROOT / "tests" / "tiny_run.py"
    given = f"{str(base)!r}, {{{parameters}}}, {objective!r}"
    file.write_text(f"from tenrec_jax.sweep.record import *\ndef get_sweep():\n    return Sweep({given})\n")
    how = [f"--sweep={file}", f"--workdir={tmp_path / 'sweep'}", "--dry_run", *flags]
    with in_this_process(monkeypatch, *how) as arguments:
        assert launch.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_a_table_of_all_experiments_is_asked_for_in_any_way_that_flags_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for way in ("--list", "-list", "--list=true"):
        with in_this_process(monkeypatch, way) as arguments:
            assert launch.main(arguments) == 0
        assert "`tenrec.py:ctr_1m`" in capsys.readouterr().out


def test_names_are_as_short_as_they_can_be() -> None:
    keys = {"retrieval.train.epochs": 1, "ranking.train.epochs": 2, "seed": 0}
    assert short_names(keys) == {
        "retrieval.train.epochs": "retrieval.train.epochs",
        "ranking.train.epochs": "ranking.train.epochs",
        "seed": "seed",
    }
    assert short_names({"retrieval.train.epochs": 1, "retrieval.negatives": 2}) == {
        "retrieval.train.epochs": "epochs",
        "retrieval.negatives": "negatives",
    }


SAVES = """
import os, signal, sys
from pathlib import Path
def save(number, _):
    Path(sys.argv[1], "saved").write_text("")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "ready").write_text("")
signal.pause()
"""
STOPS_THE_SWEEP = """
import os, signal, sys
from pathlib import Path
Path(sys.argv[1], "ready").read_text()
os.kill(os.getppid(), int(sys.argv[2]))
signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_all_units_save_and_ends_the_sweep(number: signal.Signals, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ready")
    scripts = {"saves": (SAVES,), "stops": (STOPS_THE_SWEEP,), "waits": ("open('started', 'w')",)}
    jobs = [
        Job(name, (sys.executable, "-c", *script, str(tmp_path), str(int(number))), tmp_path / f"{name}.txt")
        for name, script in scripts.items()
    ]
    with pytest.raises(Stopped) as stopped, Pool.opened(2, grace_seconds=DEADLINE) as pool:
        list(pool.run(jobs))
    assert stopped.value.exit_code == 128 + number
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "waits.txt").exists()


def test_jobs_share_cores_and_gpus_and_their_failures_are_theirs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    for name in ("NPROC", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    script = (
        "import os, sys; print(os.environ['NPROC'], os.environ['CUDA_VISIBLE_DEVICES']); sys.exit(int(sys.argv[1]))"
    )
    jobs = [Job(str(code), (sys.executable, "-c", script, str(code)), tmp_path / f"{code}.txt") for code in (3, 0)]
    with Pool.opened(2) as pool:
        assert {done.job.name: done.code for done in pool.run(jobs)} == {"3": 3, "0": 0}
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    printed = [(tmp_path / f"{code}.txt").read_text() for code in (3, 0)]
    assert printed == [f"{threads} 4\n", f"{threads} 7\n"]
    with pytest.raises(UserError, match="names 2 GPUs"), Pool.opened(3):
        pass


@pytest.fixture(scope="module")
def base(short_table: Path) -> RunConfig:
    """Of a run that takes seconds, on the log of `short_table`."""
    config: RunConfig = from_mapping(tiny_run.get_config().to_dict())
    return with_settings(config, {"data.path": str(short_table.parent / "log.csv"), "retrieval.train.epochs": 2})


def command(base: RunConfig) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "experiments" / "launch.py")),
        *(f"--config={ROOT / 'tests' / 'tiny_run.py'}", f"--config.data.path={base.data.path}"),
        "--config.retrieval.train.epochs=2",
    ]


# Seeds share their programs: the second unit takes what the first one has compiled.
SWEEP = sweep_of(parameters={"seed": Choices((0, 1))}, objective="retrieval recall@10")


def test_a_units_command_gives_its_configuration(base: RunConfig, tmp_path: Path) -> None:
    settings = {RATE: 1.2345678901234567e-05, "ranking.action_weights": (1.0, 2, 0.5, 3), "ranking.any_order": True}
    made = unit_command(["launch.py"], Unit(0, settings, tmp_path))
    assert f"--config.{RATE}=1.2345678901234568e-05" in made
    assert "--config.ranking.action_weights=(1.0, 2, 0.5, 3)" in made
    assert "--config.ranking.any_order=true" in made
    assert made[-1] == "--stages=data,retrieval,index,ranking,validate"


def test_a_sweep_resumes_orders_its_units_by_validation_and_opens_the_winners_test_alone(
    base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }.items():
        monkeypatch.setenv(name, value)
    held = tmp_path / "units" / "001-seed=1"
    with locked(held / ".lock", "tests"):  # the unit finds another process in its folder, and fails
        board = run_sweep(SWEEP, base, tmp_path, command(base), parallel=2)
    assert board.failed == (held.name,)
    assert "Another process runs in" in (held / "log.txt").read_text()
    assert [place.unit for place in board.places] == ["000-seed=0"]
    assert not list(tmp_path.rglob("test_opened.json"))
    first = tmp_path / "units" / board.places[0].unit
    before = (first / "eval" / "val.json").stat().st_mtime_ns

    board = run_sweep(SWEEP, base, tmp_path, command(base), parallel=2)
    assert (first / "eval" / "val.json").stat().st_mtime_ns == before
    values = {
        unit.name: json.loads((unit.workdir / "eval" / "val.json").read_text())["retrieval"]["recall@10"]
        for unit in read_units(tmp_path)
    }
    assert [place.unit for place in board.places] == sorted(values, key=lambda name: -values[name]["value"])
    assert {place.unit: place.objective for place in board.places} == values
    best, other = (tmp_path / "units" / place.unit for place in board.places)
    assert [path.parents[1] for path in tmp_path.rglob("test_opened.json")] == [best]
    assert not (other / "eval" / "predictions.parquet").exists()
    (difference,) = [
        row for row in compare([best], [other], part="validation").metrics if row.metric == SWEEP.objective
    ]
    assert (board.places[1].less_reference, board.places[1].differs) == (difference.difference, difference.is_real)
    # Of an ablation the base is the reference, here the worse one.
    units = [dataclasses.replace(u, settings={} if u.workdir == other else u.settings) for u in read_units(tmp_path)]
    ablation = leaderboard(dataclasses.replace(SWEEP, search="ablation"), units, ())
    (difference,) = [
        row for row in compare([other], [best], part="validation").metrics if row.metric == SWEEP.objective
    ]
    assert (ablation.reference, ablation.places[0].less_reference) == (other.name, difference.difference)
    written = json.loads((tmp_path / "leaderboard.json").read_text())
    assert written == json.loads(json.dumps(board.to_json()))
    assert (
        written["test"]["value"]
        == json.loads((best / "eval" / "test.json").read_text())["retrieval"]["recall@10"]["value"]
    )
    assert f"Chosen on the validation part alone: {best.name}." in text(board)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 2
    for place in board.places:
        assert f"{place.objective['value']:.4f}" in page
        assert place.unit in page

    assert main(["compare", str(best), str(other), "--part", "validation"]) == 0
    assert SWEEP.objective in capsys.readouterr().out
    assert main(["compare", str(best), str(other)]) == 2
    assert "--part validation" in capsys.readouterr().err

    changed = dataclasses.replace(SWEEP, objective="retrieval mrr")
    with pytest.raises(UserError, match="objective: 'retrieval recall@10' in the workdir, 'retrieval mrr' now"):
        run_sweep(changed, base, tmp_path, command(base))
