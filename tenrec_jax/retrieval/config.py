"""How an index searches."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tenrec_jax.settings import Natural, Range, Settings


@dataclass(frozen=True)
class IndexConfig(Settings):
    """How to search. 0 means "choose".

    Attributes:
        kind: "exact", "scann", or "auto": ScaNN where it is installed, the catalogue is large enough for it, and tuning
            reaches the recall.
        target_recall: recall@100 on the tuning queries that chosen settings must reach, in (0, 1].
        num_leaves: partitions of the ScaNN tree; chosen: the square root of the catalogue.
        leaves_to_search: partitions read per query; chosen: by tuning, and for k > 100 in proportion more. With too
            few, searches end in "no item".
        reorder: approximate hits that are scored again exactly, at least k; chosen: with the leaves, and for k > 100 in
            proportion more; where the leaves are given, max(200, 10 k).
        min_items_for_scann: "auto" searches smaller catalogues exactly.
    """

    kind: Literal["auto", "exact", "scann"] = "auto"
    target_recall: Annotated[float, Range(above=0, at_most=1)] = 0.99
    num_leaves: Natural = 0
    leaves_to_search: Natural = 0
    reorder: Natural = 0
    min_items_for_scann: Natural = 4096
