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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/experiments/notebooks/03_your_own_log.ipynb)
#
# # 3. Your own log
#
# Whatever your product is, its log has lines of the form *somebody was shown something, and did or did not act*. That is all this project
# needs: a column for users and one for items, ids as integers or as text, under whatever names; better still with what was shown and *not*
# acted on, since without it there is no probability of a click to learn.
#
# The log here is that of a magazine: readers with text ids, stories, a section, a time, and what a reader did. It is written in the next
# cells, from a synthetic source, so that there is something to find. To use yours, set `LOG` to its path and `COLUMNS` to its names.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROWS = int(os.environ.get("TENREC_NOTEBOOK_ROWS", "40000"))  # of the synthetic log
WORKDIR = Path("runs") / f"magazine_{ROWS}"  # holds all that the run makes
REPOSITORY = "OWNER/REPO"  # where Colab installs from

if importlib.util.find_spec("tenrec_jax") is None:
    package = f"tenrec_jax[scann,torch,plot] @ git+https://github.com/{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %%
import dataclasses
import json

import matplotlib.pyplot as plt
import pyarrow.compute as pc
from pyarrow import Table, array, csv

from tenrec_jax.config import default_config, from_mapping, to_config_dict
from tenrec_jax.data.ingest import IngestOptions, ingest
from tenrec_jax.data.synthetic import write_twin
from tenrec_jax.errors import UserError
from tenrec_jax.evaluation.report import results_table
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.recommender import Recommender

# %% [markdown]
# ## The file

# %%
LOG, source = WORKDIR / "magazine.csv", WORKDIR / "source.csv"
write_twin(source, kind="qb_video", rows=ROWS, seed=0, progress=False)
twin = csv.read_csv(source)


def text_ids(column: str, word: str) -> array:
    return pc.binary_join_element_wise(word, pc.utf8_lpad(twin[column].cast("string"), 6, "0"), "-")


def empty_where_unknown(column: str) -> array:
    return pc.if_else(pc.equal(twin[column], 0), None, pc.subtract(twin[column], 1))


magazine = {
    "reader": text_ids("user_id", "reader"),
    "story": text_ids("item_id", "story"),
    "section": pc.if_else(pc.equal(twin["video_category"].cast("string"), "1"), "culture", "science"),
    "minute": pc.add(29_000_000, array(range(ROWS))),
    "gender": empty_where_unknown("gender"),
    "age_group": empty_where_unknown("age"),
    **{
        name: twin[column]
        for name, column in {"opened": "click", "starred": "like", "sent": "share", "followed": "follow"}.items()
    },
}
csv.write_csv(Table.from_pydict(magazine), LOG)
print("".join(LOG.read_text(encoding="utf-8").splitlines(keepends=True)[:6]))

# %% [markdown]
# ## Which column stands for what
#
# `user` and `item` are needed; `click`, `like`, `share`, `follow`, `gender`, `age`, `category` and `time` may follow. Columns that are
# not named are not read; an empty gender, age or category is an unknown one. With a time, each user's rows are sorted by it; without one
# they keep the order of the file.

# %%
COLUMNS = {
    "user": "reader",
    "item": "story",
    "category": "section",
    "time": "minute",
    "gender": "gender",
    "age": "age_group",
    "click": "opened",
    "like": "starred",
    "share": "sent",
    "follow": "followed",
}

# %% [markdown]
# A name that the file does not have is told at once, not after an hour:

# %%
try:
    ingest([LOG], "custom", WORKDIR / "wrong", IngestOptions(COLUMNS | {"item": "storey"}), progress=False)
except UserError as error:
    print(error)
else:
    raise AssertionError("there is no column storey")

# %% [markdown]
# ## The run
#
# The same small settings as in notebook 1; only the log is another one. Without `true probabilities` this time: nobody knows yours.

# %%
settings = to_config_dict(default_config())
settings.name, settings.data.path, settings.evaluation.resamples = "notebook", str(LOG), 200
for stage in (settings.retrieval, settings.ranking):
    stage.events_per_batch, stage.train.epochs = 1024, 3
    stage.train.optimizer.update(learning_rate=2e-3, table_learning_rate=2e-4)
    stage.model.encoder.update(num_layers=1, width=32, hidden=64)
    stage.model.features.update(max_length=64, item_start="spectral")
settings.retrieval.model.item_bias, settings.ranking.pairwise_weight = True, 1.0
settings.data.kind, settings.data.columns = "custom", json.dumps(COLUMNS)
pipeline = Pipeline(from_mapping(settings.to_dict()), WORKDIR / "run")
results = pipeline.run()
print(results_table(results))
assert results["ranking"]["click"]["auc"]["low"] > 0.5, "the ranker tells opened stories from others"
assert not results["is_synthetic"], "to the run, a log that is named is a log like any other"

# %% [markdown]
# ## Recommendations, in your ids
#
# Text ids go in and come out. Actions keep the names of the mapping's keys: `click` is what the magazine calls *opened*.

# %%
recommender = Recommender.load(pipeline.recommender)
reader = pipeline.example_user()
assert str(reader).startswith("reader-")
answer = recommender.recommend(user_id=reader, k=8)
for rank, item in enumerate(answer.items, 1):
    section = recommender.categories[item.category - 1] if item.category else "-"
    print(
        f"{rank:>2}  {item.item_id}  {section:<8}  P(click) {item.probabilities['click']:.3f}  score {item.score:.3f}"
    )

somebody_new = recommender.recommend(history=[item.item_id for item in answer.items[:2]] + ["story-999999"], k=3)
print("after two of these:", [item.item_id for item in somebody_new.items], "; unknown:", somebody_new.unknown_items)
assert somebody_new.unknown_items == ("story-999999",)

# %% [markdown]
# What is an item's worth made of? Each action has a value (a click 1, a like 2, a share 4, a follow 3, unless a rule says otherwise), and
# the worth is the sum of probability times value. Change the values, and the order follows, without any training.
# `retrieval_weight=0` orders by this worth alone, without retrieval's probability that the item comes next.

# %%
by_worth = dataclasses.replace(recommender.rules, retrieval_weight=0.0)
worthy = recommender.recommend(user_id=reader, k=8, rules=by_worth).items
values = dict(zip(recommender.actions, recommender.rules.action_values.of(recommender.actions), strict=True))
figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
left = [0.0] * len(worthy)
for action, value in values.items():
    parts = [value * item.probabilities[action] for item in worthy]
    axis.barh([str(item.item_id) for item in worthy], parts, left=left, label=f"{action} x {value:g}")
    left = [sum(pair) for pair in zip(left, parts, strict=True)]
axis.invert_yaxis()
axis.set(xlabel="expected worth", title=f"for {reader}")
figure.legend(loc="outside right upper")
plt.show()
assert all(abs(total - item.score) < 1e-4 for total, item in zip(left, worthy, strict=True))

# %% [markdown]
# ## What to do next
#
# - Point `LOG` and `COLUMNS` at your own file. Parquet is read as well, gzip and zstd too; `data/README.md` says what is checked.
# - Run `tenrec-jax stats` on the table first, as in notebook 2: does one of your columns know the answer?
# - A log of clicks alone, without what was shown in vain, trains retrieval only: `experiments/configs/sequences.py`.
# - More rows deserve a larger model: begin from `experiments/configs/quickstart.py`.
