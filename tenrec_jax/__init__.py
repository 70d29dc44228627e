"""tenrec_jax: a two-stage recommender for the Tenrec benchmark in JAX/Flax.

Arrays whose shape matters carry it as a suffix, one letter a dimension:

    B batch        S history      T timeline     C candidates   D model width   H heads
    E head width   A actions      N catalogue    K top-k        U users         R rows of a log
"""

__version__ = "0.1.0"
