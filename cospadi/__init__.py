"""Calibration-guided sparse dictionary compression of language models (CoSpaDi, arXiv:2509.22075).

Rooms, in the order data walks through them::

    sources -> calibration -> factorization -> evaluation -> tables

``config`` holds their settings, ``study`` the grid of cells, ``stages`` reads and writes their files; rooms themselves are
functions on tensors and records.
"""

__version__ = "0.1.0"
