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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/experiments/notebooks/02_tenrec_from_csv_to_report.ipynb)
#
# # 2. Tenrec, from CSV to report
#
# Tenrec is a log of two content platforms: who was shown what, and what they did. Its files are licensed (CC BY-NC 4.0) and are not part of
# this project. So this notebook begins with a *twin*, a synthetic file of exactly the same format; where the licensed file lies, it is
# taken instead, and every cell below is the same.
#
# To use the licensed file: accept the terms at the Tenrec project's page, put `QB-video.csv` into `data/tenrec/` beside this notebook, and
# run the cells again. It has millions of rows and wants hours, not minutes: then rather take the full-sized
# `python experiments/launch.py --config=experiments/configs/tenrec.py:qb_video`.

# %%
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROWS = int(os.environ.get("TENREC_NOTEBOOK_ROWS", "40000"))  # of the synthetic log
WORKDIR = Path("runs") / f"tenrec_{ROWS}"  # holds all that the run makes
REPOSITORY = "OWNER/REPO"  # where Colab installs from

if importlib.util.find_spec("tenrec_jax") is None:
    package = f"tenrec_jax[scann,torch,plot] @ git+https://github.com/{REPOSITORY}"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %%
import json
import shlex
from html import escape

import matplotlib.pyplot as plt
from IPython.display import display

from tenrec_jax.__main__ import main
from tenrec_jax.config import default_config, from_mapping, to_config_dict
from tenrec_jax.evaluation.report import results_table, verdict
from tenrec_jax.pipeline import Pipeline


def tenrec_jax(command: str) -> None:
    """Do what `tenrec-jax COMMAND` does in a shell."""
    print(f"$ tenrec-jax {command}")
    assert main(shlex.split(command)) == 0, "the command says above what is wrong"


def show_page(path: Path) -> None:
    """Show a page that needs nothing beside itself in a frame of its own."""
    text = escape(path.read_text(encoding="utf-8"))
    frame = f'<iframe srcdoc="{text}" width="100%" height="600" style="border:1px solid #ccc"></iframe>'
    display({"text/html": frame, "text/plain": str(path)}, raw=True)


# %% [markdown]
# ## The log
#
# `synth` also writes the true probability of every action, which no real log has: with it the twin can be judged, and so can models.

# %%
licensed, twin, table = Path("data/tenrec/QB-video.csv"), WORKDIR / "twin.csv", WORKDIR / "ingested"
LOG = licensed if licensed.exists() else twin
if not licensed.exists():
    tenrec_jax(f"synth --kind qb_video --rows {ROWS} --seed 0 --out {twin}")
with LOG.open(encoding="utf-8") as file:
    print("".join(next(file) for _ in range(6)))

# %% [markdown]
# ## Ingest
#
# Every value is checked against its column as it is written, and one bad row is enough to refuse the log by file, line and column. What
# comes out is a table of Parquet shards and memory-mapped columns, with a manifest of hashes. Run it again and it finds its own work.

# %%
tenrec_jax(f"ingest {LOG} --kind qb_video --out {table}")
tenrec_jax(f"ingest {LOG} --kind qb_video --out {table}")

# %% [markdown]
# ## What leaks
#
# Before any model: does a column know the answer? `stats` measures what each column by itself says about the click, and flags those that
# are known only after the exposure, whatever they say. `watching_times` is such a one: who watched has clicked. A model that reads it
# would look brilliant in a notebook and be worthless in service. No model of this project reads it.

# %%
truth = f" --truth {twin.with_suffix('.truth.parquet')}" if not licensed.exists() else ""
tenrec_jax(f"stats {table}{truth}")

# %%
columns = json.loads((table / "stats.json").read_text(encoding="utf-8"))["leakage"]["columns"]
columns = sorted((column for column in columns if column["auc"] is not None), key=lambda column: column["auc"])
figure, axis = plt.subplots(figsize=(8, 0.3 * len(columns) + 1), layout="constrained")
axis.barh(
    [column["name"] for column in columns],
    [column["auc"] for column in columns],
    color=["tab:red" if column["flagged"] else "tab:blue" for column in columns],
)
axis.axvline(0.8, color="tab:gray", linestyle="--", label="alarm")
axis.set(xlim=(0.5, 1), xlabel="AUC of the click from this column alone", title="red must not be an input")
axis.legend()
plt.show()
flagged = [column["name"] for column in columns if column["flagged"]]
assert "watching_times" in flagged
assert not {"gender", "age", "video_category"} & set(flagged)

# %% [markdown]
# The whole page, which `stats` wrote beside the table:

# %%
show_page(table / "stats.html")

# %% [markdown]
# ## Run
#
# The same small settings as in notebook 1, with the path of a file instead of a number of rows. Protocol `per_user_order`: the last tenth
# of every user's rows is the test, and nothing of it is seen before the end.

# %%
settings = to_config_dict(default_config())
settings.name, settings.data.path, settings.evaluation.resamples = "notebook", str(LOG), 200
for stage in (settings.retrieval, settings.ranking):
    stage.events_per_batch, stage.train.epochs = 1024, 3
    stage.train.optimizer.update(learning_rate=2e-3, table_learning_rate=2e-4)
    stage.model.encoder.update(num_layers=1, width=32, hidden=64)
    stage.model.features.update(max_length=64, item_start="spectral")
settings.retrieval.model.item_bias, settings.ranking.pairwise_weight = True, 1.0
settings.data.kind = "qb_video"
pipeline = Pipeline(from_mapping(settings.to_dict()), WORKDIR / "run")
results = pipeline.run()
print(results_table(results))

# %% [markdown]
# ## The report
#
# The report begins with one sentence, which is made of the intervals and not of hopes.

# %%
print(verdict(results))
click_auc = results["ranking"]["click"]["auc"]
assert click_auc["low"] > 0.5, "the ranker tells clicks from other exposures"
show_page(pipeline.workdir / "report.html")

# %% [markdown]
# ## What to do next
#
# - Put the licensed file in place and run this again, or take the full-sized config named at the top.
# - `data/README.md` lists Tenrec's other files (`QK-video`, `ctr_data_1M`, the articles) and their `--kind`.
# - `tenrec-jax verify PATH` says whether every byte of a table or run is still as it was written.
# - Notebook 3 does the same with a log of your own.
