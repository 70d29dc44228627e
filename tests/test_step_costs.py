"""What a dry run tells of a training step."""

import dataclasses

import jax
import pytest

from tenrec_jax.config import RankingConfig, RunConfig, default_config
from tenrec_jax.errors import UserError
from tenrec_jax.models.features import Vocabulary
from tenrec_jax.step_costs import Program, StepCost, programs, step_cost
from tenrec_jax.training.parallel import DataParallel

pytestmark = pytest.mark.usefixtures("quick_compilation")
VOCABULARY = Vocabulary(users=101, items=501, genders=3, ages=8, categories=3, actions=4)
LENGTH, ROWS, WIDTH, HIDDEN, LAYERS = 32, 8, 64, 128, 4


def ranking_config(accumulate: int = 1, **encoder: object) -> RankingConfig:
    ranking = default_config().ranking
    shape = {"num_layers": LAYERS, "width": WIDTH, "num_heads": 4, "hidden": HIDDEN, "unroll": False}
    model = dataclasses.replace(
        ranking.model,
        encoder=dataclasses.replace(ranking.model.encoder, **(shape | encoder)),
        features=dataclasses.replace(ranking.model.features, max_length=LENGTH),
    )
    train = dataclasses.replace(ranking.train, accumulate=accumulate)
    return dataclasses.replace(ranking, model=model, train=train, events_per_batch=ROWS * LENGTH)


def cost(config: RankingConfig, remat: str = "none", devices: int = 1) -> StepCost:
    return step_cost(Program("ranking", config, remat), VOCABULARY, DataParallel(jax.local_devices()[:devices]))


@pytest.fixture(scope="module")
def plain() -> StepCost:
    return cost(ranking_config())


def test_operations_are_those_of_the_matrix_products_and_little_more(plain: StepCost) -> None:
    """A weight takes a multiplication and an addition a token forward and four operations backward; an event is two tokens."""
    weights = LAYERS * WIDTH * (4 * WIDTH + 2 * HIDDEN)
    least = 6 * weights * 2 * ROWS * LENGTH
    assert least < plain.flops < 1.35 * least


def test_operations_do_not_depend_on_loops(plain: StepCost) -> None:
    assert cost(ranking_config(accumulate=4)).flops == plain.flops


def test_rematerialisation_takes_a_forward_pass_more_and_frees_memory(plain: StepCost) -> None:
    again = cost(ranking_config(), "nothing_saveable")
    assert 1.15 < again.flops / plain.flops < 1.45
    assert again.temporary_bytes < plain.temporary_bytes / 2
    assert (again.argument_bytes, again.output_bytes) == (plain.argument_bytes, plain.output_bytes)


def test_devices_share_the_batch_and_the_state_is_updated_in_place(plain: StepCost) -> None:
    shared = cost(ranking_config(), devices=2)
    assert 0.4 < shared.flops / plain.flops < 0.6
    assert shared.temporary_bytes < 0.75 * plain.temporary_bytes
    everything = plain.argument_bytes + plain.output_bytes + plain.temporary_bytes
    assert plain.temporary_bytes < plain.peak_bytes < everything - 0.9 * plain.output_bytes


def test_both_stages_are_told_with_the_configured_policy_or_a_default_one() -> None:
    run: RunConfig = dataclasses.replace(default_config(), ranking=ranking_config(remat="dots_saveable"))
    assert [(program.stage, program.remat) for program in programs(run)] == [
        ("retrieval", "none"),
        ("retrieval", "nothing_saveable"),
        ("ranking", "none"),
        ("ranking", "dots_saveable"),
    ]
    off = dataclasses.replace(run, ranking=dataclasses.replace(run.ranking, enabled=False))
    assert {program.stage for program in programs(off)} == {"retrieval"}


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(UserError, match=r"ranking\.train\.accumulate is 3, but a device has 8 rows"):
        cost(ranking_config(accumulate=3))
