"""Calibration-guided sparse dictionary compression of language models (CoSpaDi, arXiv:2509.22075).

Rooms, in the order data walks through them::

    sources -> calibration -> factorization -> quantization -> checkpoint -> evaluation -> tables -> tracking

Each has a ``settings.py`` of its own where it has settings. ``pipeline`` holds the grid of cells and the stages, which alone
read and write results. `compress` and `load` are for those who just want their model smaller; importing this
package also makes ``AutoModelForCausalLM.from_pretrained`` understand compressed checkpoints.
"""

from typing import Any

from cospadi.checkpoint import registration

__version__ = "0.1.0"
__all__ = ["compress", "load"]
registration.register()


def __getattr__(name: str) -> Any:
    """`compress` and `load`, imported when they are first asked for."""
    if name == "compress":
        from cospadi.api import compress

        return compress
    if name == "load":
        from cospadi.checkpoint.read import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
