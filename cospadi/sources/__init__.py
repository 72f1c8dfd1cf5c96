"""Room 1: an address (hub, disk, wheel, seed) -> a checkpoint, or a list of documents."""

__all__ = ["local_path", "n_layers", "prepare_model", "read_documents", "state_on_disk"]
