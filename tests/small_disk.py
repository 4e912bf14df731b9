"""A disk of a few MB, really full: a tmpfs in a namespace of its own, where that is allowed."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path

# Arguments: the mount point, the size, then the shell's own.
_MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$0" && shift && '


def run(disk: Path, size: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script that finds `disk` mounted with `size` ("2m"), and "$@" the arguments.

    What it leaves there is gone afterwards.
    """
    disk.mkdir(exist_ok=True)
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", _MOUNT + script]
    return subprocess.run(
        [*command, str(disk), size, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@functools.cache
def why_not() -> str:
    """Why there is none here; empty where there is."""
    if shutil.which("unshare") is None:
        return "no unshare: a small disk cannot be mounted"
    tried = run(Path("/mnt"), "1m", "true")
    return (
        "" if tried.returncode == 0 else f"a small disk cannot be mounted: {tried.stderr.strip()}"
    )
