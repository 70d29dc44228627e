"""Run an experiment: raw log in, recommender and report out.

    python experiments/launch.py                                                  the quick start on a synthetic log
    python experiments/launch.py --config=experiments/configs/sequences.py --config.data.path=FILE
    python experiments/launch.py --config=experiments/configs/tenrec.py:ctr_1m --workdir=runs/ctr --dry_run
    python experiments/launch.py --num_processes=2                                the same on two processes of this machine
    python experiments/launch.py --list                                           all configs and sweeps, what they need and take
    python experiments/launch.py --sweep=experiments/sweeps/quickstart.py --dry_run
    python experiments/launch.py --sweep=experiments/sweeps/quickstart.py --parallel_units=2

Any setting of a config can be overridden: --config.retrieval.train.epochs=20. The same command again resumes, whatever stopped the run
(SIGTERM and Ctrl-C save first); a finished run prints its results. tenrec-jax verify WORKDIR checks all its files. A sweep runs one
config under several settings and ends with a leaderboard. Where Slurm or Kubernetes starts the processes, each runs the same command.
experiments/README.md says more.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from tenrec_jax.training.stopping import SIGNALS, Stopped, Stopping, end_at_once

if __name__ == "__main__":
    for number in SIGNALS:  # the imports below take seconds; later the run itself listens
        signal.signal(number, end_at_once)

from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from tenrec_jax.config import STAGES, RunConfig, from_mapping
from tenrec_jax.config_files import listed, markdown_table, unreadable
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.report import results_table
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.plan import describe
from tenrec_jax.settings_reader import refuse_overrides
from tenrec_jax.sweep import leaderboard, page
from tenrec_jax.sweep.record import Sweep, read_sweep, with_settings
from tenrec_jax.sweep.run import first_round, run_sweep, typed
from tenrec_jax.training.heartbeat import Heartbeat
from tenrec_jax.training.parallel import DataParallel, How, join_processes, leave_processes
from tenrec_jax.training.workers import end_with_launcher, supervise

FOLDER = Path(__file__).parent
QUICK_START = FOLDER / "configs" / "quickstart.py"
# A unit of a sweep is one process, and which of its stages run is the sweep's to say.
NOT_OF_SWEEPS = ("list", "stages", "num_processes", "max_restarts", "heartbeat_seconds", "parallel")

# Loaded when the command line is parsed, so that a mistake in it is a message and not a traceback.
CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, FILE.py or FILE.py:VARIANT; the quick start by default."
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; runs/NAME by default, NAME as in the config.")
RUN_STAGES = flags.DEFINE_list("stages", list(STAGES), "Stages to run; finished ones are skipped.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Check the config, print the plan, the parameter tables and what a training step costs (FLOPs, memory); read and train nothing.",
)
ALLOW_CHANGED = flags.DEFINE_bool(
    "allow_changed",
    False,
    "Go on in a workdir that was made with another configuration, other data or other code. It is told what that does, and recorded.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes",
    1,
    "Processes of the run. Where the environment names their coordinator this is one of them; elsewhere all are started here.",
    lower_bound=1,
)
MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts",
    3,
    "Times that processes started here are all started again, from the last checkpoint, after one of them died or hung.",
    lower_bound=0,
)
HEARTBEAT_SECONDS = flags.DEFINE_float(
    "heartbeat_seconds",
    60.0,
    "A process started here is taken for hung if it is not heard of for so long, or a training step takes ten minutes; 0 is off.",
    lower_bound=0.0,
)
PARALLEL = flags.DEFINE_enum(
    "parallel",
    "auto",
    ["auto", "pmap", "shard_map"],
    "How devices share a step; auto is pmap in one process and shard_map over several. The results are the same.",
)

LIST = flags.DEFINE_bool("list", False, "Print a table of all configs, their variants, and sweeps.")
SWEEP = flags.DEFINE_string(
    "sweep", "", "Sweep file: run a config under several settings; --config.KEY=VALUE holds for all of them."
)
PARALLEL_UNITS = flags.DEFINE_integer(
    "parallel_units",
    1,
    "Units of a sweep at a time, each with its share of the cores; where CUDA_VISIBLE_DEVICES names GPUs, each takes one of them.",
    lower_bound=1,
)

logger = logging.getLogger("tenrec_jax")


def main(arguments: list[str]) -> int:
    """Parse the command line and run.

    Returns:
        The exit code: 0 done, 1 a worker died or a unit of a sweep failed, 2 wrong use or bad input, 128 + the signal if the run was told
        to stop.
    """
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(_help())
        return 0
    end_with_launcher()
    try:
        sweep_file = _sweep_file(arguments)
        if sweep_file is not None:
            return _sweep(arguments, read_sweep(sweep_file), sweep_file)
        config = _parse(arguments)
        if LIST.value:
            sys.stdout.write(experiments_table())
            return 0
        if PARALLEL_UNITS.present:
            raise UserError("--parallel_units is for the units of a sweep: name its file, --sweep=FILE.")
        workdir = Path(WORKDIR.value or Path("runs") / config.name)
        if DRY_RUN.value:
            _run(config, workdir, Stopping())
        elif join_processes(NUM_PROCESSES.value):
            _work(config, workdir)
        elif NUM_PROCESSES.value > 1:
            return supervise(
                [sys.executable, *arguments],
                NUM_PROCESSES.value,
                max_restarts=MAX_RESTARTS.value,
                heartbeat_seconds=HEARTBEAT_SECONDS.value,
            )
        else:
            with Stopping.installed() as stopping:
                _run(config, workdir, stopping)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        return stopped.exit_code
    return 0


def _work(config: RunConfig, workdir: Path) -> None:
    """Run as one of several processes.

    An error ends the process at once: to leave in order it would wait for the others, which wait for it. Whoever started them stops them.
    """
    try:
        with Stopping.installed() as stopping:
            _run(config, workdir, stopping)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = 2
    except Stopped as stopped:
        sys.stderr.write(f"{stopped}\n")
        code = stopped.exit_code
    except BaseException:
        logger.exception("the run failed")
        code = 1
    else:
        leave_processes()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _help() -> str:
    configs = sorted(path.name for path in QUICK_START.parent.glob("*.py"))
    return f"{__doc__}\nconfigs: {', '.join(configs)}\nstages:  {', '.join(STAGES)}\n{flags.FLAGS.module_help(sys.modules[__name__])}\n"


def experiments_table() -> str:
    """What `--list` prints: the tables of configs and of sweeps."""
    tables = (markdown_table(listed(FOLDER / f"{kind}s"), kind) for kind in ("config", "sweep"))
    return "\n\n".join(tables) + "\n"


def _sweep_file(arguments: Sequence[str]) -> Path | None:
    """The file of --sweep, known before the flags are read: it names the config."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.lstrip("-") == "sweep" and name.startswith("-"):
            return Path(value if equals else next(iter(arguments[place + 1 :]), ""))
    return None


