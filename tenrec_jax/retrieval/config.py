"""How an index searches."""

from dataclasses import dataclass

from tenrec_jax.errors import UserError


@dataclass(frozen=True)
class IndexConfig:
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

    kind: str = "auto"
    target_recall: float = 0.99
    num_leaves: int = 0
    leaves_to_search: int = 0
    reorder: int = 0
    min_items_for_scann: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in ("auto", "scann", "exact"):
            raise UserError(f"index.kind is {self.kind!r}: choose auto, scann or exact")
        if not 0 < self.target_recall <= 1:
            raise UserError(f"index.target_recall is {self.target_recall}: give a share in (0, 1]")
        for key in ("num_leaves", "leaves_to_search", "reorder", "min_items_for_scann"):
            if getattr(self, key) < 0:
                raise UserError(f"index.{key} is {getattr(self, key)}: give a positive number, or 0 to have it chosen")
