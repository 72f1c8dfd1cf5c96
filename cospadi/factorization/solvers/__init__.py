"""Solvers: tensors in, tensors out. They know no settings, no files and no bits."""
