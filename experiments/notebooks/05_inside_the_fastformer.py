# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/experiments/notebooks/05_inside_the_fastformer.ipynb)
#
# # 5. Inside the Fastformer
#
# Attention lets every event of a history look at every other one, and pays for it with the square of the length. The Fastformer's
# *additive* attention (Wu et al., 2021) asks less: each event gets one number a head, a softmax over these numbers pools the whole history
# into one vector, and each event looks at that vector alone. This notebook opens a trained ranker and looks at four things:
#
# 1. which of a user's events the pools listen to;
# 2. what that costs, beside softmax attention, when the history gets longer;
# 3. that training on a whole timeline in one pass gives the numbers that serving gives, one event at a time;
# 4. that a candidate's score does not depend on the other candidates.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROWS = int(os.environ.get("TENREC_NOTEBOOK_ROWS", "40000"))  # of the synthetic log
WORKDIR = Path("runs") / f"notebook_{ROWS}"  # holds all that the run makes
REPOSITORY = "OWNER/REPO"  # where Colab installs from

if importlib.util.find_spec("tenrec_jax") is None:
    package = f"tenrec_jax[scann,torch,plot] @ git+https://github.com/{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %%
import dataclasses
import time
from typing import Literal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from tenrec_jax import artifact
from tenrec_jax.config import default_config, from_mapping, to_config_dict
from tenrec_jax.models.blocks import Encoder, places_of, split_heads
from tenrec_jax.models.encoders import make_encoder
from tenrec_jax.models.features import context_tokens, event_tokens
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.timeline import Events, Profile, Timeline

# %% [markdown]
# The run is that of notebook 1, with the same settings: where it lies in `WORKDIR`, it is read, and elsewhere it is made, in a minute.

# %%
settings = to_config_dict(default_config())
settings.name, settings.data.twin_rows, settings.evaluation.resamples = "notebook", ROWS, 200
for stage in (settings.retrieval, settings.ranking):
    stage.events_per_batch, stage.train.epochs = 1024, 3
    stage.train.optimizer.update(learning_rate=2e-3, table_learning_rate=2e-4)
    stage.model.encoder.update(num_layers=1, width=32, hidden=64)
    stage.model.features.update(max_length=64, item_start="spectral")
settings.retrieval.model.item_bias, settings.ranking.pairwise_weight = True, 1.0
pipeline = Pipeline(from_mapping(settings.to_dict()), WORKDIR)
pipeline.run()
loaded = artifact.load(pipeline.recommender)
assert loaded.ranking is not None
ranker = loaded.ranking.merged()

# %% [markdown]
# ## One user's history
#
# Letters say what an array's axes are: `B` users (one, here), `T` places of a timeline, `C` candidates, `D` width, `H` heads, `E` width of
# a head. A user's timeline begins with a token for the user, followed by one token an event: the item, its category, and what the user did.

# %%
catalogue, length = loaded.catalogue, 40
user = int(np.argmax(np.diff(catalogue.offsets)[1:] >= length)) + 1  # the first with so many events
rows = slice(catalogue.offsets[user], catalogue.offsets[user] + length)
item_BT, action_BTA = catalogue.item[None, rows], catalogue.action[None, rows]
mask_BT = np.ones_like(item_BT, bool)
events = Events(catalogue.trained_item[item_BT], catalogue.category[item_BT], action_BTA, mask_BT)
profile = Profile(catalogue.trained_user[[user]], catalogue.gender[[user]], catalogue.age[[user]])
clicked_T = action_BTA[0, :, loaded.actions.index("click")].astype(bool)

place_BT = jnp.arange(length)[None]
x_BTD = jnp.concatenate(
    [ranker.users(profile)[:, None], event_tokens(ranker.items, ranker.events, events, place_BT)], axis=1
)
print(f"user {catalogue.user_id[user]}: {length} events, {clicked_T.sum()} clicks; tokens {x_BTD.shape}")

