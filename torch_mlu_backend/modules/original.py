"""The original system's modules as they compute in evaluation, as in `tenrec_jax.interop.original_models`: for parity alone.

A score here depends on the other candidates: the ranker encodes user, history and candidates jointly.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_mlu_backend.config import OriginalConfig, Vocabulary
from torch_mlu_backend.modules.blocks import layer_norm
from torch_mlu_backend.modules.fastformer import FastformerEncoder, l2_normalize

OUTPUT_NORM_EPS = 1e-5


class PositionTable(nn.Module):
    """Adds rows 0..T-1 of a stored table to T tokens."""

    pe: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("pe", torch.zeros(1, length, width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.pe[:, : x_BTD.shape[1]]


class OriginalRanker(nn.Module):
    """User, history and candidates encoded jointly, four logits a candidate; history alone is masked where its id is 0."""

    def __init__(self, config: OriginalConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        width = config.encoder.width
        self.user_embedding = nn.Embedding(vocabulary.users, width)
        self.item_embedding = nn.Embedding(vocabulary.items, width)
        self.gender_embedding = nn.Embedding(vocabulary.genders, width)
        self.age_embedding = nn.Embedding(vocabulary.ages, width)
        self.category_embedding = nn.Embedding(vocabulary.categories, width)
        self.segment_embedding = nn.Embedding(3, width)
        self.pos_encoding = PositionTable(config.positions, width)
        self.encoder = FastformerEncoder(config.encoder)
        self.output_norm = layer_norm(width, OUTPUT_NORM_EPS)
        self.unembedding = nn.Linear(width, vocabulary.actions)

    def forward(
        self,
        user_id: Tensor,
        history_item_ids: Tensor,
        candidate_item_ids: Tensor,
        gender: Tensor,
        age: Tensor,
        candidate_categories: Tensor,
    ) -> Tensor:
        """Ids [B], [B, S], [B, C], features [B], [B], [B, C] to logits [B, C, A]; the score is the click's, the first."""
        segment_3D = self.segment_embedding.weight
        user_BD = self.user_embedding(user_id) + self.gender_embedding(gender) + self.age_embedding(age) + segment_3D[0]
        history_BSD = self.pos_encoding(self.item_embedding(history_item_ids)) + segment_3D[1]
        candidate_BCD = self.item_embedding(candidate_item_ids) + self.category_embedding(candidate_categories)
        candidate_BCD = self.pos_encoding(candidate_BCD) + segment_3D[2]
        x_BTD = torch.cat([user_BD[:, None], history_BSD, candidate_BCD], dim=1)
        candidates = candidate_BCD.shape[1]
        # The user and every candidate are always real.
        real_BT = functional.pad(functional.pad(history_item_ids != 0, (1, 0), value=True), (0, candidates), value=True)
        return self.unembedding(self.output_norm(self.encoder.joint(x_BTD, real_BT)[:, -candidates:]))


class OriginalUserTower(nn.Module):
    """History to a user vector; in a row that is all padding, position 0 counts as real."""

    def __init__(self, config: OriginalConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        width = config.encoder.width // 2
        self.user_embedding = nn.Embedding(vocabulary.users, width)
        self.gender_embedding = nn.Embedding(vocabulary.genders, width)
        self.age_embedding = nn.Embedding(vocabulary.ages, width)
        self.item_embedding = nn.Embedding(vocabulary.items, width)
        self.action_projection = nn.Linear(vocabulary.actions, width)
        self.action_norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.pos_encoding = PositionTable(config.positions, config.encoder.width)
        self.encoder = FastformerEncoder(config.encoder)
        self.output_projection = nn.Linear(config.encoder.width, width)

    def forward(
        self, user_ids: Tensor, history_item_ids: Tensor, history_actions: Tensor, user_gender: Tensor, user_age: Tensor
    ) -> Tensor:
        """User vectors [B, D] of unit length."""
        action_BSD = self.action_norm(self.action_projection(history_actions.float())).clamp(-10.0, 10.0)
        x_BSD = torch.cat([self.item_embedding(history_item_ids), action_BSD], dim=-1)
        real_BS = history_item_ids != 0
        first_BS = torch.arange(real_BS.shape[1], device=real_BS.device) == 0
        real_BS = real_BS | (first_BS & ~real_BS.any(1, keepdim=True))
        y_BSD = self.encoder.joint(self.pos_encoding(x_BSD), real_BS)
        mean_BD = torch.where(real_BS[..., None], y_BSD, 0.0).sum(1) / real_BS.float().sum(1, keepdim=True)
        user_BD = self.user_embedding(user_ids) + self.gender_embedding(user_gender)
        return l2_normalize(user_BD + self.age_embedding(user_age) + self.output_projection(mean_BD))


class OriginalItemTower(nn.Module):
    """Item and category embeddings, plus a ReLU network of their sum, L2-normalised. The item table is its own."""

    def __init__(self, vocabulary: Vocabulary, width: int, hidden: int) -> None:
        super().__init__()
        self.item_embedding = nn.Embedding(vocabulary.items, width)
        self.category_embedding = nn.Embedding(vocabulary.categories, width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, item: Tensor, category: Tensor) -> Tensor:
        """Integer arrays of one shape [...] to vectors [..., D] of unit length."""
        x = self.item_embedding(item) + self.category_embedding(category)
        return l2_normalize(x + self.down(self.up(x).relu()))


class TwoTowerOutputs(NamedTuple):
    """user_repr [B, D], candidate_repr [B, C, D], scores [B, C], logits [B, C, A]."""

    user_repr: Tensor
    candidate_repr: Tensor
    scores: Tensor
    logits: Tensor


class OriginalTwoTower(nn.Module):
    """Retrieval: cosine of the towers over the temperature, and four logits from their elementwise product."""

    def __init__(self, config: OriginalConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        width = config.encoder.width // 2
        self.temperature = config.temperature
        self.user_tower = OriginalUserTower(config, vocabulary)
        self.item_tower = OriginalItemTower(vocabulary, width, config.item_hidden)
        self.output_norm = layer_norm(width, OUTPUT_NORM_EPS)
        self.unembedding = nn.Linear(width, vocabulary.actions)

    def forward(
        self,
        user_ids: Tensor,
        history_item_ids: Tensor,
        history_actions: Tensor,
        candidate_item_ids: Tensor,
        user_gender: Tensor,
        user_age: Tensor,
        candidate_categories: Tensor,
    ) -> TwoTowerOutputs:
        """Ids [B], [B, S], actions [B, S, A], candidates [B, C], features [B], [B], [B, C]; 0 is padding or unknown."""
        user_BD = self.user_tower(user_ids, history_item_ids, history_actions, user_gender, user_age)
        candidate_BCD = self.item_tower(candidate_item_ids, candidate_categories)
        product_BCD = user_BD[:, None] * candidate_BCD
        scores_BC = product_BCD.sum(-1) / self.temperature
        logits_BCA = self.unembedding(self.output_norm(product_BCD))
        logits_BCA = torch.cat([logits_BCA[..., :1] + scores_BC[..., None], logits_BCA[..., 1:]], dim=-1)
        return TwoTowerOutputs(user_BD, candidate_BCD, scores_BC, logits_BCA.clamp(-100.0, 100.0))
