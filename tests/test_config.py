"""Configurations: typed, locked, explained."""

import dataclasses

import pytest

from tenrec_jax.config import default_config, from_mapping, to_config_dict
from tenrec_jax.errors import UserError


def test_a_config_survives_the_way_through_a_config_dict() -> None:
    config = default_config()
    assert from_mapping(to_config_dict(config).to_dict()) == config


def test_a_config_dict_is_locked() -> None:
    with pytest.raises(AttributeError, match="retrieval"):
        to_config_dict(default_config()).retreival = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, r"config\.sede is not a setting\. Did you mean config\.seed\?"),
        ({"seed": "0"}, r"config\.seed is '0', a str; it must be a int"),
        ({"seed": True}, r"config\.seed is True, a bool"),
        ({"index": {"kind": "faiss"}}, r"index\.kind is 'faiss': choose auto, scann or exact"),
        ({"data": 3}, r"config\.data is 3"),
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