# %% [markdown]
# ## What the pools listen to
#
# With `a_i` the number that a token gets from a head, and `Q_i` its projection, the head's pooled query is the mean of the `Q_i`,
# weighted by `softmax(a)`; keys are pooled alike. To `a_i` a learned rate times the place is added: in a softmax that is an exponential
# decay of older events, faster or slower from head to head. So a picture of the weights is all there is to know of who listens to whom.

# %%
graphdef, parameters = nnx.split(ranker.encoder.blocks)
first_layer = nnx.merge(
    graphdef, jax.tree.map(lambda leaf: leaf[0], parameters)
)  # layers are stacked on the first axis
attention, y_BTD = first_layer.attention, first_layer.norm1(x_BTD)
decay_T1 = np.arange(length + 1)[:, None]
logit_THH = jnp.stack([attention.query_weight(y_BTD)[0], attention.key_weight(y_BTD)[0]])
weight_2TH = np.asarray(jax.nn.softmax(logit_THH + decay_T1 * attention.recency_rate[...], axis=1))

figure, axes = plt.subplots(2, 1, figsize=(10, 4), layout="constrained", sharex=True)
for axis, name, weight_TH in zip(axes, ("queries", "keys"), weight_2TH, strict=True):
    picture = axis.imshow(weight_TH.T, aspect="auto", cmap="magma", vmin=0)
    axis.set(title=f"weights of the pooled {name}", ylabel="head", yticks=range(attention.heads))
    axis.plot(1 + np.flatnonzero(clicked_T), np.full(clicked_T.sum(), -0.42), "v", color="tab:cyan", markersize=4)
    figure.colorbar(picture)
axes[1].set_xlabel("place in the timeline: 0 is the user's token; triangles are clicks")
plt.show()

# %% [markdown]
# Is the picture true? The encoder keeps, of a history however long, only the pools: three sums a head. Their mean must be the average of
# the projections with the weights in the picture.

# %%
state = ranker.extend(ranker.start(profile), events)
pooled_HE = state.encoder.memory.mean()[0, 0]  # of the first layer: the heads of the queries, then those of the keys
projected = jnp.stack([split_heads(layer(y_BTD)[0], attention.heads) for layer in (attention.query, attention.key)])
by_hand_HE = jnp.einsum("gth,gthe->ghe", weight_2TH, projected).reshape(pooled_HE.shape)
print(f"largest difference {jnp.abs(pooled_HE - by_hand_HE).max():.1e} of values up to {jnp.abs(pooled_HE).max():.2f}")
np.testing.assert_allclose(pooled_HE, by_hand_HE, atol=1e-5)
sizes = [leaf.size for leaf in jax.tree.leaves(state.encoder.memory)]
print(f"a user's state in the encoder: {sum(sizes)} numbers, whether after {length} events or a million")
assert sizes == [leaf.size for leaf in jax.tree.leaves(ranker.start(profile).encoder.memory)]

# %% [markdown]
# ## What it costs
#
# The same encoder, with additive and with softmax attention, reads histories whose length doubles. Twice the length should cost additive
# attention twice the time, and softmax attention four times, once the square outweighs the rest. Times are the best of five; the operations
# are counted by the compiler.

# %%
LENGTHS = [2**power for power in range(8, 11 if ROWS < 10_000 else 13)]


class Cost:
    """Of one encoder: seconds and floating-point operations by length."""

    def __init__(self, kind: Literal["additive", "softmax"]) -> None:
        shape = dataclasses.replace(ranker.encoder.config, attention=kind)
        self.encoder: Encoder = make_encoder(shape, max(LENGTHS), rngs=nnx.Rngs(0))
        self.measured = [self._of(length) for length in LENGTHS]
        self.seconds, self.operations = (np.asarray(column) for column in zip(*self.measured, strict=True))

    def _of(self, length: int) -> tuple[float, float]:
        x_BTD, places = jnp.ones((1, length, self.encoder.config.width)), places_of(jnp.ones((1, length), bool))
        read = jax.jit(lambda x_BTD: self.encoder.context(x_BTD, places)).lower(x_BTD).compile()
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            jax.block_until_ready(read(x_BTD))
            seconds.append(time.perf_counter() - began)
        counted = read.cost_analysis()
        assert counted is not None
        return min(seconds[1:]), counted["flops"]


