"""Room 4: fewer bits for what a factorization stores, by rounding that makes up for its own errors.

``rounding`` chooses the codes of a matrix, ``methods`` applies that to dictionaries, values, low-rank factors and dense
weights. Number formats and their bytes are in ``packing``.
"""
