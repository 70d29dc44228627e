"""Negatives for retrieval, with the probabilities that correct for how they were drawn."""

from dataclasses import dataclass

import numpy as np

from tenrec_jax.data.batches import TrainVocabulary


@dataclass(frozen=True)
class NegativeSampler:
    """Uniform draws over the catalogue, shared by all queries of a step; a pure function of (seed, step).

    Attributes:
        vocabulary: raw draws are mapped to it, so that all unknown items together stand as item 0.
        count: draws a step.
        seed: of the draws.
    """

    vocabulary: TrainVocabulary
    count: int
    seed: int

    def draw(self, step: int) -> np.ndarray:
        """Item ids [count], int32, with replacement."""
        generator = np.random.default_rng((self.seed, step, 2))
        item = generator.integers(1, len(self.vocabulary.item), self.count)
        return self.vocabulary.item[item]

    def probability(self) -> np.ndarray:
        """Probability of each item id at one draw, float32 [N + 1]."""
        counts = np.bincount(self.vocabulary.item[1:], minlength=len(self.vocabulary.item))
        return (counts / counts.sum()).astype(np.float32)
