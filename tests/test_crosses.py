"""What the crosses know of a user's past, against plain loops over the events."""

import mirrors
import numpy as np
import pytest
from scipy.special import logit

from tenrec_jax.models import running_means, tallies
from tenrec_jax.models.pooling import empty_pool
from tenrec_jax.models.slots import Slots, slots_of
from tenrec_jax.timeline import Events, Timeline

SLOTS, CATEGORIES, ACTIONS = 41, mirrors.VOCABULARY.categories, mirrors.VOCABULARY.actions


@pytest.fixture
def packed() -> tuple[Timeline, Slots]:
    """Two rows of up to four timelines, a fifth of whose events are hidden from later ones."""
    timeline = mirrors.random_timeline(np.random.default_rng(0), 2, SLOTS, users=4)
    return timeline, slots_of(timeline.start, SLOTS)


def before(events: Events, slots: Slots, row: int, slot: int) -> list[int]:
    """The slots before one, in its own timeline, whose events may be seen."""
    begin = slot - int(slots.place[row, slot])
    return [s for s in range(begin, slot) if events.mask[row, s]]


def tally(events: Events, row: int, seen: list[int]) -> list[int]:
    return [len(seen), *events.action[row, seen].sum(0)]


def test_tallies_before_an_event_equal_counting_one_by_one(packed: tuple[Timeline, Slots]) -> None:
    events, slots = packed[0].events, packed[1]
    matched, own = tallies.tallies_before(events, slots, CATEGORIES)
    for row in range(2):
        for slot in range(SLOTS):
            seen = before(events, slots, row, slot)
            alike = [s for s in seen if events.category[row, s] == events.category[row, slot]]
            np.testing.assert_array_equal(own[row, slot], tally(events, row, seen))
            np.testing.assert_array_equal(matched[row, slot], tally(events, row, alike))


def test_tallies_of_a_state_equal_counting_in_any_stretches() -> None:
    events = mirrors.random_events(np.random.default_rng(1), 3, SLOTS)
    found = tallies.no_tallies(3, CATEGORIES, ACTIONS)
    for stretch in (slice(0, 1), slice(1, 30), slice(30, SLOTS)):
        found = tallies.with_events(found, Events(*(x[:, stretch] for x in events)))
    for row in range(3):
        for category in range(CATEGORIES):
            seen = np.flatnonzero(events.mask[row] & (events.category[row] == category))
            np.testing.assert_array_equal(found[row, category], tally(events, row, seen))


def test_means_before_an_event_equal_those_of_a_loop(packed: tuple[Timeline, Slots]) -> None:
    events, slots = packed[0].events, packed[1]
    random = np.random.default_rng(2)
    x, counts = random.standard_normal((2, SLOTS, 3, 5), np.float32), random.random((2, SLOTS, 3)) < 0.3
    counts &= events.mask[..., None]
    found = running_means.means_before(x, counts, slots)
    state = running_means.extended(empty_pool((2,), 3, 5), x[:, :20], counts[:, :20])
    whole = running_means.means(running_means.extended(state, x[:, 20:], counts[:, 20:]))

    def mean(row: int, slots: list[int] | range, head: int) -> np.ndarray:
        seen = [s for s in slots if counts[row, s, head]]
        return x[row, seen, head].mean(0, dtype=np.float64) if seen else np.zeros(5)

    for row in range(2):
        for slot in range(SLOTS):
            seen = before(events, slots, row, slot)
            expected = np.concatenate([mean(row, seen, head) for head in range(3)])
            np.testing.assert_allclose(found[row, slot], expected, atol=1e-6)
        np.testing.assert_allclose(
            whole[row], np.concatenate([mean(row, range(SLOTS), h) for h in range(3)]), atol=1e-6
        )


def test_matched_rates_are_shares_smoothed_towards_the_users_own() -> None:
    random, rates, strength = np.random.default_rng(3), tallies.MatchedRates(2), np.array([3.0, 0.5])
    rates.log_strength[...] = np.log(strength)
    n = random.integers(0, 50, (20, 1))
    n[0] = 0
    of_all = random.integers(0, n + 1, (20, 2))
    m = random.integers(0, n + 1)
    matched = np.minimum(random.integers(0, m + 1, (20, 2)), of_all)
    own = (of_all + 0.5) / (n + 1)
    smoothed = (matched + strength * own) / (m + strength)
    found = rates(*(np.float32(np.concatenate(pair, axis=1)) for pair in ((m, matched), (n, of_all))))
    expected = [logit(smoothed) - logit(own), logit(own) / 4, np.log1p(m) / 4, np.log1p(n) / 4]
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), rtol=1e-4, atol=1e-5)
