"""Train a rival of the ranker on the log, split and seed of a run, and evaluate it on the same rows.

    python experiments/baselines/train.py --run runs/quickstart --model din --out runs/din
    python experiments/baselines/train.py --run runs/quickstart --model gru --out runs/gru --validate_only \\
        --config.ranking.train.optimizer.learning_rate=1e-3 --settings.state=64
    tenrec-jax compare runs/quickstart runs/din

Training, batches, choice of the epoch and evaluation are those of the run's ranker, as the run's config.json has them. Any setting of the
ranking stage, and the seed, can be overridden; --settings.NAME=VALUE are the rival's own. With --validate_only the test part is not read,
and the run need not have done more than its stage data: tune on `tenrec-jax compare RUN OUT --part validation`, or by `tune.py`, and leave
the flag out at the end. The model "fastformer" is the run's own ranker, to be tuned in the same way. The same command again resumes.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dcn_v2 import DcnV2, DcnV2Config
from din import Din, DinConfig
from flax import nnx
from gru import Gru, GruConfig

from tenrec_jax import provenance, stages
from tenrec_jax.config import RunConfig, from_mapping
from tenrec_jax.data.protocols import Part
from tenrec_jax.errors import UserError
from tenrec_jax.evaluate_stage import PREFIXES, RESULTS, SELECTION, origin_of, provenance_of
from tenrec_jax.evaluation.opening import record_opening
from tenrec_jax.evaluation.predictions import write_predictions
from tenrec_jax.evaluation.results import scorer_results
from tenrec_jax.evaluation.scorers import MODEL, Scorer
from tenrec_jax.evaluation.tables import aligned, interval
from tenrec_jax.files import locked, read_json, write_json
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.models.ranker import Ranker, RankerConfig, TimelineRanker
from tenrec_jax.pipeline import selected_ranking_task
from tenrec_jax.run_data import RunData
from tenrec_jax.settings import Settings
from tenrec_jax.sweep.record import with_settings
from tenrec_jax.training.parallel import DataParallel
from tenrec_jax.training.stopping import Stopped, Stopping
from tenrec_jax.training.tasks import RankingTask
from tenrec_jax.training.trainer import fit


@dataclass(frozen=True)
class FastformerConfig(Settings):
    """The ranker has no settings of its own here: config.ranking.model says all."""


def fastformer(
    config: RankerConfig, vocabulary: Vocabulary, settings: FastformerConfig, *, rngs: nnx.Rngs
) -> TimelineRanker:
    """The run's ranker, made in the way of its rivals."""
    del settings
    return Ranker(config, vocabulary, rngs=rngs)


MODELS: dict[str, tuple[Callable[..., TimelineRanker], type]] = {
    "fastformer": (fastformer, FastformerConfig),
    "din": (Din, DinConfig),
    "dcn_v2": (DcnV2, DcnV2Config),
    "gru": (Gru, GruConfig),
}
FILE = "rival.json"
# What may differ from the run's: all else decides on the rows.
OVERRIDABLE = ("seed", "ranking.")

logger = logging.getLogger("tenrec_jax")


