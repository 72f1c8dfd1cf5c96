"""The model card of a compressed checkpoint: what it is, what it cost, how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CARD = """\
---
library_name: transformers
{base_line}tags:
- cospadi
- compressed
---

# {title}, {removed:.0%} of its projections' bits removed

Compressed by [CoSpaDi](https://arxiv.org/abs/2509.22075) without training: method `{method}`, calibrated on {calibration}.
{outcome}
## Load it

```python
import cospadi  # from here on transformers understands it

model = cospadi.load("path/to/this/folder")
```

`cospadi generate FOLDER "…"` writes on, `cospadi info FOLDER` lists its bytes, `cospadi densify FOLDER OUT` makes an ordinary
checkpoint of it, as large as the original. The licence is that of the original model.
"""


def card(
    title: str, base: str | None, method: str, calibration: str, removed: float, outcome: Mapping[str, Any] | None
) -> str:
    """Markdown with the metadata that model hubs read.

    Args:
        base: hub id of the original; ``None`` where it was on a disk.
        calibration: title of the text.
        removed: fraction of the projections' 16-bit bytes.
        outcome: `cospadi.pipeline.outcome.Outcome` as a mapping; ``None``: not measured.
    """
    table = ""
    if outcome:
        table = f"""
| | before | after |
| :-- | --: | --: |
| perplexity, {outcome["n_windows"]} × {outcome["window"]} tokens | {outcome["dense_perplexity"]:.2f} | {outcome["perplexity"]:.2f} |
| KL to the original, nats per token | 0 | {outcome["kl_to_dense"]:.4f} |
| whole model, MB (before: in 16 bits) | {outcome["dense_bytes"] / 1e6:.1f} | {outcome["file_bytes"] / 1e6:.1f} |

Measured on a part of the calibration text that calibration did not see.
"""
    base_line = f"base_model: {base}\n" if base else ""
    return CARD.format(
        base_line=base_line, title=title, removed=removed, method=method, calibration=calibration, outcome=table
    )
