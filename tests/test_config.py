"""Configurations: typed, locked, explained."""

import dataclasses
import runpy
from pathlib import Path

import pytest

from tenrec_jax.config import default_config, from_mapping, to_config_dict
from tenrec_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "experiments" / "configs"
VARIANTS = {"tenrec": ("qb_video", "qk_video", "ctr_1m")}


def test_a_config_survives_the_way_through_a_config_dict() -> None:
    config = default_config()
    assert from_mapping(to_config_dict(config).to_dict()) == config


def test_every_experiment_is_a_valid_config_of_its_own_name() -> None:
    for path in sorted(CONFIGS.glob("*.py")):
        get_config = runpy.run_path(str(path))["get_config"]
        for variant in VARIANTS.get(path.stem, ()) or [None]:
            config = from_mapping((get_config(variant) if variant else get_config()).to_dict())
            assert config.name == (f"{path.stem}_{variant}" if variant else path.stem)


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
        ({"seed": "0"}, r"config\.seed is '0', a str; it must be a int"),
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
        ({"serving": {"action_values": [1, "x"]}}, r"config\.serving\.action_values\[1\] is 'x'"),
    ],
)
def test_a_wrong_setting_is_named(change: dict, message: str) -> None:
    values = dataclasses.asdict(default_config()) | change
    with pytest.raises(UserError, match=message):
        from_mapping(values)


def test_a_missing_setting_is_named() -> None:
    values = dataclasses.asdict(default_config())
    del values["data"], values["seed"]
    with pytest.raises(UserError, match="config lacks data, seed"):
        from_mapping(values)
