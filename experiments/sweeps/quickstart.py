"""Six retrieval models on a tiny synthetic twin: how fast tables learn, and the width.

Command:   python experiments/launch.py --sweep=experiments/sweeps/quickstart.py --parallel_units=2
Hardware:  2 CPU cores, 4 GiB of memory
Time:      4 minutes
Expected:  NDCG@10 of validation from about .116 to .139, rates of .02 first; few of six differ really, on 258 users
"""

from pathlib import Path

from tenrec_jax.sweep.record import Choices, Sweep


def get_sweep() -> Sweep:
    return Sweep(
        base=str(Path(__file__).parents[1] / "configs" / "quickstart.py"),
        parameters={
            "retrieval.train.optimizer.table_learning_rate": Choices((2e-4, 2e-3, 2e-2)),
            "retrieval.model.encoder.width": Choices((32, 64)),
        },
        objective="retrieval ndcg@10",
        # The objective is retrieval's, so no ranker is trained.
        settings={"data.twin_rows": 20_000, "ranking.enabled": False},
    )
