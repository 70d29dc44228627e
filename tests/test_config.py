"""Configurations: typed, locked, explained."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tenrec_jax.config import RunConfig, default_config, from_mapping, to_config_dict
from tenrec_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_a_config_survives_the_way_through_a_config_dict() -> None:
    config = default_config()
    assert from_mapping(to_config_dict(config).to_dict()) == config


def test_a_config_dict_is_locked() -> None:
    with pytest.raises(AttributeError, match="retrieval"):
        to_config_dict(default_config()).retreival = 1


def changed_ranker(part: str, key: str, value: object) -> dict:
    ranking = dataclasses.asdict(default_config().ranking)
    ranking["model"][part][key] = value
    return {"ranking": ranking}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, r"config\.sede is not a setting\. Did you mean config\.seed\?"),
        ({"seed": "0"}, r"config\.seed is '0', a str; it must be an int"),
        ({"seed": True}, r"config\.seed is True, a bool"),
        ({"index": {"kind": "faiss"}}, r"config\.index\.kind is 'faiss'; it must be one of 'auto', 'exact', 'scann'"),
        ({"data": 3}, r"config\.data is 3"),
        (
            changed_ranker("heads", "kind", "mmeo"),
            r"ranking\.model\.heads\.kind is 'mmeo'; it must be one of 'shared_bottom', 'mmoe', 'ple', 'esmm'",
        ),
        (changed_ranker("heads", "experts", 0), r"model\.heads\.experts is 0; it must be at least 1"),
        (
            changed_ranker("encoder", "attention", "sotfmax"),
            r"attention is 'sotfmax'; it must be one of 'additive', 'softmax'",
        ),
        (changed_ranker("encoder", "width", 62), r"model\.encoder: width 62 is no multiple of num_heads 4"),
        (changed_ranker("encoder", "remat", "dots"), r"model\.encoder: remat 'dots' is neither 'none' nor"),
        (changed_ranker("encoder", "dtype", "float16"), r"dtype is 'float16'; it must be one of 'float32', 'bfloat16'"),
        ({"index": {"leafs": 3}}, r"config\.index\.leafs is not a setting"),
        ({"serving": {"rules": {"seed": "x"}}}, r"rules\.seed is 'x', a str; it must be an int or a NoneType"),
        (
            {"serving": {"rules": {"blocked_items": [1, 2.5]}}},
            r"rules\.blocked_items\[1\] is 2\.5, a float; it must be an int or a str",
        ),
    ],
)
def test_a_wrong_setting_is_named(change: dict, message: str) -> None:
    values = dataclasses.asdict(default_config()) | change
    with pytest.raises(UserError, match=message):
        from_mapping(values)


MALFORMED = {
    "retrieval.train.epochs": (0, "is 0; it must be at least 1"),
    "retrieval.train.patience": (-1, "is -1; it must be at least 0"),
    "retrieval.train.average_decay": (1.0, "is 1.0; it must be at least 0 and below 1"),
    "retrieval.train.accumulate": (0, "it must be at least 1"),
    "retrieval.train.max_bad_steps": (0, "it must be at least 1"),
    "retrieval.train.table_placement": ("sharded", "it must be one of 'replicated', 'row_sharded'"),
    "retrieval.train.optimizer.learning_rate": (0.0, "it must be above 0"),
    "retrieval.train.optimizer.b2": (1, "is 1.0; it must be above 0 and below 1"),
    "retrieval.train.optimizer.clip_norm": (math.nan, "is nan; it must be at least 0"),
    "retrieval.train.optimizer.schedule": ("linear", "it must be one of 'constant', 'cosine'"),
    "retrieval.train.optimizer.warmup_steps": (2.5, "is 2.5, a float; it must be an int"),
    "retrieval.train.optimizer.tables.kind": ("adam", "it must be one of 'rowwise_adagrad', 'lazy_adam'"),
    "retrieval.model.temperature": (-0.1, "it must be above 0"),
    "retrieval.model.features.max_length": (0, "it must be at least 1"),
    "retrieval.model.features.init_scale": (math.inf, "is inf; it must be at least 0"),
    "retrieval.model.features.item_table.rows": (1, "it must be at least 2"),
    "retrieval.model.encoder.num_heads": (3, "width 64 is no multiple of num_heads 3"),
    "retrieval.model.encoder.dropout": (1.5, "it must be at least 0 and below 1"),
    "retrieval.negatives": (-1, "it must be at least 0"),
    "retrieval.unknown_rate": (1, "it must be at least 0 and below 1"),
    "ranking.action_weights": ([0, 0, 0, 0], "with no weight above 0 there is nothing to learn"),
    "ranking.action_weights[1]": (-1.0, "it must be at least 0"),
    "ranking.enabled": ("yes", "is 'yes', a str; it must be a bool"),
    "ranking.model.heads.levels": (0, "it must be at least 1"),
    "index.target_recall": (1.2, "it must be above 0 and at most 1"),
    "evaluation.resamples": (0, "it must be at least 1"),
    "serving.candidates": (0, "it must be at least 1"),
    "serving.rules.action_values.like": ("2", "it must be a float"),
    "serving.rules.diversity": (1.0, "it must be at least 0 and below 1"),
    "data.kind": ("qb_vidoe", "did you mean 'qb_video'?"),
    "data.protocol": ("leave_one_uot", "did you mean 'leave_one_out'?"),
    "data.split_file": ("parts.csv", "'split_file' needs one, and no other has it"),
    "data.columns": ('{"user": "u"}', "kind 'custom' needs columns, and no other has them"),
    "data.ids": ("text", "which is for the kinds custom and sequences alone"),
    "data.max_bad_fraction": (1.0, "it must be at least 0 and below 1"),
    "data.twin_rows": (0, "it must be at least 1"),
    "data.twin_sede": (0, "Did you mean config.data.twin_seed?"),
    "seed": (-1, "it must be at least 0"),
    "name": ("../up", "it must be fit for a folder"),
}


def changed(**settings: object) -> dict:
    """The default configuration with settings changed, by dotted key; "key[1]" is an entry of a list."""
    values = json.loads(json.dumps(dataclasses.asdict(default_config())))
    for key, value in settings.items():
        *parents, last = key.removesuffix("[1]").split(".")
        place = values
        for name in parents:
            place = place[name]
        if key.endswith("[1]"):
            place[last][1] = value
        else:
            place[last] = value
    return values


def of_the_section(key: str, message: str) -> bool:
    """Whether a message names a setting, or, where several do not go together, the section that holds it."""
    return f"config.{key}" in message or f"config.{key.rpartition('.')[0]}".rstrip(".") + ":" in message


@pytest.mark.parametrize("key", MALFORMED)
def test_a_malformed_config_is_refused_with_the_key_and_the_remedy(key: str) -> None:
    value, remedy = MALFORMED[key]
    with pytest.raises(UserError) as error:
        from_mapping(changed(**{key: value}))
    assert remedy in str(error.value)
    assert of_the_section(key, str(error.value))
    assert len(str(error.value).splitlines()) == 1


def test_all_problems_are_listed_at_once(tell: Callable[[str], None]) -> None:
    alone = {key: value for key, value in MALFORMED.items() if "[1]" not in key}
    with pytest.raises(UserError) as error:
        from_mapping(changed(**{key: value for key, (value, _) in alone.items()}))
    lines = str(error.value).splitlines()
    for key, (_, remedy) in alone.items():
        # What does not go together is told once each of it is right.
        if f"config.{key} " in "".join(lines):
            assert any(f"config.{key} " in line and remedy in line for line in lines), key
    assert len(lines) > 25
    tell(f"malformed configs: {len(MALFORMED)}, each refused before any work; {len(lines)} problems told at once")


def numbers_of(kind: type, path: str = "") -> Iterator[str]:
    """The dotted keys of all numbers in a config."""
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from numbers_of(hint, f"{path}{field.name}.")
        elif hint in (int, float):
            yield path + field.name


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e9, "x", None])
def test_no_number_takes_what_is_none_or_lies_far_out(value: object) -> None:
    keys = list(numbers_of(RunConfig))
    assert len(keys) > 60
    for key in keys:
        with pytest.raises(UserError, match=rf"config\.{re.escape(key)} is"):
            from_mapping(changed(**{key: value}))


COMMAND_LINES = [
    (
        ["--config.retrieval.train.epochs=0", "--config.seed=-1", "--config.ranking.model.encoder.dropout=1.5"],
        ["train.epochs is 0; it must be at least 1", "seed is -1; it must be", "dropout is 1.5; it must be"],
    ),
    (
        ["--config.seed=x", "--config.retrieval.trian.epochs=3"],
        ["config.seed is 'x'; it must be an int", "Did you mean config.retrieval.train?"],
    ),
    (["--config.data.path=nowhere.csv"], ["config.data.path: ", "nowhere.csv"]),
    (["--config=FILE", "def get_config(:"], ["config.py:1: SyntaxError"]),
    (["--config=FILE", "raise RuntimeError('boom')"], ["config.py:1: RuntimeError: boom"]),
    (["--config=FILE", "def get_config():\n    raise RuntimeError('boom')"], ["RuntimeError: boom"]),
    (["--config=FILE", "x = 1"], ["has no function get_config"]),
    (["--config=FILE", "def get_config():\n    return {}"], ["gives a dict; it must give a ConfigDict"]),
]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [*COMMAND_LINES[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in COMMAND_LINES[2:])],
)
def test_the_command_line_refuses_a_malformed_config_before_any_work(
    arguments: list[str], messages: list[str], tmp_path: Path
) -> None:
    if arguments[0] == "--config=FILE":
        (tmp_path / "config.py").write_text(arguments[1])
        arguments = [f"--config={tmp_path / 'config.py'}"]
    command = [sys.executable, str(ROOT / "experiments" / "launch.py"), *arguments, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for message in messages:
        assert message in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_setting_is_named() -> None:
    values = dataclasses.asdict(default_config())
    del values["data"], values["seed"]
    with pytest.raises(UserError, match="config lacks data, seed"):
        from_mapping(values)