def _sweep(arguments: list[str], sweep: Sweep, file: Path) -> int:
    """Run a sweep, or with --dry_run say what it would run."""
    overrides = [key.removeprefix("config.") for key in _overrides(arguments)]
    varied = sorted(sweep.parameters.keys() & set(overrides))
    if varied:
        raise UserError(f"--config.{varied[0]} is given, but the sweep varies it.")
    if _names_config(arguments):
        raise UserError(f"--config is given, but {file} names the config of its units: {sweep.base}.")
    fixed = {key: value for key, value in sweep.settings.items() if key not in overrides}
    base = with_settings(_parse(arguments, sweep.base), fixed)
    others = [name for name in NOT_OF_SWEEPS if flags.FLAGS[name].present]
    if others:
        raise UserError(f"--{others[0]} does not go together with --sweep: leave one of them out.")
    workdir = Path(WORKDIR.value or Path("runs") / f"sweep_{file.stem}")
    if DRY_RUN.value:
        lines = [", ".join(f"{key}={value}" for key, value in drawn.items()) for drawn in first_round(sweep, base)]
        total = len(lines) if sweep.search != "tpe" else sweep.trials
        first = f", the first {len(lines)} of them" * (len(lines) < total)
        sys.stdout.write("\n".join([f"{total} units in {workdir}{first}:", *lines]) + "\n")
        return 0
    _set_up_logging(logging.INFO)
    command = [sys.executable, arguments[0], f"--config={sweep.base}"]
    command += [f"--config.{key}={typed(value)}" for key, value in fixed.items()]
    command += [f"--{key}={text}" for key, text in _overrides(arguments).items()]
    command += ["--allow_changed"] * ALLOW_CHANGED.value
    board = run_sweep(sweep, base, workdir, command, parallel=PARALLEL_UNITS.value, allow_changed=ALLOW_CHANGED.value)
    made = f"leaderboard  {workdir / leaderboard.FILE}\nreport       {workdir / page.FILE}\n"
    sys.stdout.write(f"{leaderboard.text(board)}\n\n{made}")
    return 1 if board.failed else 0


