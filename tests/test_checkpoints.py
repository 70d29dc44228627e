"""Checkpoints that are damaged, foreign, half-written or of another step: what a run makes of them."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import FAULTS, apply
from tiny_task import RegressionTask, train

from tenrec_jax.errors import UserError
from tenrec_jax.sealed import DamagedError
from tenrec_jax.stages import METRICS
from tenrec_jax.training.checkpoints import Checkpoints, Progress, Saved
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.stopping import Stopped, Stopping
from tenrec_jax.training.trainer import FitResult

FOLDER = Path("checkpoints", "regression")


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of a training of four."""
    folder = tmp_path_factory.mktemp("part")
    train(folder, RegressionTask(), epochs=3)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, RegressionTask())


def assert_ends_as(whole: tuple[Path, FitResult], folder: Path) -> None:
    found = train(folder, RegressionTask())
    expected_folder, expected = whole
    assert (found.best_step, found.steps) == (expected.best_step, expected.steps)
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (folder / METRICS).read_bytes() == (expected_folder / METRICS).read_bytes()


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / FOLDER).iterdir() if path.name.isdecimal())


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("count", [10, pytest.param(80, marks=pytest.mark.slow)])
def test_damage_to_any_file_of_any_checkpoint_is_told_and_changes_no_result(
    count: int,
    part: Path,
    whole: tuple[Path, FitResult],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tell: Callable[[str], None],
) -> None:
    """Damage may not concern what a run reads: then nothing is told, and the result is the same."""
    drawn, told, computed_again = np.random.default_rng(count), 0, 0
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(part, folder)
        step = steps(folder)[-1] if number % 2 == 0 else int(drawn.choice(steps(folder)))
        place = folder / FOLDER / str(step)
        path = files_in(place)[number % len(files_in(place))]
        others = [other for other in files_in(folder / FOLDER) if other != path]
        fault, other = FAULTS[number % len(FAULTS)], others[int(drawn.integers(len(others)))]
        differs = path.read_bytes() != other.read_bytes()
        apply(fault, path, other, drawn)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert_ends_as(whole, folder)
        if step == steps(part)[-1] and (fault != "swap" or differs):
            assert f"checkpoint {step} cannot be used and is kept as" in caplog.text, (path, caplog.text)
            again = "going on from step 10: 5 steps are computed again, with the same result"
            assert again in caplog.text or fault == "swap"  # which damages another one too
            kept = list((folder / FOLDER).glob(f"{step}.set-aside*"))
            assert kept
            assert len(files_in(kept[0])) >= len(files_in(part / FOLDER / str(step))) - 1
        told += "cannot be used" in caplog.text
        computed_again += "computed again" in caplog.text
        shutil.rmtree(folder)
    tell(f"checkpoints: {count} damages, {told} told, {computed_again} fell back, 0 wrong results")


