"""The ranker's rivals: what they may know of a timeline, their layers against plain NumPy, and the command that trains them."""

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import both_stages
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from flax import nnx
from sklearn.metrics import roc_auc_score
from test_models import VOCABULARY, packed, timeline

from tenrec_jax import stages
from tenrec_jax.__main__ import main as tenrec_jax
from tenrec_jax.config import STAGES, RunConfig, default_config, from_mapping
from tenrec_jax.models.ranker import TimelineRanker
from tenrec_jax.models.slots import slots_of
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.timeline import Events, Timeline

FOLDER = Path(__file__).parents[1] / "experiments" / "baselines"
LENGTH, WINDOW = 12, 4
SIZES = {
    "din": {"window": WINDOW, "attention": (8, 4), "hidden": (8, 4)},
    "dcn_v2": {"cross_layers": 2, "hidden": (8, 4)},
    "gru": {"state": 8, "hidden": (8, 4)},
}


@pytest.fixture(scope="module")
def train() -> Iterator[Any]:
    """The command's module; scripts find each other in their own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("train")
        for name in ("train", "tune", "layers", *SIZES):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tune(train: Any) -> Any:
    """The module of the command that tunes."""
    return importlib.import_module("tune")


def randomised(module: nnx.Module) -> nnx.Module:
    """The module with all parameters drawn, since some layers are zero at first."""
    graphdef, parameters = nnx.split(module)
    leaves, structure = jax.tree.flatten(parameters)
    random = np.random.default_rng(0)
    drawn = [0.5 * random.standard_normal(leaf.shape, np.float32) for leaf in leaves]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, map(jax.numpy.asarray, drawn)))


@pytest.fixture(scope="module")
def rivals(train: Any) -> dict[str, TimelineRanker]:
    """Each rival at tiny widths."""
    config = default_config().ranking.model
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, width=8))
    made = {}
    for name, sizes in SIZES.items():
        kind, settings = train.MODELS[name]
        made[name] = randomised(kind(config, VOCABULARY, settings(**sizes), rngs=nnx.Rngs(0)))
    return made


@pytest.fixture(scope="module")
def logits(rivals: dict[str, TimelineRanker]) -> dict[str, Callable[[Timeline], np.ndarray]]:
    """What each rival says of one row of three timelines, of `LENGTH` slots each."""

    def of(model: TimelineRanker) -> Callable[[Timeline], np.ndarray]:
        function = jax.jit(model.timeline_logits)
        return lambda row: np.asarray(function(row)).reshape(3, LENGTH, -1)

    return {name: of(model) for name, model in rivals.items()}


def with_events(row: Timeline, change: Callable[[np.ndarray], None]) -> Timeline:
    """The row with a change made to a copy of its items, categories and actions."""
    events = row.events._replace(**{name: getattr(row.events, name).copy() for name in ("item", "category", "action")})
    for field in (events.item, events.category, events.action):
        change(field[0])
    return row._replace(events=events)


def flipped(slots: slice) -> Callable[[np.ndarray], None]:
    """Other ids and actions in some slots."""

    def change(field_T: np.ndarray) -> None:
        field_T[slots] = 1 - field_T[slots] if field_T.ndim > 1 else (field_T[slots] + 1) % VOCABULARY.categories

    return change


@pytest.fixture
def row() -> Timeline:
    """Three timelines in a row, all of whose events may be seen but the sixth one of the second."""
    full = packed(timeline(LENGTH, real=LENGTH))
    mask = full.events.mask.copy()
    mask[0, LENGTH + 5] = False
    return full._replace(events=full.events._replace(mask=mask))


@pytest.mark.parametrize("name", SIZES)
def test_a_rival_sees_neither_its_own_actions_nor_later_events_nor_those_held_out(
    name: str, logits: dict[str, Callable[[Timeline], np.ndarray]], row: Timeline
) -> None:
    says, first = logits[name], LENGTH
    whole = says(row)
    for t in (0, 4, 9):
        # The event's own actions, and all that comes after it.
        later = with_events(row, flipped(slice(first + t + 1, None)))
        later.events.action[0, first + t] = 1 - row.events.action[0, first + t]
        np.testing.assert_array_equal(says(later)[1, : t + 1], whole[1, : t + 1])
    held_out = says(with_events(row, flipped(slice(first + 5, first + 6))))
    np.testing.assert_array_equal(np.delete(held_out[1], 5, axis=0), np.delete(whole[1], 5, axis=0))
    # The event before is seen: its actions alone make a difference.
    seen = row.events.action.copy()
    seen[0, first + 3] = 1 - seen[0, first + 3]
    changed = says(row._replace(events=row.events._replace(action=seen)))
    np.testing.assert_array_equal(changed[1, :4], whole[1, :4])
    assert (np.abs(changed[1, 4] - whole[1, 4]) > 1e-4).all()
    if name == "din":
        np.testing.assert_array_equal(changed[1, 3 + WINDOW + 1 :], whole[1, 3 + WINDOW + 1 :])
        assert (np.abs(changed[1, 3 + WINDOW] - whole[1, 3 + WINDOW]) > 1e-4).all()


@pytest.mark.parametrize("name", SIZES)
def test_nothing_passes_from_one_packed_timeline_to_the_next(
    name: str, logits: dict[str, Callable[[Timeline], np.ndarray]], row: Timeline
) -> None:
    whole, slots = logits[name](row), row.events.item.shape[1]
    for place in range(3):
        stretch = slice(place * LENGTH, (place + 1) * LENGTH)
        fields = [np.zeros_like(field) for field in row.events]
        for field, source in zip(fields, row.events, strict=True):
            field[:, :LENGTH] = source[:, stretch]
        profile = type(row.profile)(*(np.roll(field, -place, axis=1) for field in row.profile))
        alone = Timeline(profile, np.array([[0, slots, slots, slots]]), Events(*fields))
        np.testing.assert_allclose(logits[name](alone)[0], whole[place], atol=1e-5)


def prelu(x: np.ndarray, slope: Any) -> np.ndarray:
    return np.where(x >= 0, x, float(slope[...]) * x)


def linear(x: np.ndarray, layer: Any) -> np.ndarray:
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def sample(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def slots(row: Timeline) -> Any:
    found = slots_of(row.start, row.events.item.shape[1])
    return SimpleNamespace(
        place=np.asarray(found.place), segment=np.asarray(found.segment), first=np.asarray(found.first)
    )


def test_dins_attention_equals_a_loop_over_pairs(rivals: dict[str, Any], row: Timeline) -> None:
    din, place = rivals["din"], slots(row).place
    h, t, mask = sample(36, 8), sample(8, 36).T, row.events.mask[0]
    expected, unit = np.zeros((36, 8)), din.unit
    for target in range(36):
        for event in range(target - min(WINDOW, place[0, target]), target):
            pair = np.concatenate([h[event], t[target], h[event] * t[target], h[event] - t[target]])
            x = prelu(linear(pair, unit.first), unit.activation.negative_slope)
            for layer, activation in zip(unit.rest.layers, unit.rest.activations, strict=True):
                x = prelu(linear(x, layer), activation.negative_slope)
            expected[target] += mask[event] * linear(x, unit.weight) * h[event]
    found = din.attend(*(np.float32(x)[None] for x in (h, t)), place, row.events.mask)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4)


def test_the_cross_network_equals_its_formula_element_by_element(rivals: dict[str, Any]) -> None:
    cross, x0 = rivals["dcn_v2"].cross, sample(3, 7 * 8)
    x = x0
    for layer in cross.layers:
        kernel, bias = (np.asarray(value[...], np.float64) for value in (layer.kernel, layer.bias))
        x = np.array(
            [[x0[n, i] * (kernel[:, i] @ x[n] + bias[i]) + x[n, i] for i in range(x0.shape[1])] for n in range(len(x0))]
        )
    np.testing.assert_allclose(cross(np.float32(x0)), x, rtol=1e-4, atol=1e-4)


def test_the_recurrent_states_equal_a_loop_over_tokens(rivals: dict[str, Any], row: Timeline) -> None:
    gru, first, mask = rivals["gru"], slots(row).first, row.events.mask
    x, state, expected = sample(36, 8), np.zeros(8), []
    cell = gru.cell
    for t in range(36):
        state = np.zeros(8) if first[0, t] else state
        of_x = linear(x[t], cell.dense_i)
        of_state = state @ np.asarray(cell.dense_h.kernel[...], np.float64)
        reset, update = (1 / (1 + np.exp(-(of_x[part] + of_state[part]))) for part in (slice(0, 8), slice(8, 16)))
        new = (1 - update) * np.tanh(of_x[16:] + reset * of_state[16:]) + update * state
        state = new if mask[0, t] else state
        expected.append(state)
    np.testing.assert_allclose(gru.states(np.float32(x)[None], first, mask)[0], expected, atol=1e-5)


def tiny() -> RunConfig:
    """Both stages on a twin of 1,000 rows, two epochs of ranking."""
    config = from_mapping(both_stages.get_config().to_dict())
    training = dataclasses.replace(config.ranking.train, epochs=2)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, twin_rows=1000),
        index=dataclasses.replace(config.index, kind="exact"),
        retrieval=dataclasses.replace(config.retrieval, train=training),
        ranking=dataclasses.replace(config.ranking, train=training),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with its log; of the other stages a rival reads nothing but that they are finished."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    Pipeline(tiny(), workdir).run(["data"])
    stages.write(workdir, stages.read(workdir) | {stage: {} for stage in STAGES[1:]})
    return workdir


@pytest.mark.usefixtures("quick_compilation")
def test_the_command_trains_validates_and_reads_the_test_part_once(
    train: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "gru"
    command = ["--run", str(run), "--model", "gru", "--out", str(out), "--settings.state=8", "--settings.hidden=[8, 4]"]
    assert train.main([*command, "--validate_only"]) == 0
    assert sorted(file.name for file in (out / "eval").iterdir()) == ["val.json", "val_predictions.parquet"]
    results = json.loads((out / "eval" / "val.json").read_text())
    found = pq.read_table(out / "eval" / "val_predictions.parquet").to_pydict()
    assert results["ranking"]["click"]["auc"]["value"] == pytest.approx(
        roc_auc_score(found["click"], found["score_click"])
    )
    assert results["data_sha256"] == json.loads((run / "data.json").read_text())["sha256"]
    trained = (out / "metrics.jsonl").read_bytes()
    for _ in range(2):
        assert train.main(command) == 0
        assert json.loads((out / "eval" / "test_opened.json").read_text())["times"] == 1
    assert (out / "metrics.jsonl").read_bytes().startswith(trained)
    assert "tenrec-jax compare" in capsys.readouterr().out
    assert tenrec_jax(["compare", str(out), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "\nclick gauc " in printed
    assert "\n0 of " in printed  # differences from itself
    assert "not compared: retrieval: not all runs retrieve" in printed
    # Another rival has a folder of its own.
    assert train.main([*command, "--config.ranking.train.epochs=3"]) == 2
    assert "config.ranking.train.epochs: 2 in the workdir, 3 now" in capsys.readouterr().err


def test_the_command_says_what_it_cannot_do(
    train: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refused(*changes: str, at: Path = run) -> str:
        assert train.main(["--run", str(at), "--model", "din", "--out", str(tmp_path / "out"), *changes]) == 2
        return capsys.readouterr().err

    assert "holds no run that has finished its stage evaluate" in refused(at=tmp_path / "none")
    Pipeline(tiny(), tmp_path / "young").run(["data"])
    assert "finished its stage evaluate" in refused(at=tmp_path / "young")
    assert "config.data.protocol is the run's" in refused("--config.data.protocol=leave_one_out")
    assert "has no ranker" in refused("--config.ranking.enabled=false")
    assert "Did you mean config.ranking.train.epochs?" in refused("--config.ranking.train.epoch=3")
    assert "settings.window is 0; it must be at least 1" in refused("--settings.window=0")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert "is not empty, and holds no rival" in refused()
    with pytest.raises(SystemExit, match="2"):
        train.main(["--run", str(run), "--model", "din", "--out", str(tmp_path), "--epochs=3"])


def test_all_models_are_tuned_by_the_same_grid(tune: Any, tmp_path: Path) -> None:
    settings = {
        model: [trial.settings for trial in tune.trials_of(model, tmp_path, ("--config.ranking.train.epochs=3",))]
        for model in (*SIZES, "fastformer")
    }
    (grid,) = set(map(tuple, settings.values()))
    assert len(set(grid)) == np.prod([len(values) for _, values in tune.GRID])
    assert all(trial[0] == "--config.ranking.train.epochs=3" for trial in grid)


def test_the_table_of_trials_has_the_best_of_each_model_first(tune: Any, tmp_path: Path) -> None:
    trials = [*tune.trials_of("din", tmp_path, ())[:4], *tune.trials_of("gru", tmp_path, ())[:4]]
    for number, trial in enumerate(trials):
        value = 0.5 + 0.01 * (number % 3)
        click = {name: {"value": value, "low": value - 0.1, "high": value + 0.1} for name in ("auc", "gauc")}
        (trial.out / "eval").mkdir(parents=True)
        (trial.out / "eval" / "val.json").write_text(json.dumps({"ranking": {"click": click}}))
    names = [line.split()[0] for line in tune.table(trials).splitlines()[1:]]
    assert names == ["din-2", "din-1", "din-0", "din-3", "gru-1", "gru-0", "gru-3", "gru-2"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--models", "din,dien"], "dien is no model"),
        (["--parallel", "0"], "--parallel is 0"),
        (["--epochs=3"], "'--epochs=3' is neither a flag nor --config.KEY=VALUE"),
    ],
)
def test_tuning_says_what_it_cannot_do(
    changes: list[str], message: str, tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--run", str(tmp_path), "--out", str(tmp_path / "out"), *changes])
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_tuning_goes_on_where_it_was_and_tells_what_failed(
    tune: Any, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["--run", str(run), "--out", str(tmp_path), "--models", "fastformer", "--parallel", "2"]
    assert tune.main(command) == 0
    printed = capsys.readouterr().out
    assert [line.split("-")[0] for line in printed.splitlines()[1:]] == ["fastformer"] * len(
        tune.trials_of("fastformer", tmp_path, ())
    )
    assert not list(tmp_path.glob("*/eval/test*"))
    assert tune.main(command) == 0
    assert capsys.readouterr().out == printed
    assert tune.main([*command, "--config.ranking.train.epoch=3"]) == 1
    assert "fastformer-0 failed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_is_compared_with_each_of_its_rivals(train: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Pipeline(tiny(), tmp_path / "run").run()
    for name in SIZES:
        out = tmp_path / name
        assert train.main(["--run", str(tmp_path / "run"), "--model", name, "--out", str(out)]) == 0
        for part in ("test", "validation"):
            capsys.readouterr()
            assert tenrec_jax(["compare", str(tmp_path / "run"), str(out), "--part", part, "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert found["mismatches"] == []
            assert "click auc" in [metric["metric"] for metric in found["metrics"]]
