"""Fewer bits for what a factorization stores: number formats, rounding that makes up for its errors, packing.

``formats`` says which numbers there are, ``matrix`` how a matrix of them lies in a file, ``rounding`` chooses them, and
``methods`` applies that to dictionaries, values, low-rank factors and dense weights.
"""
