"""A compressed model on disk and in memory: layers, reading, writing, its bytes, transformers' hook."""
