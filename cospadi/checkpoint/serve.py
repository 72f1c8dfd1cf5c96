"""A compressed model behind transformers' own server, which speaks OpenAI's API."""

from __future__ import annotations

import socket
from pathlib import Path

from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager

from cospadi import devices
from cospadi.checkpoint.read import compression_of
from cospadi.errors import UserError


def serve(folder: Path, host: str, port: int, device: str) -> None:
    """Load the model of ``folder`` and answer until the process is stopped.

    Raises:
        UserError: ``folder`` is not a compressed checkpoint, or there is no such device or address.
    """
    compression_of(folder)
    _require_free(host, port)
    place = devices.pick(device, "--device")
    print(f"http://{host}:{port}/v1 answers for the model {folder}. Stop it with Ctrl-C.", flush=True)
    _list_alone(folder)
    Serve(force_model=str(folder), host=host, port=port, device=str(place))


def _list_alone(folder: Path) -> None:
    """Have ``GET /v1/models`` name the model that is served: transformers lists the hub's cache, and fails where there is none."""
    created = int((folder / "config.json").stat().st_mtime)
    model = {"id": str(folder), "object": "model", "created": created, "owned_by": "cospadi"}
    ModelManager.get_gen_models = staticmethod(lambda cache_dir=None: [model])


def _require_free(host: str, port: int) -> None:
    """Try the address before the model is loaded: the server itself would take a port of more than 16 bits for another.

    Raises:
        UserError: nobody can listen there.
    """
    if not 1 <= port <= 65535:
        raise UserError(f"--port={port} is not between 1 and 65535.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UserError(
            f"Nothing can listen on --host={host} --port={port}: {error.strerror}. Name another port, or stop what uses it."
        ) from error