class Job(NamedTuple):
    """A rival to be trained.

    Attributes:
        run: workdir of the finished run. out: the rival's own.
        model: name of the rival. settings: its own.
        config: of the run, with what is overridden.
        parts: to be evaluated.
    """

    run: Path
    out: Path
    model: str
    settings: Any
    config: RunConfig
    parts: tuple[Part, ...]

    def description(self) -> dict[str, Any]:
        """What decides its result, as JSON has it."""
        config, settings = dataclasses.asdict(self.config), dataclasses.asdict(self.settings)
        data_sha256 = read_json(self.run / "data.json")["sha256"]
        return {"data_sha256": data_sha256, "model": self.model, "settings": settings, "config": config}


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, train and evaluate.

    Returns:
        The exit code: 0 done, 2 wrong use or bad input, 128 + the signal if it was told to stop.
    """
    options, overrides = _parse(arguments)
    logging.basicConfig(format="%(message)s", force=True)
    logger.setLevel(logging.INFO)
    try:
        job = _job(options, overrides)
        with Stopping.installed() as stopping, locked(job.out / ".lock", f"trains in {job.out}"):
            _work(job, stopping)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return stopped.exit_code
    part = "" if Part.TEST in job.parts else " --part validation"
    sys.stdout.write(f"{_table(job)}\n\nNext:\n  tenrec-jax compare {job.run} {job.out}{part}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="train.py --run RUN --model NAME --out DIR [--validate_only] [--config.KEY=VALUE ...] [--settings.KEY=VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, help="workdir of a run, which says what is trained on what")
    parser.add_argument("--model", choices=tuple(MODELS), required=True, help="the rival")
    parser.add_argument("--out", type=Path, required=True, help="the rival's own workdir, made if absent")
    parser.add_argument("--validate_only", action="store_true", help="leave the test part unread")
    return parser


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The options, and the values of the settings that are overridden, by "config.KEY" and "settings.KEY"."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = {}
    for argument in rest:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not (argument.startswith(("--config.", "--settings.")) and equals):
            parser.error(f"{argument!r} is neither a flag nor --config.KEY=VALUE or --settings.KEY=VALUE")
        try:
            overrides[key] = json.loads(text)
        except ValueError:
            overrides[key] = text
    return options, overrides


def _job(options: argparse.Namespace, overrides: Mapping[str, Any]) -> Job:
    """What the command line asks for.

    Raises:
        UserError: the run is unfinished or has no ranker, a setting cannot be overridden or cannot have its value, or `out` is something
            else's.
    """
    parts = (Part.VALIDATION,) if options.validate_only else (Part.VALIDATION, Part.TEST)
    needed = "data" if options.validate_only else "evaluate"
    file = options.run / provenance.CONFIG
    if not file.exists() or needed not in stages.read(options.run):
        raise UserError(
            f"{options.run} holds no run that has finished its stage {needed}: run its command first, at least to that stage."
        )
    changed = {key.removeprefix("config."): value for key, value in overrides.items() if key.startswith("config.")}
    fixed = [key for key in changed if not key.startswith(OVERRIDABLE)]
    if fixed:
        raise UserError(
            f"config.{fixed[0]} is the run's: only the seed and settings of config.ranking can be overridden."
        )
    config = with_settings(from_mapping(read_json(file)), changed)
    if not config.ranking.enabled:
        raise UserError(f"{options.run} has no ranker (config.ranking.enabled is False), so there is nothing to rival.")
    own = {key.removeprefix("settings."): value for key, value in overrides.items() if key.startswith("settings.")}
    settings = from_mapping(own, MODELS[options.model][1], "settings")
    job = Job(options.run, options.out, options.model, settings, config, parts)
    _refuse_other(job)
    return job


def _refuse_other(job: Job) -> None:
    """A UserError if the rival's folder holds anything but this rival's files."""
    path = job.out / FILE
    if path.exists():
        changed = provenance.differences(read_json(path), job.description(), "")
        if changed:
            listed = "\n".join(changed)
            raise UserError(f"{job.out} holds a rival that was made otherwise:\n{listed}\nName another --out.")
    elif job.out.is_file() or (job.out.is_dir() and any(file.name != ".lock" for file in job.out.iterdir())):
        raise UserError(f"{job.out} is not empty, and holds no rival: name another --out.")


def _work(job: Job, stopping: Stopping) -> None:
    """Train and evaluate what is not done."""
    missing = [part for part in job.parts if not (job.out / "eval" / RESULTS[part]).exists()]
    if not missing:
        return
    write_json(job.out / FILE, job.description())
    parallel = DataParallel()
    data = RunData(job.config, job.run / "table", parallel.size)
    task = selected_ranking_task(data, partial(MODELS[job.model][0], settings=job.settings))
    result = fit(
        task,
        job.config.ranking.train,
        workdir=job.out,
        seed=job.config.seed,
        parallel=parallel,
        stopping=stopping,
        origin={"data_sha256": data.table.sha256, "model": job.model},
    )
    stopping.place = "while it was evaluated"
    for part in missing:
        _evaluate(job, data, task, task.whole(result.parameters), part)


def _evaluate(job: Job, data: RunData, task: RankingTask, parameters: nnx.State, part: Part) -> None:
    """Write the predictions and results of a part; the test part is written down before it is read."""
    folder, config, rows = job.out / "eval", job.config, data.split.rows(part)
    opened = {"test_opened": record_opening(job.out)} if part == Part.TEST else {}
    logger.info("%s: %d rows", part.name.lower(), len(rows))
    probability_RA = data.ranking_evaluator(part).run(task.graphdef, parameters)
    scorer = Scorer(MODEL, None, lambda rows: probability_RA[rows])
    bootstrap = {"seed": config.seed, "resamples": config.evaluation.resamples}
    results = provenance_of(config, data) | {"model": job.model, "counts": {"rows": len(rows)}}
    results |= scorer_results(scorer, data.table, rows, data.counts.item_exposures_N1, **bootstrap)
    results |= {"selection": {"ranking": SELECTION["ranking"]}, **opened}
    write_predictions(
        folder / f"{PREFIXES[part]}predictions.parquet", origin_of(config, data, part), data.table, rows, [scorer]
    )
    write_json(folder / RESULTS[part], results)


def _table(job: Job) -> str:
    """The results as text."""
    rows = [[job.model, "", "auc", "gauc", "log loss"]]
    for part in job.parts:
        for action, metrics in read_json(job.out / "eval" / RESULTS[part])["ranking"].items():
            values = [interval(metrics[name]) for name in ("auc", "gauc", "log_loss")]
            rows.append([part.name.lower(), action, *values])
    return "\n".join(aligned(rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
