"""Installs the project into the environment of the Python that runs this, saying how far pip is.

Only the standard library: it runs before anything is installed. pip's own output goes to ``.venv/install.log``.
"""

import subprocess
import sys
import time
from pathlib import Path

PACKAGES = 118
"""Lines in which pip collects a package, roughly; only for the time left."""
LOG = Path(".venv/install.log")
COMMAND = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]


def main() -> int:
    started = time.monotonic()
    reported = started
    seen = 0
    with (
        LOG.open("w") as log,
        subprocess.Popen(
            [*COMMAND, "-c", "constraints.txt", "-e", ".[dev]"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as pip,
    ):
        for line in pip.stdout or []:
            log.write(line)
            seen += line.startswith("Collecting")
            elapsed = time.monotonic() - started
            if line.startswith("Installing collected"):
                print(f"All packages fetched in {elapsed:.0f} s; unpacking them, about a minute and a half", flush=True)
                reported = float("inf")
            elif time.monotonic() - reported > 10 and seen:
                left = elapsed / seen * max(PACKAGES - seen, 0) + 60
                print(f"{seen} of about {PACKAGES} packages, {elapsed:.0f} s, left about {left:.0f} s", flush=True)
                reported = time.monotonic()
    if pip.returncode:
        print("".join(LOG.read_text().splitlines(keepends=True)[-15:]), file=sys.stderr)
        print(f"error: pip could not install the project. All it said is in {LOG}.", file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main())
