# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/experiments/notebooks/01_quick_start.ipynb)
#
# # 1. Quick start: from a log to recommendations
#
# A recommender has to choose a handful of items out of a whole catalogue, for somebody it knows by a short history alone. `tenrec_jax` does
# it in two stages: a **two-tower** model retrieves a few hundred candidates that fit, and a **Fastformer** orders them by the probability
# that this user clicks, likes, shares or follows. This notebook trains both on a synthetic log and asks them for recommendations. It takes
# one to two minutes on two CPU cores.
#
# The log is a *twin* of Tenrec's QB-video: the same format and the same habits (a few items that everybody sees, users who click at
# everything and users who never do), drawn from a model whose true probabilities are known. So we will also see how much there was to find.
#
# `OWNER/REPO` in the badge stands for the place of your copy on GitHub; `make notebooks REPOSITORY=you/yours` fills it in. Without one,
# open this file in Jupyter beside an installed `tenrec_jax`.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROWS = int(os.environ.get("TENREC_NOTEBOOK_ROWS", "40000"))  # of the synthetic log
WORKDIR = Path("runs") / f"notebook_{ROWS}"  # holds all that the run makes
REPOSITORY = "OWNER/REPO"  # where Colab installs from

if importlib.util.find_spec("tenrec_jax") is None:
    package = f"tenrec_jax[scann,torch,plot] @ git+https://github.com/{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %%
import dataclasses
import logging

import matplotlib.pyplot as plt

from tenrec_jax.config import default_config, from_mapping, to_config_dict
from tenrec_jax.evaluation.report import results_table
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.recommender import Recommender
from tenrec_jax.requests import Recommendations

logging.basicConfig(format="%(message)s")
logging.getLogger("tenrec_jax").setLevel(logging.INFO)  # tells the stages as they begin

# %% [markdown]
# ## A configuration
#
# Every setting is a field of a dataclass in `tenrec_jax/config.py`, where its meaning is written. `default_config()` is a sound start; as a
# `ConfigDict` it is easy to change, and `from_mapping` checks what came out: a misspelt name or a value out of range is an error that says
# which, not a surprise an hour later.
#
# We make the models small, so that they train in seconds, and start the items' embeddings from a spectral decomposition of who was shown
# what: so small a log is too small to learn that from its clicks.

# %%
settings = to_config_dict(default_config())
settings.name, settings.data.twin_rows, settings.evaluation.resamples = "notebook", ROWS, 200
for stage in (settings.retrieval, settings.ranking):
    stage.events_per_batch, stage.train.epochs = 1024, 3
    stage.train.optimizer.update(learning_rate=2e-3, table_learning_rate=2e-4)
    stage.model.encoder.update(num_layers=1, width=32, hidden=64)
    stage.model.features.update(max_length=64, item_start="spectral")
settings.retrieval.model.item_bias, settings.ranking.pairwise_weight = True, 1.0
config = from_mapping(settings.to_dict())

# %% [markdown]
# ## The run
#
# A run is a configuration and a folder. It makes the log, ingests it, splits every user's events in their order (the last tenth is the
# test), trains both stages, builds the search index, evaluates, and writes a recommender. Interrupt it and run the cell again: it goes on
# where it was. Run it after it has finished, and it only reads the results.

# %%
pipeline = Pipeline(config, WORKDIR)
results = pipeline.run()

# %% [markdown]
# ## What came out
#
# Every number comes with a 95 % interval, from a bootstrap over users, and beside what needs no model at all. *Retrieval* is asked where it
# places the items that a user clicks next, in the whole catalogue: `recall@10` is the share of them among the first ten. *Ranking* is asked
# to tell clicked exposures from others: an AUC of .5 is a coin, and `true probabilities` is the best that anybody could do on this log.

# %%
print(results_table(results))
click_auc = results["ranking"]["click"]["auc"]
assert click_auc["low"] > 0.5, "the ranker tells clicks from other exposures"
assert click_auc["value"] <= results["oracle"]["ranking"]["click"]["auc"]["high"]

# %%
baselines = results["baselines"]
estimates = {
    "retrieval: recall@10": {
        "two-tower": results["retrieval"]["recall@10"],
        "popularity": baselines["popularity"]["retrieval"]["recall@10"],
        "recency": baselines["recency"]["retrieval"]["recall@10"],
    },
    "ranking: AUC of clicks": {
        "ranker": results["ranking"]["click"]["auc"],
        "popularity": baselines["popularity"]["ranking"]["click"]["auc"],
        "item rate": baselines["item_rate"]["ranking"]["click"]["auc"],
        "user rate": baselines["user_rate"]["ranking"]["click"]["auc"],
        "item x user rate": baselines["item_user_rate"]["ranking"]["click"]["auc"],
    },
}
figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), layout="constrained")
for axis, (title, scorers) in zip(axes, estimates.items(), strict=True):
    for line, estimate in enumerate(scorers.values()):
        colour = "tab:blue" if line == 0 else "tab:gray"
        axis.plot([estimate["low"], estimate["high"]], [line, line], color=colour, linewidth=3, alpha=0.5)
        axis.plot(estimate["value"], line, "o", color=colour)
    axis.set(title=title, yticks=range(len(scorers)), yticklabels=scorers, ylim=(len(scorers) - 0.5, -0.5))
