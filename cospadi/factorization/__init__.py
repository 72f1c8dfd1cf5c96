"""Room 3: a weight and a gram -> factors that fit a budget of bits.

``methods`` holds every method, ``budget`` turns ratios into sizes, ``whitening`` moves between weights and outputs,
``groups`` says which projections share, ``shared`` fits what they share, ``search`` how many atoms they get,
``low_rank``, ``htp``, ``sparse_coding``, ``ksvd``, ``orthogonal``, ``one_shot``, ``pruning`` and ``oats`` are the solvers,
``factors`` is what comes out and how it is stored.
"""
