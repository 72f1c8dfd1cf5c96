# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of the results
#
# Everything here is read from `results/tables/<study>`, which `snakemake --cores N` or `make reproduce` writes. Nothing is
# computed again. Start Jupyter in the project's folder, or set `COSPADI_RESULTS` to the path of `results/`.

# %%
import os
from pathlib import Path

import pandas as pd
from IPython.display import HTML, Image, Markdown, display

from cospadi.tables.cells import read_summary

STUDY = os.environ.get("COSPADI_STUDY", "default")
RESULTS = Path(os.environ.get("COSPADI_RESULTS", "results" if Path("results").is_dir() else "../results"))
tables = RESULTS / "tables" / STUDY
if not (tables / "summary.csv").is_file():
    raise SystemExit(f"There is no {tables}/summary.csv. Run: snakemake --cores 4 --config study={STUDY}")
summary = read_summary(tables / "summary.csv")
models = list(summary["model"].unique())

# %% [markdown]
# ## The tables, as in a paper
#
# Every method at the same stored bits. The best of each ratio is bold. The notes say how each number was measured.

# %%
for model in models:
    display(HTML((tables / f"{model}.html").read_text(encoding="utf-8")))

# %% [markdown]
# ## In short: one number per method and ratio

# %%
for model in models:
    display(Markdown((tables / f"{model}_overview.md").read_text(encoding="utf-8")))

# %% [markdown]
# ## Quality against megabytes
#
# Bytes are counted from the tensors on disk, masks and indices included. Lower right is better. In colour: the method of the paper, and
# the nearest to the dense model of every family of methods.

# %%
display(Image(tables / "pareto.png"))

# %% [markdown]
# ## Perplexity against the ratio, with standard errors

# %%
display(Image(tables / "perplexity.png"))

# %% [markdown]
# ## Which differences are real?
#
# Two models read the same documents. A document that is hard is hard for both, and this cancels in the difference. These documents
# cannot settle a difference of less than two standard errors.

# %%
paired = pd.read_csv(tables / "paired.csv")
paired["standard errors"] = paired["difference"] / paired["stderr"]
against = paired[paired["against"] != "dense"]
display(against[against["measure"].isin(["average_accuracy", "nll"])].round(4))

# %% [markdown]
# ## Where in the model the error arises
#
# Relative error of every projection's outputs on the calibration text, one projection at a time, at the middle one of the ratios
# that most methods have. Darker is better.

# %%
display(Image(tables / "output_error.png"))

# %% [markdown]
# ## The other way round: how small can it be?
#
# The smallest model of each method that loses at most a given amount of perplexity.

# %%
ALLOWED = 1.25  # times the dense model's
compressed = summary[summary["method"] != "dense"]
base = summary[summary["method"] == "dense"].set_index("model")["token_perplexity"]
good = compressed[compressed["token_perplexity"] <= ALLOWED * compressed["model"].map(base)]
smallest = good.loc[good.groupby(["model", "method"])["stored_bits"].idxmin()] if len(good) else good
display(smallest[["model_title", "method_title", "compression_ratio", "stored_bits", "token_perplexity"]])