def test_after_damage_to_all_checkpoints_a_run_begins_anew(
    part: Path, whole: tuple[Path, FitResult], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(part, folder)
    for step in steps(folder):
        (folder / FOLDER / str(step) / "progress.json").write_text("{}")
    assert_ends_as(whole, folder)


def test_checkpoints_under_each_others_names_are_not_taken(
    part: Path, whole: tuple[Path, FitResult], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(part, folder)
    first, last = steps(folder)[0], steps(folder)[-1]
    for old, new in ((first, "aside"), (last, first), ("aside", last)):
        (folder / FOLDER / str(old)).rename(folder / FOLDER / str(new))
    assert_ends_as(whole, folder)


def test_what_a_kill_left_half_written_is_removed(part: Path, whole: tuple[Path, FitResult], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(part, folder)
    shutil.copytree(folder / FOLDER / "15", folder / FOLDER / "20.writing")
    (folder / FOLDER / "20.writing" / "manifest.json").unlink()
    assert_ends_as(whole, folder)
    assert not list((folder / FOLDER).glob("*.writing"))


def test_files_of_an_earlier_time_are_brought_up_to_the_checkpoint(
    part: Path, whole: tuple[Path, FitResult], tmp_path: Path
) -> None:
    """After a power cut the lines that a checkpoint counts on may be gone, or others may stand there."""
    for name, text in (("gone", None), ("older", ""), ("other", '{"stage": "regression", "step": 3, "loss": 9}\n')):
        folder = tmp_path / name
        shutil.copytree(part, folder)
        (folder / METRICS).unlink()
        if text is not None:
            (folder / METRICS).write_text(text)
        assert_ends_as(whole, folder)


class AskedOnce(Stopping):
    """Is told to stop while a step is done."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.steps_left = step

    @property
    def asked(self) -> bool:
        self.steps_left -= 1
        return self.steps_left == 0


@pytest.mark.parametrize("step", [1, 14, 15, 16, 19, 20, 21, 30, 44])
def test_a_stop_after_any_step_leaves_the_result_and_the_metrics_as_they_were(
    step: int, tmp_path: Path, stopped_whole: tuple[Path, FitResult]
) -> None:
    """Windows of steps end at 20 and 40, and at the evaluations after 15, 30 and 45."""
    with pytest.raises(Stopped, match=rf"after step {step}; everything is saved"):
        train(tmp_path, RegressionTask(), epochs=9, evaluate_every=3, stopping=AskedOnce(step))
    assert steps(tmp_path)[-1] == step
    found, (folder, expected) = train(tmp_path, RegressionTask(), epochs=9, evaluate_every=3), stopped_whole
    for a, b in zip(jax.tree.leaves(found.parameters), jax.tree.leaves(expected.parameters), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (tmp_path / METRICS).read_bytes() == (folder / METRICS).read_bytes()


@pytest.fixture(scope="module")
def stopped_whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FitResult]:
    folder = tmp_path_factory.mktemp("unstopped")
    return folder, train(folder, RegressionTask(), epochs=9, evaluate_every=3)


def test_the_checkpoint_of_another_run_is_refused(part: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(part, folder)
    parallel = DataParallel(jax.local_devices()[:1])
    for origin, message in (
        ({"stage": "regression", "seed": 1}, r"another run: its seed is 0, this run's 1"),
        ({"stage": "ranking", "seed": 0}, r"another run: its stage is 'regression', this run's 'ranking'"),
    ):
        with pytest.raises(UserError, match=message):
            Checkpoints(folder / FOLDER, parallel, origin).latest({})


def test_the_two_latest_and_the_best_are_kept(tmp_path: Path) -> None:
    parallel = DataParallel(jax.local_devices()[:1])
    checkpoints, progress = Checkpoints(tmp_path, parallel, {}), Progress()
    for step, value in ((1, 0.1), (2, 0.9), (3, 0.2), (4, 0.9), (5, 0.3)):
        progress = progress._replace(step=step)
        checkpoints.save({"x": jnp.full(3, float(step))}, Saved(progress, {}, {"log": f"{step}"}))
        progress = progress.after(value)
    checkpoints.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    assert (progress.best_step, progress.evaluations_since_best) == (2, 3)  # the first of equal ones
    like = parallel.shapes({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    state, saved = checkpoints.latest(like)
    np.testing.assert_array_equal(state["x"], np.full(3, 5.0))
    assert saved.logs == {"log": "5"}
    assert saved.progress.best_step == 2
    (tmp_path / "2" / "progress.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"2/progress\.json is damaged"):
        checkpoints.restore(2, like)
    checkpoints.close()


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    parallel = DataParallel(jax.local_devices()[:1])
    checkpoints = Checkpoints(tmp_path, parallel, {})
    checkpoints.save({"x": jnp.ones(3)}, Saved(Progress(step=1), {}, {}))
    checkpoints.finish()
    with pytest.raises(UserError, match="does not fit this configuration"):
        checkpoints.latest(parallel.shapes({"x": jax.ShapeDtypeStruct((4,), jnp.float32)}))
    checkpoints.close()
