"""Settings of the tracking: whether W&B mirrors a study, and where."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import MISSING

from cospadi.errors import AUTO, require, require_at_least, require_one_of

OFFLINE = "offline"
ONLINE = "online"
DISABLED = "disabled"


@dataclass
class TrackingConfig:
    """Whether W&B mirrors a study, and where. Results and tables never depend on it."""

    name: str = MISSING
    """The file name in ``conf/tracking``."""
    mode: str = AUTO
    """``offline``: files that ``wandb sync`` uploads later. ``auto``: these, uploaded at once where there is an API key and a
    server that answers. ``online``: the same, but refused from the start without a key. ``disabled``: no tracking job."""
    project: str = "cospadi"
    """Project in W&B, made when it does not exist."""
    entity: str | None = None
    """User or team of W&B; ``null``: the key's own."""
    timeout: float = 3.0
    """Seconds in which the server has to answer."""
    upload_timeout: float = 600.0
    """Seconds that an upload may take; what is left then stays in the offline files."""
    revision: int = 1
    """Raise it when a code change alters what is logged."""

    def __post_init__(self) -> None:
        require_one_of("tracking.mode", self.mode, (AUTO, OFFLINE, ONLINE, DISABLED))
        for setting in ("project", "entity"):
            value = getattr(self, setting)
            require(
                value is None or re.fullmatch(r"[^/\\#?%:\s]{1,128}", value) is not None,
                f"tracking.{setting}={value} is not a name that W&B takes. Write up to 128 characters without blanks and / \\ # ? % :",
            )
        require_at_least("tracking.timeout", self.timeout, 0.1)
        require_at_least("tracking.upload_timeout", self.upload_timeout, 1)
