"""Which settings a sweep tries, and in which order: a function of the sweep and of the results so far, and of nothing else."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tenrec_jax.errors import UserError
from tenrec_jax.sweep.record import Choices, Domain, Integers, Interval, Sweep

TRIES = 100
Drawn = dict[str, Any]


class Trial(NamedTuple):
    """Settings that were tried, by dotted key, and their objective; None where the run failed or the metric is not defined."""

    settings: Mapping[str, Any]
    value: float | None


def next_round(sweep: Sweep, tried: Sequence[Trial]) -> list[Drawn]:
    """The settings to try next, of runs that do not depend on each other's results; none once the sweep is complete.

    A draw that equals an earlier one is drawn again: the same settings give the same result. Where no other is found the sweep ends.

    Args:
        tried: all trials of the rounds before.

    Raises:
        UserError: "tpe" without Optuna.
    """
    if sweep.search == "tpe":
        left = min(sweep.round_size, sweep.trials - len(tried))
        return _distinct(_tpe(sweep, tried), left, tried) if left > 0 else []
    if tried:
        return []
    if sweep.search == "random":
        generator = np.random.default_rng(sweep.seed)
        return _distinct(lambda: _random(sweep.parameters, generator), sweep.trials, ())
    if sweep.search == "ablation":
        return _one_change_at_a_time(sweep.parameters)
    domains = [domain.values for domain in sweep.parameters.values() if isinstance(domain, Choices)]
    return [dict(zip(sweep.parameters, values, strict=True)) for values in itertools.product(*domains)]


def _one_change_at_a_time(parameters: Mapping[str, Domain]) -> list[Drawn]:
    choices = {key: domain.values for key, domain in parameters.items() if isinstance(domain, Choices)}
    return [{}, *({key: value} for key, values in choices.items() for value in values)]


def _distinct(draw: Callable[[], Drawn], count: int, tried: Sequence[Trial]) -> list[Drawn]:
    found, known = [], [dict(trial.settings) for trial in tried]
    for _ in range(count):
        fresh = next((drawn for drawn in (draw() for _ in range(TRIES)) if drawn not in known), None)
        if fresh is None:
            break
        found.append(fresh)
        known.append(fresh)
    return found


def _random(parameters: Mapping[str, Domain], generator: np.random.Generator) -> Drawn:
    drawn: Drawn = {}
    for key, domain in parameters.items():
        if isinstance(domain, Choices):
            drawn[key] = domain.values[int(generator.integers(len(domain.values)))]
        elif isinstance(domain, Integers):
            drawn[key] = int(generator.integers(domain.low, domain.high, endpoint=True))
        elif domain.log:
            drawn[key] = float(np.exp(generator.uniform(np.log(domain.low), np.log(domain.high))))
        else:
            drawn[key] = float(generator.uniform(domain.low, domain.high))
    return drawn


def _tpe(sweep: Sweep, tried: Sequence[Trial]) -> Callable[[], Drawn]:
    """Draws of a fresh sampler that is told all results so far: whether the sweep was interrupted makes no difference to it."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise UserError('The search "tpe" needs Optuna: pip install "tenrec_jax[sweep]".') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    (seed,) = np.random.SeedSequence([sweep.seed, len(tried)]).generate_state(1).tolist()
    direction: Literal["maximize", "minimize"] = "maximize" if sweep.larger_is_better else "minimize"
    study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
    distributions = {key: _distribution(domain) for key, domain in sweep.parameters.items()}
    state = optuna.trial.TrialState
    for trial in tried:
        study.add_trial(
            optuna.trial.create_trial(
                params={key: _told(sweep.parameters[key], value) for key, value in trial.settings.items()},
                distributions=distributions,
                value=trial.value,
                state=state.FAIL if trial.value is None else state.COMPLETE,
            )
        )

    def draw() -> Drawn:
        params = study.ask(distributions).params
        return {key: _read(domain, params[key]) for key, domain in sweep.parameters.items()}

    return draw


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Interval):
        return FloatDistribution(domain.low, domain.high, log=domain.log)
    if isinstance(domain, Integers):
        return IntDistribution(domain.low, domain.high)
    # By their numbers: Optuna's categories can be no tuples, and 1 and True would be one.
    return CategoricalDistribution(range(len(domain.values)))


def _told(domain: Domain, value: Any) -> Any:
    return list(map(repr, domain.values)).index(repr(value)) if isinstance(domain, Choices) else value


def _read(domain: Domain, drawn: Any) -> Any:
    return domain.values[drawn] if isinstance(domain, Choices) else drawn
