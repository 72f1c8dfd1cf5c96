"""How fast and how good, measured on this machine: ``cospadi bench solver``.

``cases`` are what is solved, ``solvers`` who solves, ``solver`` and ``whole_model`` the two measurements, ``usage`` what the
machine did meanwhile, ``render`` the report. Needs torch and the numerics of ``factorization``, so that it also runs where
the pipeline is not installed. The yardstick, ``ksvd_plain``, is the paper's recipe in torch, nothing compiled.
"""
