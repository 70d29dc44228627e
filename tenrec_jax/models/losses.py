"""Losses as sums, so that a mean over devices or micro-batches is the mean over examples."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from tenrec_jax.models.slots import Slots


def sampled_softmax(
    query_PD: Array,
    positive_PD: Array,
    positive_id_P: Array,
    negative_ND: Array,
    negative_id_N: Array,
    log_expected_count_N: Array,
    where_P: Array,
    *,
    label_smoothing: float = 0.0,
) -> Array:
    """Cross-entropy of each positive against sampled negatives, with log-Q correction; summed over `where_P`.

    The negatives may come from several samplers and may repeat. With `Q_j` the number of times item j is expected among them,

        loss = log(exp(s_pos) + sum_{j != pos} exp(s_j - log Q_j)) - s_pos,

    whose sum estimates the full softmax's partition function without bias (Bengio and Senecal, 2008; mixed negatives: Yang et al., 2020).
    Accidental hits, negatives equal to the positive, are masked. With every item as a negative once and log Q = 0 it is the full softmax.

    Label smoothing (Szegedy et al., 2016) takes a share e of the target away from the positive and spreads it evenly over all items, so
    that no score is driven to infinity: the loss becomes log Z - (1 - e) s_pos - e mean_j s_j. The mean over all items is that over the
    negatives, accidental hits among them, weighted by 1 / Q_j: the score of their mean vector.

    Args:
        query_PD: P queries. positive_PD, positive_id_P: vector and id of the item that each should find.
        negative_ND, negative_id_N: vectors and ids of the N shared negatives.
        log_expected_count_N: log Q of each negative; 0 leaves the scores uncorrected.
        where_P: True for the queries that count.
        label_smoothing: e.
    """
    score_P = (query_PD * positive_PD).sum(-1)
    score_PN = query_PD @ negative_ND.T - log_expected_count_N
    score_PN = jnp.where(positive_id_P[:, None] == negative_id_N, -jnp.inf, score_PN)
    partition_P = jnp.logaddexp(score_P, jax.nn.logsumexp(score_PN, axis=-1))
    target_P = score_P
    if label_smoothing:
        mean_D = jnp.average(negative_ND, axis=0, weights=jnp.exp(-log_expected_count_N))
        target_P = (1.0 - label_smoothing) * score_P + label_smoothing * (query_PD @ mean_D)
    return jnp.where(where_P, partition_P - target_P, 0.0).sum()


def action_losses(logit_BTA: Array, label_BTA: Array, where_BT: Array) -> Array:
    """Binary cross-entropy of each action, summed over the events in `where_BT`. Returns [A]."""
    loss_BTA = optax.losses.sigmoid_binary_cross_entropy(logit_BTA, label_BTA.astype(logit_BTA.dtype))
    return jnp.where(where_BT[..., None], loss_BTA, 0.0).sum((0, 1))


def pairwise_losses(
    logit_BTA: Array, label_BTA: Array, where_BT: Array, slots: Slots, key: Array, *, pairs: int = 4
) -> Array:
    """Logistic loss on pairs of events of one timeline that differ in their label, summed. Returns [A].

    It is what GAUC counts (BPR: Rendle et al., 2009). Each event meets `pairs` random others of its timeline, so the cost stays linear.
    """
    length_BT = _lengths(slots)

    def with_others(key: Array) -> Array:
        shift_BT = (jax.random.uniform(key, length_BT.shape) * (length_BT - 1)).astype(jnp.int32) + 1
        other_BT = jnp.arange(length_BT.shape[1]) - slots.place + (slots.place + shift_BT) % length_BT

        def other(x: Array) -> Array:
            return jnp.take_along_axis(x, other_BT.reshape(*other_BT.shape, *(1,) * (x.ndim - 2)), axis=1)

        sign_BTA = label_BTA.astype(logit_BTA.dtype) - other(label_BTA).astype(logit_BTA.dtype)
        counts_BTA = (where_BT & other(where_BT))[..., None] & (sign_BTA != 0)
        loss_BTA = jax.nn.softplus(-sign_BTA * (logit_BTA - other(logit_BTA)))
        return jnp.where(counts_BTA, loss_BTA, 0.0).sum((0, 1))

    return jax.vmap(with_others)(jax.random.split(key, pairs)).sum(0) / pairs


def _lengths(slots: Slots) -> Array:
    """Slots of the timeline that each slot belongs to, [B, T]."""
    length = slots.place.shape[1]
    next_BT = jnp.where(slots.first, jnp.arange(length), length)
    end_BT = jax.lax.cummin(jnp.pad(next_BT[:, 1:], ((0, 0), (0, 1)), constant_values=length), axis=1, reverse=True)
    return end_BT - (jnp.arange(length) - slots.place)