def _names_config(arguments: Sequence[str]) -> bool:
    return any(argument.split("=")[0].lstrip("-") == "config" for argument in arguments[1:])


def _parse(arguments: list[str], config_file: str | Path = QUICK_START) -> RunConfig:
    """The configuration of a command line, from `config_file` where it names none."""
    default = [] if _names_config(arguments) else [f"--config={config_file}"]
    refuse_overrides(_overrides(arguments), RunConfig)
    try:
        left_over = flags.FLAGS([arguments[0], *default, *arguments[1:]])[1:]
        values = CONFIG.value
        getattr(values, "to_dict", None)  # what stands for a file that could not be read raises here
    except (flags.Error, OSError) as error:
        # A config file's own error comes with its traceback; the last line says it.
        lines = str(error).strip().splitlines()
        raise UserError(lines[-1] if any("Traceback" in line for line in lines) else "\n".join(lines)) from None
    except Exception as error:
        if "get_config" in str(error):
            raise UserError("The config file has no function get_config: it must define one.") from error
        raise UserError(f"{unreadable(error)} The config file cannot be read.") from error
    if left_over:
        raise UserError(f"{left_over[0]!r} is no flag. See --help.")
    if not isinstance(values, ConfigDict):
        raise UserError(
            f"get_config of the config file gives a {type(values).__name__}; it must give a ConfigDict: to_config_dict(...)."
        )
    return from_mapping(values.to_dict())


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """The texts that the command line gives for settings, by their dotted keys: `--config.seed=1`, or in two words."""
    found, names = {}, [argument.lstrip("-") if argument.startswith("-") else "" for argument in arguments]
    for place, name in enumerate(names):
        key, equals, text = name.partition("=")
        if key.startswith("config."):
            follows = arguments[place + 1 : place + 2]
            found[key] = text if equals or not follows or follows[0].startswith("--") else follows[0]
        elif key.startswith("noconfig."):
            found[key.removeprefix("no")] = "false"
    return found


def _set_up_logging(level: int) -> None:
    """Messages of this package from a level on, those of others from warnings on, as plain lines."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    logger.setLevel(level)


def _run(config: RunConfig, workdir: Path, stopping: Stopping) -> None:
    parallel = DataParallel(how=cast(How, PARALLEL.value))
    _set_up_logging(logging.INFO if parallel.is_main else logging.WARNING)
    pipeline = Pipeline(
        config,
        workdir,
        parallel,
        stopping=stopping,
        heartbeat=Heartbeat.of(),
        allow_changed=ALLOW_CHANGED.value,
    )
    if DRY_RUN.value:
        sys.stdout.write(describe(config, parallel))
        return
    results = pipeline.run(RUN_STAGES.value)
    if not parallel.is_main:
        return
    if results:
        sys.stdout.write(results_table(results) + "\n")
    if pipeline.finished:
        user = pipeline.example_user()
        sys.stdout.write(
            f"\nreport       {workdir / 'report.html'}\n"
            f"recommender  {workdir / 'recommender'}\n"
            "\nNext:\n"
            f"  tenrec-jax recommend --recommender {workdir / 'recommender'} --user {user}\n"
            f"  tenrec-jax serve {workdir / 'recommender'}    and open http://127.0.0.1:8080\n"
            "  python experiments/launch.py --config=experiments/configs/sequences.py --config.data.path=YOUR_LOG.txt\n"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