plt.show()

# %% [markdown]
# Read the picture by its intervals: where two of them overlap by much, the log is too small to say which is better. On a log of this size
# popularity is hard to beat in retrieval, since a few items take most of the clicks and an item of the long tail has been seen a handful
# of times; and the ranker has learned little beyond how often an item is clicked and a user clicks, which is why the product of these two
# rates stands level with it. More rows move both: `make demo` trains on 150,000, and its measured results stand in the README.
#
# ## Recommendations
#
# The folder `recommender/` is all that serving needs: weights, index, histories, id maps and rules, sealed by hashes. It answers for a
# user of the log, from the history that it knows ...


# %%
def show(answer: Recommendations) -> None:
    print(f"{answer.history_length} events read, {answer.milliseconds['total']:.0f} ms")
    for rank, item in enumerate(answer.items, 1):
        actions = "  ".join(f"P({name}) {value:.3f}" for name, value in item.probabilities.items())
        print(f"{rank:>3}  item {item.item_id:>6}  score {item.score:.3f}  {actions}")


recommender = Recommender.load(pipeline.recommender)
show(recommender.recommend(user_id=pipeline.example_user(), k=5))

# %% [markdown]
# ... and for somebody it has never met, from a history alone: here, three clicks. (The first answer of a kind compiles; the next ones take
# milliseconds.)

# %%
clicked = [item.item_id for item in recommender.recommend(user_id=pipeline.example_user(), k=3).items]
newcomer = recommender.recommend(history=clicked, k=5)
assert not {item.item_id for item in newcomer.items} & set(clicked), "what was clicked is not recommended again"
show(newcomer)

# %% [markdown]
# ## Rules
#
# A list is ordered by the worth that the ranker expects (probability times value, summed over the actions) times the probability that
# retrieval gives the item of coming next, to the power of `retrieval_weight`; 0 leaves the worth alone.
#
# What a product wants beside probable clicks is said by rules, which come after the models: what an action is worth, what is blocked, how
# many items of a category may stand in a list, how much diversity counts. `explain=True` tells what was read of the user and what
# retrieval had found; `effects` tells what each rule did.

# %%
rules = dataclasses.replace(recommender.rules, diversity=0.3, max_per_category=4)
plain = recommender.recommend(user_id=pipeline.example_user(), k=8)
ruled = recommender.recommend(user_id=pipeline.example_user(), k=8, rules=rules, explain=True)
for name, answer in {"without further rules": plain, "with them": ruled}.items():
    print(f"{name}: " + "  ".join(f"{item.item_id} (category {item.category})" for item in answer.items))
for effect in ruled.effects:
    print(f"rule {effect.rule}: removed {len(effect.removed)} items, moved {len(effect.moved)}")
print(
    "read last:", *(f"{event.item_id} ({', '.join(event.actions) or 'shown'})" for event in (ruled.history or ())[-5:])
)
print("the first of retrieval:", *(found.item_id for found in (ruled.retrieved or ())[:5]))
categories = [item.category for item in ruled.items if item.category]
assert all(categories.count(category) <= 4 for category in categories)

# %% [markdown]
# ## Two stages, two opinions
#
# With `retrieval_weight=0` the order of the candidates is the ranker's own, and can be held against retrieval's.
# Retrieval orders the catalogue by an inner product, fast enough for millions of items; the ranker looks at each candidate with the user's
# whole timeline. A point is a candidate of the example user. Were both of one mind, all would lie on the diagonal.

# %%
by_worth = dataclasses.replace(recommender.rules, retrieval_weight=0.0)
candidates = recommender.recommend(user_id=pipeline.example_user(), k=config.serving.candidates, rules=by_worth).items
by_retrieval = sorted(candidates, key=lambda item: -item.retrieval_score)
place = {item.item_id: number for number, item in enumerate(by_retrieval, 1)}
figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
points = axis.scatter(
    [place[item.item_id] for item in candidates],
    range(1, len(candidates) + 1),
    c=[item.probabilities["click"] for item in candidates],
    s=14,
)
axis.set(xlabel="place by retrieval", ylabel="place by the ranker", title="candidates of one user")
figure.colorbar(points, label="P(click)")
plt.show()

# %% [markdown]
# ## What to do next
#
# - Change a setting and run again, in another `WORKDIR`: `settings.ranking.model.encoder.num_layers = 2`, or twice the rows. Then
#   `tenrec-jax compare RUN_A RUN_B` says which differences are real.
# - Open `report.html` in the run's folder: all metrics, curves and groups on one page.
# - From a shell, the same is `python experiments/launch.py`; for several GPUs, processes or hosts, see `experiments/README.md`.
# - Notebook 2 reads a file in Tenrec's format, notebook 3 a log of your own, notebook 4 serves this recommender with PyTorch alone, and
#   notebook 5 looks inside the Fastformer.
