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
# # Compress your own model
#
# There are three choices: a model, a ratio, and a text to calibrate on. The model may be a hub id (`Qwen/Qwen3-0.6B`), a folder
# written by `save_pretrained`, or a name in `conf/model`. It is not changed: the result is a smaller copy.

# %%
import os
from pathlib import Path

import cospadi
from cospadi.api import compress_to
from cospadi.checkpoint import generate
from cospadi.checkpoint import ledger as checkpoint_ledger

MODEL = os.environ.get("COSPADI_MODEL", "smollm2_135m")
RATIO = float(os.environ.get("COSPADI_RATIO", "0.3"))
TEXT = os.environ.get("COSPADI_TEXT")  # a file with a document a line; None: the news of the default study
OUT = Path(os.environ.get("COSPADI_OUT", "my-smaller-model"))
SETTINGS = os.environ.get("COSPADI_SETTINGS", "").split()  # calibration.n_samples=32 …

# %% [markdown]
# ## Compress
#
# The dense model reads the text once. Then every projection is replaced by a dictionary times a sparse matrix, whose outputs
# on that text are close to the original ones. If the cell is interrupted, run it again to resume.

# %%
settings = ["factorization=cospadi_plus", f"factorization.compression_ratio={RATIO}", *SETTINGS]
ledger = compress_to(MODEL, OUT, settings, TEXT, keep_work=True, overwrite=True)

# %% [markdown]
# ## How large it is

# %%
print(checkpoint_ledger.ledger_text(ledger))

# %% [markdown]
# ## What it writes
#
# `cospadi.load` checks every tensor and returns an ordinary transformers model.

# %%
model = cospadi.load(OUT)
generate.write_on(model, OUT, "The capital of France is", tokens=24)

# %% [markdown]
# ## Smaller still: fewer bits
#
# The factors were kept in `<out>.work` and are used again, so that only the rounding is new. The int8 model replaces the first one.

# %%
ledger = compress_to(MODEL, OUT, [*settings, "quantization=int8"], TEXT, keep_work=True, overwrite=True)
print(checkpoint_ledger.ledger_text(ledger))
generate.write_on(cospadi.load(OUT), OUT, "The capital of France is", tokens=24)

# %% [markdown]
# ## Any other runtime
#
# `cospadi.checkpoint.write.densify(OUT, "dense-again")` writes an ordinary checkpoint with the same outputs.