costs = {"additive": Cost("additive"), "softmax": Cost("softmax")}
print(f"{'events':>8}  {'kind':<9}{'ms':>9}{'ratio':>7}{'Mflop':>10}{'ratio':>7}")
for kind, cost in costs.items():
    for place, events_read in enumerate(LENGTHS):
        ratios = [each[place] / each[place - 1] if place else np.nan for each in (cost.seconds, cost.operations)]
        print(
            f"{events_read:>8}  {kind:<9}{1e3 * cost.seconds[place]:>9.2f}{ratios[0]:>7.2f}"
            f"{cost.operations[place] / 1e6:>10.1f}{ratios[1]:>7.2f}"
        )
growth = {kind: cost.operations[-1] / cost.operations[-2] for kind, cost in costs.items()}
assert growth["additive"] < 2.1
assert growth["softmax"] > 2.5

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for kind, cost in costs.items():
    axes[0].loglog(LENGTHS, 1e3 * cost.seconds, "o-", base=2, label=kind)
    axes[1].loglog(LENGTHS, cost.operations / 1e6, "o-", base=2, label=kind)
axes[0].set(title="measured here", xlabel="events in the history", ylabel="milliseconds")
axes[1].set(title="counted by the compiler", xlabel="events in the history", ylabel="million operations")
for axis in axes:
    axis.legend()
plt.show()

# %% [markdown]
# The operations tell the law; the times tell this machine, on which other work, caches and the number of threads weigh in, so expect them
# to bend. For histories of a few dozen events both are quick, and the difference that counts in serving is another one: additive
# attention's state has constant size, where softmax attention has to keep every event.
#
# ## One pass gives what serving gives
#
# Training reads a timeline once and predicts at every place what came next there; serving keeps a state, takes in an event, and scores.
# Both must agree, or the model would be asked for something else than it has learned. At each place we compare the encoding of the next
# item in one pass with its encoding by a state that has seen the events before it, and nothing else; and the logits made of them.

# %%
timeline = Timeline(Profile(*(part[None] for part in profile)), np.zeros((1, 1), np.int32), events)


@jax.jit
def one_pass(timeline: Timeline) -> tuple[jax.Array, jax.Array]:
    """Encodings [B, T, D] and logits [B, T, A] of every event, given the events before it."""
    context_BTD, places, slots = context_tokens(ranker.users, ranker.items, ranker.events, timeline)
    items_BTD = ranker.items(timeline.events.item, timeline.events.category)
    encoded_BTD = ranker.encoder.timeline(context_BTD, ranker.events.candidates(items_BTD, slots.place), places)
    return encoded_BTD, ranker.timeline_logits(timeline)


