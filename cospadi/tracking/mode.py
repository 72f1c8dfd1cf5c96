"""Whether runs can be uploaded: whether there is a key, and whether the server answers within ``tracking.timeout``."""

from __future__ import annotations

import configparser
import netrc
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cospadi.errors import UserError
from cospadi.tracking.settings import OFFLINE, ONLINE, TrackingConfig

CLOUD = "https://api.wandb.ai"


@dataclass(frozen=True)
class Reach:
    """Whether W&B can be reached, why or why not, and the user or team of the key."""

    online: bool
    why: str
    entity: str | None = None


def require_key(tracking: TrackingConfig) -> None:
    """Check for a key before the first job.

    Raises:
        UserError: with ``tracking.mode=online`` and no API key.
    """
    if tracking.mode == ONLINE and api_key() is None:
        raise UserError(
            f"tracking.mode=online and there is no W&B API key for {base_url()}: neither WANDB_API_KEY is set nor does a netrc "
            "file name it. Type `wandb login`, or set tracking=auto, which keeps runs as files until there is one."
        )


def reach(tracking: TrackingConfig) -> Reach:
    """Ask the server who the key belongs to, for at most ``tracking.timeout`` seconds, name lookup and proxies included."""
    if tracking.mode == OFFLINE:
        return Reach(False, "tracking.mode=offline")
    refusal = _refusal()
    if refusal:
        return Reach(False, refusal)
    key = api_key()
    if key is None:
        return Reach(False, f"there is no API key for {base_url()}")
    answers: list[Reach] = []
    asking = threading.Thread(target=lambda: answers.append(_ask(key, tracking)), daemon=True)
    asking.start()
    asking.join(tracking.timeout)
    return answers[0] if answers else Reach(False, f"{base_url()} did not answer within {tracking.timeout:g} s")


def _refusal() -> str | None:
    """How the person told W&B not to upload: for everything that uses it, wherever W&B itself looks."""
    mode = os.environ.get("WANDB_MODE")
    if mode is not None:
        return None if mode == ONLINE else f"WANDB_MODE={mode}"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return f"WANDB_DISABLED={os.environ['WANDB_DISABLED']}"
    mode = _settings().get("default", "mode", fallback=ONLINE)
    return None if mode == ONLINE else f"`wandb {mode}` was typed here"


def _settings() -> configparser.ConfigParser:
    """W&B's settings files: that of the person, then that of this folder, whose word counts more."""
    folder = os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")
    here = Path(os.environ.get("WANDB_DIR", "."))
    noted = configparser.ConfigParser(interpolation=None)
    for file in (Path(folder).expanduser() / "settings", here / ".wandb" / "settings", here / "wandb" / "settings"):
        try:
            noted.read(file)
        except (configparser.Error, OSError, UnicodeDecodeError):
            continue  # W&B warns of it itself
    return noted


def _ask(key: str, tracking: TrackingConfig) -> Reach:
    import httpx  # 0.2 s at every start of a study, and only an upload needs it

    query = {"query": "query Viewer { viewer { entity } }"}
    try:
        answer = httpx.post(f"{base_url()}/graphql", json=query, auth=("api", key), timeout=tracking.timeout)
        viewer = answer.json()["data"]["viewer"] if answer.is_success else None
    except httpx.HTTPError as error:
        return Reach(False, f"{base_url()} cannot be reached ({type(error).__name__})")
    except (ValueError, KeyError, TypeError):
        return Reach(False, f"{base_url()} does not answer like W&B")
    if answer.is_success and viewer:
        return Reach(True, f"{base_url()} answers", tracking.entity or viewer.get("entity"))
    if answer.is_success or answer.status_code in (401, 403):
        return Reach(False, f"{base_url()} does not know the API key")
    return Reach(False, f"{base_url()} answers with HTTP status {answer.status_code}")


def base_url() -> str:
    """W&B's server: ``WANDB_BASE_URL``, what ``wandb login --host`` noted, or the cloud."""
    url = os.environ.get("WANDB_BASE_URL") or _settings().get("default", "base_url", fallback="") or CLOUD
    return url.rstrip("/")


def api_key() -> str | None:
    """The key, from where W&B itself reads it: ``WANDB_API_KEY``, then the netrc file."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    file = next((path for place in places if place and (path := Path(place).expanduser()).is_file()), None)
    try:
        login = netrc.netrc(file).authenticators(urlsplit(base_url()).netloc) if file else None
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return None
    return login[2] or None if login else None


def page(entity: str | None, project: str, run: str) -> str | None:
    """Address of a run's page; ``None`` where the user or team is unknown."""
    if entity is None:
        return None
    app = "https://wandb.ai" if base_url() == CLOUD else base_url()
    return f"{app}/{entity}/{project}/runs/{run}"
