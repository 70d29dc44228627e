"""Tune the ranker and its rivals with equal effort: the same grid for each of them, judged on the validation rows of one run.

    python experiments/launch.py --config=experiments/configs/ranking.py --workdir=runs/ranking --stages=data
    python experiments/baselines/tune.py --run runs/ranking --out runs/tuning --parallel 8

A trial is `train.py --validate_only` in a process of its own, in OUT/MODEL-NUMBER, and what it prints in its `log.txt`; so the test part
stays unread, and the same command again goes on. Arguments --config.KEY=VALUE hold for all trials. The best of a model is chosen as its
epochs are, by the mean of click AUC and GAUC. The table names for each the settings to be read on the test part.
"""

import argparse
import itertools
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from train import MODELS

from tenrec_jax.evaluation.tables import aligned, interval
from tenrec_jax.files import read_json, write_text

# What varies: settings of the ranking stage that take a value together, and the values. They mean the same in all models.
GRID: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = (
    (("train.optimizer.learning_rate",), (2e-3, 6e-3)),
    (("model.features.dropout", "model.encoder.dropout"), (0.1, 0.25, 0.4)),
)
TRAIN = Path(__file__).with_name("train.py")


class Trial(NamedTuple):
    """One model at one point of the grid.

    Attributes:
        model: its name. out: its workdir.
        settings: --config.KEY=VALUE of this trial and of all.
    """

    model: str
    out: Path
    settings: tuple[str, ...]


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, run the trials, print the table.

    Returns:
        The exit code: 0 done, 1 a trial failed, 2 wrong use.
    """
    options, common = _parse(arguments)
    trials = [trial for model in options.models.split(",") for trial in trials_of(model, options.out, common)]
    with ThreadPoolExecutor(options.parallel) as pool:
        codes = list(pool.map(lambda trial: _run(trial, options.run), trials))
    failed = [trial for trial, code in zip(trials, codes, strict=True) if code]
    for trial in failed:
        sys.stderr.write(f"error: {trial.out} failed: see {trial.out / 'log.txt'}\n")
    sys.stdout.write(table([trial for trial in trials if trial not in failed]) + "\n")
    return 1 if failed else 0


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    parser = argparse.ArgumentParser(
        usage="tune.py --run RUN --out DIR [--models NAME,NAME] [--parallel N] [--config.KEY=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, help="workdir of a run that has finished its stage data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the trials")
    parser.add_argument("--models", default=",".join(MODELS), help="all by default")
    parser.add_argument("--parallel", type=int, default=1, help="trials at a time")
    options, common = parser.parse_known_args(arguments)
    unknown = sorted(set(options.models.split(",")) - set(MODELS))
    if unknown:
        parser.error(f"--models: {', '.join(unknown)} is no model. The models are {', '.join(MODELS)}.")
    if options.parallel < 1:
        parser.error(f"--parallel is {options.parallel}; it must be at least 1")
    wrong = [argument for argument in common if not (argument.startswith("--config.") and "=" in argument)]
    if wrong:
        parser.error(f"{wrong[0]!r} is neither a flag nor --config.KEY=VALUE")
    return options, tuple(common)


def trials_of(model: str, out: Path, common: tuple[str, ...]) -> list[Trial]:
    """Every combination of the grid."""
    trials = []
    for number, values in enumerate(itertools.product(*(values for _, values in GRID))):
        varied = [
            f"--config.ranking.{key}={value}" for (keys, _), value in zip(GRID, values, strict=True) for key in keys
        ]
        trials.append(Trial(model, out / f"{model}-{number}", (*common, *varied)))
    return trials


def _run(trial: Trial, run: Path) -> int:
    """The exit code of a trial's process."""
    command = [sys.executable, str(TRAIN), "--run", str(run), "--model", trial.model, "--out", str(trial.out)]
    done = subprocess.run([*command, "--validate_only", *trial.settings], text=True, capture_output=True, check=False)
    if trial.out.is_dir():
        write_text(trial.out / "log.txt", done.stdout + done.stderr)
    else:
        sys.stderr.write(done.stderr)
    return done.returncode


def table(trials: Sequence[Trial]) -> str:
    """The trials, those of a model together, its best first."""
    found = [(trial, read_json(trial.out / "eval" / "val.json")["ranking"]["click"]) for trial in trials]
    found.sort(key=lambda pair: (pair[0].model, -(pair[1]["auc"]["value"] + pair[1]["gauc"]["value"])))
    rows = [["trial", "click gauc", "click auc", "settings"]]
    for trial, click in found:
        rows.append([trial.out.name, interval(click["gauc"]), interval(click["auc"]), " ".join(trial.settings)])
    return "\n".join(aligned(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
