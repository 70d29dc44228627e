"""The rival of the benchmarks: the original's ranker in plain PyTorch, with the original's names of parameters.

Tokens are the user, the history and the candidates, all in one sequence; every token pools over every token. A plain training step is here
as well: forward, binary cross-entropy, backward, clipping, AdamW over all parameters, tables included.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

MASKED, LEAST_WEIGHT, LEAST_NORM, LIMIT, EPS = -1e4, 1e-9, 1e-6, 100.0, 1e-6


class Shape(NamedTuple):
    """Sizes of the ranker; `users` to `categories` are rows of tables, entry 0 included."""

    layers: int
    width: int
    heads: int
    hidden: int
    users: int
    items: int
    categories: int
    positions: int
    genders: int = 3
    ages: int = 10
    actions: int = 4


class Inputs(NamedTuple):
    """Ids [B], [B, S], [B, C], features [B], [B], [B, C]; 0 is padding or unknown."""

    user_id: Tensor
    history_item_ids: Tensor
    candidate_item_ids: Tensor
    gender: Tensor
    age: Tensor
    candidate_categories: Tensor


class Attention(nn.Module):
    """Additive attention with its own value projection and L2-normalised pools."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.query_weight = nn.Linear(width, heads)
        self.key_weight = nn.Linear(width, heads)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        query_BTHE, key_BTHE, value_BTHE = (
            project(x_BTD).unflatten(-1, (self.heads, -1)) for project in (self.query, self.key, self.value)
        )

        def pool(logit_BTH: Tensor, of_BTHE: Tensor) -> Tensor:
            logit_BTH = logit_BTH.masked_fill(padding_BT[..., None], MASKED)
            weight_BTH = logit_BTH.softmax(1).clamp(min=LEAST_WEIGHT)
            pooled_BHE = torch.einsum("bth,bthe->bhe", weight_BTH, of_BTHE)
            return functional.normalize(pooled_BHE, dim=-1, eps=LEAST_NORM)

        pooled_BHE = pool(self.query_weight(x_BTD), query_BTHE)
        pooled_BHE = pool(self.key_weight(x_BTD), key_BTHE * pooled_BHE[:, None])
        mixed_BTHE = value_BTHE * pooled_BHE[:, None] + query_BTHE
        return self.out_proj(mixed_BTHE.flatten(2)).clamp(-LIMIT, LIMIT)


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = Attention(shape.width, shape.heads)
        # Two places without parameters, where the original has dropout.
        self.ffn = nn.Sequential(
            nn.Linear(shape.width, shape.hidden), nn.GELU(), nn.Identity(), nn.Linear(shape.hidden, shape.width)
        )
        self.norm1 = nn.LayerNorm(shape.width, eps=EPS)
        self.norm2 = nn.LayerNorm(shape.width, eps=EPS)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD), padding_BT)
        return x_BTD + self.ffn(self.norm2(x_BTD))


class Encoder(nn.Module):
    """Blocks and a final LayerNorm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.width, eps=EPS)

    def forward(self, x_BTD: Tensor, padding_BT: Tensor) -> Tensor:
        for layer in self.layers:
            x_BTD = layer(x_BTD, padding_BT)
        return self.final_norm(x_BTD)


class Segments(nn.Module):
    """One embedding each for the user, the history and the candidates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, width)


class Positions(nn.Module):
    """The stored table of sinusoidal positions."""

    pe: Tensor

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        position = torch.arange(positions)[:, None]
        rate = 10000.0 ** (-torch.arange(0, width, 2) / width)
        table = torch.stack([(position * rate).sin(), (position * rate).cos()], -1).flatten(1)
        self.register_buffer("pe", table[None])

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.pe[:, : x_BTD.shape[1]]


class Ranker(nn.Module):
    """Four logits a candidate, from the joint encoding of user, history and candidates."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(shape.users, shape.width)
        self.item_embedding = nn.Embedding(shape.items, shape.width)
        self.gender_embedding = nn.Embedding(shape.genders, shape.width)
        self.age_embedding = nn.Embedding(shape.ages, shape.width)
        self.category_embedding = nn.Embedding(shape.categories, shape.width)
        self.segment_embedding = Segments(shape.width)
        self.pos_encoding = Positions(shape.positions, shape.width)
        self.encoder = Encoder(shape)
        self.output_norm = nn.LayerNorm(shape.width)
        self.unembedding = nn.Linear(shape.width, shape.actions)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits [B, C, A]."""
        segment_3D = self.segment_embedding.embedding.weight
        user_BD = self.user_embedding(inputs.user_id) + self.gender_embedding(inputs.gender)
        user_BD = user_BD + self.age_embedding(inputs.age) + segment_3D[0]
        history_BSD = self.pos_encoding(self.item_embedding(inputs.history_item_ids)) + segment_3D[1]
        candidate_BCD = self.item_embedding(inputs.candidate_item_ids)
        candidate_BCD = candidate_BCD + self.category_embedding(inputs.candidate_categories)
        candidate_BCD = self.pos_encoding(candidate_BCD) + segment_3D[2]
        x_BTD = torch.cat([user_BD[:, None], history_BSD, candidate_BCD], 1)
        # The user and every candidate are always real.
        padding_BS, candidates = inputs.history_item_ids == 0, candidate_BCD.shape[1]
        padding_BT = functional.pad(functional.pad(padding_BS, (1, 0)), (0, candidates))
        y_BCD = self.encoder(x_BTD, padding_BT)[:, -candidates:]
        return self.unembedding(self.output_norm(y_BCD))


def load_ranker(weights: Mapping[str, Tensor], heads: int) -> Ranker:
    """A ranker with a state dict of the original, whose table of single actions no logit depends on."""
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layers."))
    users, width = weights["user_embedding.weight"].shape
    shape = Shape(
        layers=layers,
        width=width,
        heads=heads,
        hidden=len(weights["encoder.layers.0.ffn.0.weight"]),
        users=users,
        items=len(weights["item_embedding.weight"]),
        categories=len(weights["category_embedding.weight"]),
        positions=weights["pos_encoding.pe"].shape[1],
        genders=len(weights["gender_embedding.weight"]),
        ages=len(weights["age_embedding.weight"]),
        actions=len(weights["unembedding.weight"]),
    )
    ranker = Ranker(shape)
    ranker.load_state_dict({name: weight for name, weight in weights.items() if name != "action_embedding.weight"})
    return ranker


def training_step(
    ranker: Ranker, inputs: Inputs, label_BCA: Tensor, *, rate: float = 1e-3, compiled: bool
) -> Callable[[], float]:
    """A function that takes one training step on the same batch again and returns the loss before it.

    Args:
        ranker: changed in place.
        inputs, label_BCA: the batch; labels are 0 or 1, float32.
        rate: of AdamW.
        compiled: forward and backward through `torch.compile`.
    """
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=rate, weight_decay=0.01, fused=True)

    def loss(*inputs: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(ranker(Inputs(*inputs)), label_BCA)

    forward = torch.compile(loss) if compiled else loss

    def step() -> float:
        optimizer.zero_grad()
        value = forward(*inputs)
        value.backward()
        nn.utils.clip_grad_norm_(ranker.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return step
