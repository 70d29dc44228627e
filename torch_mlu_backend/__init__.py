"""torch_mlu_backend: the recommender of tenrec_jax in PyTorch alone, for Cambricon MLU, CUDA and CPU.

It imports neither JAX nor tenrec_jax. Arrays whose shape matters carry it as a suffix, one letter a dimension:

    B batch        S history      T timeline     C candidates   D model width   H heads
    E head width   A actions      N catalogue    K top-k        U users         L layers
"""

__version__ = "0.1.0"
