"""A compressed model: a Hugging Face folder whose projections are stored as factors, and so is really smaller.

``layers`` compute with the packed form, ``specs`` describe them. ``write`` makes a checkpoint, ``read`` opens it or says why
not, ``ledger`` counts its bytes, ``checksums`` guard them, ``generate`` lets it write. ``transformers_plugin`` is what
transformers calls, ``registration`` tells it so.
"""
