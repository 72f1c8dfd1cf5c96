"""Loops that no matrix product holds, compiled by numba for a CPU; ``triton_product`` for a GPU.

``pursuit`` is sparse coding, ``sweep`` K-SVD's update, ``selection`` the largest magnitudes of every row; ``sparse_product``
and ``triton_product`` multiply with weights as they are stored, ``precision`` chooses the library for dense ones.

Each has a function of tensors and, below it, the loops themselves, all in one file: numba's cache of a loop looks for
changes in its own file only. What kind of array a loop indexes decides its speed: ``rows[k]`` is known to be contiguous,
``rows[k, :n]`` or a row of ``for row in rows`` is not, and ten times as slow.
"""
