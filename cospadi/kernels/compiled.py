"""How this project compiles a loop."""

import inspect
from collections.abc import Callable

from numba import njit

RELAXED = {"reassoc", "contract", "arcp", "nsz", "nnan"}
"""Sums in any order, fused multiply-adds, maxima that know no NaN: without these nothing runs in vector units."""


def compiled(loop: Callable) -> Callable:
    """``loop`` as machine code that lets other threads run, kept on disk where there is a folder to keep it in.

    >>> compiled(lambda x: x + 1)(2)
    3
    """
    loop = inspect.unwrap(loop)  # a type checker's import hook wraps every function, and numba cannot compile a wrapper
    options = {"nogil": True, "fastmath": RELAXED}
    try:
        return njit(loop, cache=True, **options)
    except RuntimeError:  # neither beside the source nor in the user's cache may anything be written
        return njit(loop, **options)
