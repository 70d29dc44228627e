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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/REPO/blob/main/experiments/notebooks/04_from_jax_to_pytorch_and_mlu.ipynb)
#
# # 4. From JAX to PyTorch: MLU, CUDA, CPU
#
# A recommender is trained in JAX; it need not be served there. `torch_mlu_backend` mirrors both models module for module and needs nothing
# but PyTorch, so that it runs wherever PyTorch does: on Cambricon MLUs through `torch_mlu`, on GPUs, on a CPU. This notebook exports a
# trained recommender, verifies the copy layer by layer, and puts the answers of both side by side.
#
# What was not at hand: an MLU. Everything here ran on CPUs, and the path to an MLU is tested by a simulated device, which shows *where*
# operators run and not how fast or how exactly. On your MLU, `verify` below is the first thing to run: it decides by numbers that travel
# with the export.

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
import shutil

import matplotlib.pyplot as plt
import numpy as np

from tenrec_jax.config import default_config, from_mapping, to_config_dict
from tenrec_jax.interop.export import export
from tenrec_jax.pipeline import Pipeline
from tenrec_jax.recommender import Recommender
from torch_mlu_backend import device as devices
from torch_mlu_backend.__main__ import main as torch_mlu_backend
from torch_mlu_backend.recommender import Recommender as TorchRecommender
from torch_mlu_backend.verify import report, verify

# %% [markdown]
# The run is that of notebook 1, with the same settings: where it lies in `WORKDIR`, it is read, and elsewhere it is made, in a minute.

# %%
settings = to_config_dict(default_config())
settings.name, settings.data.twin_rows, settings.evaluation.resamples = "notebook", ROWS, 200
for stage in (settings.retrieval, settings.ranking):
    stage.events_per_batch, stage.train.epochs = 1024, 3
    stage.train.optimizer.update(learning_rate=2e-3, table_learning_rate=2e-4)
    stage.model.encoder.update(num_layers=1, width=32, hidden=64)
    stage.model.features.update(max_length=64, item_start="spectral")
settings.retrieval.model.item_bias, settings.ranking.pairwise_weight = True, 1.0
pipeline = Pipeline(from_mapping(settings.to_dict()), WORKDIR)
results = pipeline.run()

# %% [markdown]
# ## Export
#
# The folder holds all that serving needs, as plain JSON and safetensors: weights under PyTorch's names, the catalogue, histories, id maps,
# and a *probe*, inputs together with what JAX makes of them after every layer. In a shell:
# `tenrec-jax export --recommender runs/notebook_40000/recommender --out exported`.

# %%
exported = WORKDIR / "exported"
shutil.rmtree(exported, ignore_errors=True)  # of an earlier reading: an export is never written over another
version = export(pipeline.recommender, exported).version
print(f"version {version}")
for path in sorted(exported.iterdir()):
    print(f"{path.stat().st_size:>10,} bytes  {path.name}")

# %% [markdown]
# ## Which device
#
# `auto` takes an MLU where `torch_mlu` can be imported and sees one, else a GPU, else the CPU, and says why it passed the others over. A
# name such as `mlu`, `cuda:1` or `cpu` is taken at its word: where that device is not to be had, it is an error that says what to install.
# `torch_mlu` is imported only when an MLU is asked for.

# %%
resolved = devices.resolve("auto")
print(f"auto is {resolved.device} here")
for note in resolved.notes:
    print(f"passed over {note}")
for kind, facts in devices.TYPES.items():
    print(f"{kind}: outputs may differ from JAX on a CPU by {facts.tolerance:g}")

# %% [markdown]
# ## Verify
#
# Does this device compute what the exporting machine did? The probe is run layer by layer and stage by stage. The tolerance is that of the
# type of device: 1e-5 on a CPU, 1e-4 on a GPU, and 3e-3 on an MLU, which is what Cambricon's own tests of `torch_mlu` allow.

# %%
verdict = verify(exported, resolved.device)
print("\n".join(report(verdict)))
assert verdict.passed

# %%
figure, axis = plt.subplots(figsize=(9, 0.32 * len(verdict.differences) + 1), layout="constrained")
axis.barh([found.name for found in verdict.differences], [max(found.absolute, 1e-9) for found in verdict.differences])
axis.axvline(verdict.tolerance, color="tab:red", label=f"tolerance on {verdict.device}")
axis.set(xscale="log", xlim=(1e-9, 10 * verdict.tolerance), title="largest difference to JAX, layer by layer")
axis.invert_yaxis()
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# ## Recommend with PyTorch alone
#
# This is the command `python -m torch_mlu_backend recommend EXPORTED --user 1 --k 5 --device auto`. It imports neither JAX nor
# `tenrec_jax`.

# %%
user = pipeline.example_user()
assert torch_mlu_backend(["recommend", str(exported), "--user", str(user), "--k", "5", "--device", "auto"]) == 0

# %% [markdown]
# ## Side by side
#
# The same items, scored for the same user by both. (Lists may differ in one thing: JAX searches candidates through the index, which may be
# ScaNN's approximate one, while PyTorch compares the query with every item. So we compare scores of given items.)

# %%
in_jax, in_torch = Recommender.load(pipeline.recommender), TorchRecommender.load(exported, str(resolved.device))
listed = [item.item_id for item in in_torch.recommend(user_id=user, k=100).items]
pairs = list(zip(in_jax.score(listed, user_id=user), in_torch.score(listed, user_id=user), strict=True))
for ours, theirs in pairs[:5]:
    print(f"item {ours.item_id:>6}  worth {ours.score:.7f} in JAX, {theirs.score:.7f} in PyTorch")

jax_IA, torch_IA = (
    np.asarray([list(item.probabilities.values()) for item in side]) for side in zip(*pairs, strict=True)
)
difference_A = np.abs(jax_IA - torch_IA).max(0)
for action, difference in zip(in_jax.actions, difference_A, strict=True):
    print(f"P({action}): largest difference {difference:.1e} over {len(pairs)} items")
assert difference_A.max() <= verdict.tolerance
retrieval = np.asarray([[ours.retrieval_score, theirs.retrieval_score] for ours, theirs in pairs])
assert np.abs(np.diff(retrieval)).max() <= verdict.tolerance * max(1.0, np.abs(retrieval).max())

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for column, action in enumerate(in_jax.actions):
    axes[0].loglog(jax_IA[:, column], torch_IA[:, column], ".", label=action)
    axes[1].semilogy(np.maximum(np.abs(torch_IA - jax_IA)[:, column], 1e-12), ".", label=action)
axes[0].axline((1e-2, 1e-2), (1e-1, 1e-1), color="tab:gray", linewidth=0.8)
axes[0].set(xlabel="probability in JAX", ylabel="probability in PyTorch", title="the same items, both ways")
axes[0].legend()
axes[1].axhline(verdict.tolerance, color="tab:red", linewidth=1)
axes[1].set(xlabel="item", title="differences; the line is the tolerance, 1e-12 stands for none")
plt.show()

# %% [markdown]
# ## What to do next
#
# - Copy `exported/` and the package `torch_mlu_backend` to the machine that serves, and run there first
#   `python -m torch_mlu_backend verify exported --device mlu`, then `bench`. `torch_mlu_backend/README.md` says what an MLU needs, and what
#   is known and not known of it.
# - `--autocast bfloat16` computes products in a shorter type; the differences are then stated, not promised.
# - Weights that were trained further in PyTorch come back: `tenrec-jax import --exported exported --out recommender2`.
# - Notebook 5 looks inside the Fastformer whose layers you have just seen agree.
