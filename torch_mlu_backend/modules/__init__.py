"""The models of tenrec_jax, module for module and with the same attribute names: tensors in, tensors out, static shapes.

Nothing here branches on data, and every operator is one that torch_mlu has a kernel of its own for.
"""

from torch_mlu_backend.modules.fastformer import AdditiveAttention, FastformerEncoder, PaperAttention
from torch_mlu_backend.modules.original import OriginalRanker, OriginalTwoTower
from torch_mlu_backend.modules.ranker import Ranker
from torch_mlu_backend.modules.records import Events, Profile, Timeline
from torch_mlu_backend.modules.softmax_attention import SoftmaxEncoder
from torch_mlu_backend.modules.two_tower import TwoTower

__all__ = [
    "AdditiveAttention",
    "Events",
    "FastformerEncoder",
    "OriginalRanker",
    "OriginalTwoTower",
    "PaperAttention",
    "Profile",
    "Ranker",
    "SoftmaxEncoder",
    "Timeline",
    "TwoTower",
]
