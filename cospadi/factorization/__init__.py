"""Room 3: a weight and a gram -> factors that fit a budget of bits.

``settings`` has a class per method and ``methods`` a function per method, ``problem`` says what a method is given. ``budget``
turns ratios into sizes, ``search`` chooses how many atoms a matrix gets, ``groups`` says which projections share,
``dictionary_learning`` holds the steps of CoSpaDi around its solvers, ``rank_search`` those of ASVD. ``solvers`` see tensors
alone. ``factors`` is what comes out, ``files`` how it is stored.
"""
