"""What matters in the recipe of `configs/sequences.py`: one change at a time from it.

Command:   python experiments/launch.py --sweep=experiments/sweeps/sequences.py --config.data.path=Beauty.txt --workdir=runs/ablation
Hardware:  2 CPU cores
Time:      4 hours for Amazon Beauty, 12 runs of 15 to 27 minutes
Expected:  experiments/RESULTS.md has the units' best validation values; only the best unit's test part is read
"""

from pathlib import Path

from tenrec_jax.sweep.record import Choices, Sweep

MODEL = "retrieval.model"


def get_sweep() -> Sweep:
    return Sweep(
        base=str(Path(__file__).parents[1] / "configs" / "sequences.py"),
        search="ablation",
        parameters={
            f"{MODEL}.encoder.attention": Choices(("softmax",)),
            f"{MODEL}.encoder.pool_residual": Choices((False,)),
            f"{MODEL}.encoder.recency_bias": Choices((False,)),
            f"{MODEL}.encoder.num_layers": Choices((2,)),
            f"{MODEL}.encoder.width": Choices((128,)),
            f"{MODEL}.features.dropout": Choices((0.3,)),
            f"{MODEL}.similarity": Choices(("dot",)),
            f"{MODEL}.temperature": Choices((0.07,)),
            "retrieval.loss": Choices(("sampled_softmax",)),
            "retrieval.label_smoothing": Choices((0.0,)),
            "retrieval.train.average_decay": Choices((0.0,)),
        },
        objective="retrieval ndcg@10",
    )
