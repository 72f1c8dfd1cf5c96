"""A compressed model behind transformers' own server, which speaks OpenAI's API."""

from __future__ import annotations

from pathlib import Path

from transformers.cli.serve import Serve

from cospadi import devices
from cospadi.checkpoint.read import compression_of


def serve(folder: Path, host: str, port: int, device: str) -> None:
    """Load the model of ``folder`` and answer until the process is stopped.

    Raises:
        UserError: ``folder`` is not a compressed checkpoint, or there is no such device.
    """
    compression_of(folder)
    place = devices.pick(device, "--device")
    print(f"http://{host}:{port}/v1 answers for the model {folder}. Stop it with Ctrl-C.", flush=True)
    Serve(force_model=str(folder), host=host, port=port, device=str(place))
