"""What a sweep is: a base config, the settings that vary, and the metric of the validation part by which its runs are compared.

A sweep file is a Python file with a function `get_sweep` that gives a `Sweep`; `experiments/sweeps/quickstart.py` is an example.
"""

import dataclasses
import re
import runpy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tenrec_jax.config import RunConfig, from_mapping
from tenrec_jax.config_files import unreadable
from tenrec_jax.data.schema import ACTIONS
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.results import BINARY_METRICS
from tenrec_jax.evaluation.user_metrics import CUTOFFS
from tenrec_jax.settings import Count, Natural, Settings

Value = bool | int | float | str | tuple[int | float, ...]
SMALLER_IS_BETTER = ("log_loss", "ece")
RETRIEVAL = "retrieval"
RETRIEVAL_METRICS = (*(f"{name}@{k}" for name in ("recall", "ndcg", "hit") for k in CUTOFFS if k > 1), "hit@1", "mrr")
# 1 is best: it has no direction.
RANKING_METRICS = tuple(name for name in BINARY_METRICS if name != "pcoc")
# They decide on which rows, and of which users, a metric is taken: runs that differ in them cannot be compared.
NOT_VARIED = ("name", "data", "evaluation")


@dataclass(frozen=True)
class Choices:
    """One of some values; a grid takes each of them."""

    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if not self.values or len(set(map(repr, self.values))) < len(self.values):
            raise UserError(f"Choices{self.values} must hold at least one value, and none twice.")


@dataclass(frozen=True)
class Interval:
    """Real numbers from `low` to `high`, drawn evenly, or evenly in their logarithm."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise UserError(f"{self}: low must be below high, and above 0 where log is true.")


@dataclass(frozen=True)
class Integers:
    """Whole numbers from `low` to `high`, both of them taken."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UserError(f"{self}: low must be below high.")


Domain = Choices | Interval | Integers


@dataclass(frozen=True)
class Sweep(Settings):
    """Runs of one config that differ in some settings.

    Attributes:
        base: config file of all runs, FILE.py or FILE.py:VARIANT.
        parameters: what varies: for each setting, by its dotted key ("retrieval.train.epochs"), the values that it can take.
        objective: metric of the validation part that decides, as `tenrec-jax compare` names it: "retrieval ndcg@10", "click gauc".
        search: "grid" takes every combination of `Choices`; "ablation" takes the base as it is, and then each value alone, so that it
            shows what every change does by itself; "random" draws; "tpe" draws where earlier results were good: a tree-structured Parzen
            estimator (Bergstra et al., 2011), Optuna's, whose first ten trials are random.
        trials: runs of a search that draws.
        seed: of what is drawn; the runs' own is the setting "seed".
        settings: of every run, beside those of the base.
        round_size: runs that "tpe" proposes at once, from the results of all rounds before. Results do not depend on how many of them run
            in parallel.
    """

    base: str
    parameters: Mapping[str, Domain]
    objective: str
    search: Literal["grid", "ablation", "random", "tpe"] = "grid"
    trials: Natural = 0
    seed: Natural = 0
    settings: Mapping[str, Value] = field(default_factory=dict)
    round_size: Count = 4

    def conflicts(self) -> Iterator[str]:
        if not self.parameters:
            yield "parameters is empty: a sweep varies at least one setting"
        for key in self.parameters:
            if key.partition(".")[0] in NOT_VARIED:
                yield f"{key} cannot vary: it decides what is measured, so that results could not be compared. Set it in settings"
            if key in self.settings:
                yield f"{key} stands in parameters and in settings"
        if self.search in ("grid", "ablation"):
            yield from self._not_enumerable()
        elif not self.trials:
            yield f"trials is 0: say how many runs the search {self.search!r} takes"
        known = RETRIEVAL_METRICS if self.of == RETRIEVAL else RANKING_METRICS
        if self.of not in (RETRIEVAL, *ACTIONS) or self.metric not in known:
            yield (
                f"objective is {self.objective!r}; it must be {RETRIEVAL} and one of {', '.join(RETRIEVAL_METRICS)}, or one of "
                f"{', '.join(ACTIONS)} and one of {', '.join(RANKING_METRICS)}"
            )

    def _not_enumerable(self) -> Iterator[str]:
        if self.trials:
            yield f"trials is for the searches 'random' and 'tpe': the search {self.search!r} takes every value"
        for key, domain in self.parameters.items():
            if not isinstance(domain, Choices):
                yield f"{key} has {type(domain).__name__}, of which {self.search!r} cannot take every value: take Choices"

    @property
    def of(self) -> str:
        """What the objective is of: "retrieval", or an action that is ranked by."""
        return self.objective.partition(" ")[0]

    @property
    def metric(self) -> str:
        """The objective's metric."""
        return self.objective.partition(" ")[2]

    @property
    def larger_is_better(self) -> bool:
        """Whether the objective is maximised."""
        return self.metric not in SMALLER_IS_BETTER


def read_sweep(path: Path) -> Sweep:
    """The sweep of a file.

    Raises:
        UserError: the file cannot be read, has no `get_sweep`, or its sweep cannot be.
    """
    if not path.is_file():
        raise UserError(f"--sweep: {path} is no file.")
    try:
        get_sweep = runpy.run_path(str(path)).get("get_sweep")
        sweep = get_sweep() if get_sweep else None
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{unreadable(error)} The sweep file cannot be read.") from error
    if not isinstance(sweep, Sweep):
        raise UserError(f"{path} must define get_sweep() that gives a tenrec_jax.sweep.record.Sweep.")
    return sweep


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """A configuration with settings changed, by their dotted keys.

    Raises:
        UserError: lists keys that are no settings, and values that they cannot have.
    """
    values = dataclasses.asdict(config)
    for key, value in settings.items():
        *parents, last = key.split(".")
        place: Any = values
        for name in parents:
            place = place.setdefault(name, {}) if isinstance(place, dict) else {}
        if isinstance(place, dict):
            place[last] = value
        else:
            raise UserError(
                f"config.{key} is not a setting: config.{'.'.join(parents)} holds a value, and no settings."
            )
    changed: RunConfig = from_mapping(values)
    return changed


def slug(settings: Mapping[str, Any]) -> str:
    """Settings as a part of a folder's name, such as "learning_rate=0.001,width=64"."""
    return re.sub(
        r"[^\w.,=+-]+", "_", ",".join(f"{name}={_short(settings[key])}" for key, name in short_names(settings).items())
    )[:80]


def short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """For each dotted key as many of its last words as tell it from the others."""
    names: dict[str, str] = {}
    for key in keys:
        words = key.split(".")
        endings = [".".join(words[start:]) for start in reversed(range(len(words)))]
        names[key] = next(e for e in endings if sum(f".{k}".endswith(f".{e}") for k in keys) == 1 or e == key)
    return names


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