@jax.jit
def served(seen_BT: jax.Array, item_BC: jax.Array, category_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encodings [B, C, D] and logits [B, C, A] of candidates by a state that has read the events of a mask."""
    state = ranker.extend(ranker.start(profile), events._replace(mask=seen_BT))
    place_B1 = state.encoder.length_B[:, None] - 1
    target_BCD = ranker.events.candidates(ranker.items(item_BC, category_BC), place_B1)
    return ranker.encoder.isolated(state.encoder, target_BCD), ranker.score(state, item_BC, category_BC)


encoded_TD, logit_TA = (np.asarray(output[0]) for output in one_pass(timeline))
one_by_one = [served(place_BT < t, events.item[:, [t]], events.category[:, [t]]) for t in range(length)]
served_TD, served_TA = (np.concatenate([output[0] for output in outputs]) for outputs in zip(*one_by_one, strict=True))
difference_T = np.maximum(np.abs(encoded_TD - served_TD).max(-1), np.abs(logit_TA - served_TA).max(-1))
print(f"largest difference {difference_T.max():.1e} of encodings up to {np.abs(encoded_TD).max():.1f}")
assert difference_T.max() <= 1e-5

figure, axes = plt.subplots(2, 1, figsize=(10, 4), layout="constrained", sharex=True, height_ratios=(2, 1))
probability_T = 1 / (1 + np.exp(-logit_TA[:, 0]))
axes[0].plot(probability_T, color="tab:blue", linewidth=1, label="P(click), one pass")
axes[0].plot(1 / (1 + np.exp(-served_TA[:, 0])), "x", color="tab:orange", label="P(click), served")
axes[0].plot(np.flatnonzero(clicked_T), probability_T[clicked_T], "v", color="tab:cyan", label="was clicked")
figure.legend(loc="outside upper right", ncols=3)
axes[1].semilogy(np.maximum(difference_T, 1e-9), ".", color="tab:gray")
axes[1].axhline(1e-5, color="tab:red", linewidth=1)
axes[1].set(xlabel="event", ylabel="difference", ylim=(1e-9, 1e-4))
plt.show()

# %% [markdown]
# ## A score is a candidate's own
#
# Here is what the word *isolated* means. One candidate is encoded among nine others, and again among nine different ones. Its encoding, and
# so its score, must be the same: then candidates can be scored in any batches, and a score can be kept or compared. The original system's
# `joint` mode, in which every token pools over all tokens, does not have this: with the same weights, the candidate's encoding moves.

# %%
random = np.random.default_rng(0)
candidate_RC = random.choice(np.arange(1, len(catalogue.item_id)), (2, 10), replace=False)
candidate_RC[1, 0] = candidate_RC[0, 0]  # the one that stays
known_RC, category_RC = catalogue.trained_item[candidate_RC], catalogue.category[candidate_RC]


@jax.jit
def joint(item_BC: jax.Array, category_BC: jax.Array) -> jax.Array:
    """Encodings [B, C, D] of candidates when all tokens see all tokens."""
    target_BCD = ranker.events.candidates(ranker.items(item_BC, category_BC), jnp.full(item_BC.shape, length))
    tokens_BTD = jnp.concatenate([x_BTD, target_BCD], axis=1)
    return ranker.encoder.joint(tokens_BTD, jnp.ones(tokens_BTD.shape[:2], bool))[:, -item_BC.shape[1] :]


isolated_RD = np.stack([served(mask_BT, known_RC[[r]], category_RC[[r]])[0][0, 0] for r in range(2)])
joint_RD = np.stack([joint(known_RC[[r]], category_RC[[r]])[0, 0] for r in range(2)])
moved = {"isolated": np.abs(np.diff(isolated_RD, axis=0)).max(), "joint": np.abs(np.diff(joint_RD, axis=0)).max()}
print("change of one candidate when the others change:", {mode: f"{change:.1e}" for mode, change in moved.items()})
assert moved["isolated"] <= 1e-6
assert moved["joint"] > 1e-4

figure, axis = plt.subplots(figsize=(6, 2), layout="constrained")
axis.barh(list(moved), list(moved.values()), color=["tab:blue", "tab:gray"])
axis.set(title="what the other candidates change in an encoding", xlabel="largest change")
plt.show()

# %% [markdown]
# ## What to do next
#
# - Set `settings.ranking.model.encoder.attention = "softmax"` in notebook 1, in another `WORKDIR`, and compare the two runs by
#   `tenrec-jax compare`: is the square worth its price on your log?
# - Read `tenrec_jax/models/pooling.py`, the one primitive behind every mode: three sums that merge. Then `fastformer.py`.
# - `experiments/benchmarks/RESULTS.md` keeps what was measured of the encoders at larger sizes.
