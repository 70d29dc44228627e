"""What matters in the recipe of `configs/sequences.py`: one change at a time from it.

Command:   python experiments/launch.py --sweep=experiments/sweeps/sequences.py --config.data.path=Beauty.txt --workdir=runs/ablation
Hardware:  2 CPU cores
Time:      4 hours for Amazon Beauty, 16 runs of 15 minutes
Expected:  not known, never run as a whole
"""

from pathlib import Path

from tenrec_jax.sweep.record import Choices, Sweep

MODEL = "retrieval.model"


def get_sweep() -> Sweep:
    return Sweep(
        base=str(Path(__file__).parents[1] / "configs" / "sequences.py"),
        search="ablation",
        # The first value of each is the recipe's.
        parameters={
            f"{MODEL}.encoder.attention": Choices(("additive", "softmax")),
            f"{MODEL}.encoder.recency_bias": Choices((True, False)),
            f"{MODEL}.encoder.num_layers": Choices((2, 1)),
            f"{MODEL}.encoder.width": Choices((256, 128, 64)),
            f"{MODEL}.encoder.dropout": Choices((0.2, 0.5)),
            f"{MODEL}.features.dropout": Choices((0.5, 0.2)),
            f"{MODEL}.features.positions": Choices(("none", "learned")),
            f"{MODEL}.features.item_start": Choices(("normal", "spectral")),
            f"{MODEL}.similarity": Choices(("cosine", "dot")),
            f"{MODEL}.temperature": Choices((0.07, 0.05, 0.1)),
            "retrieval.negatives": Choices((4096, 512)),
            "retrieval.log_q": Choices((True, False)),
            "retrieval.train.average_decay": Choices((0.99, 0.0)),
        },
        objective="retrieval ndcg@10",
    )
