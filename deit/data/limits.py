"""How much a file or a server may ask for; more is an error that names the limit.

Each is set by an environment variable of its name. No torch here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

LIMITS = {
    # One image, as a file, a shard's member or a row of bytes. 256 MiB is the largest image that
    # Pillow takes (its MAX_IMAGE_PIXELS), with three bytes a pixel.
    "DEIT_MAX_IMAGE_BYTES": 256 << 20,
    # A shard that is fetched or decompressed. Published ones have 0.1 to 3 GB.
    "DEIT_MAX_SHARD_BYTES": 16 << 30,
    # A decompressed shard's bytes for one compressed. Images shrink by little; a tar's padding of
    # tiny ones by 40.
    "DEIT_MAX_SHARD_RATIO": 200,
    # Names that a pattern stands for. ImageNet-22k takes 3,000.
    "DEIT_MAX_SHARDS": 100_000,
    # The largest label of a shard, plus one. Google Landmarks have 203,094.
    "DEIT_MAX_CLASSES": 1_000_000,
    # Attempts to fetch a shard, a second apart, then two, then four.
    "DEIT_FETCH_TRIES": 3,
    # Seconds in which a server must answer, and send every 64 KiB of a shard.
    "DEIT_FETCH_SECONDS": 15,
}


def limit(name: str) -> int:
    """A limit's value. Raises ValueError where the environment has no whole number above 0."""
    given = os.environ.get(name)
    if given is None:
        return LIMITS[name]
    if not given.isascii() or not given.isdigit() or not int(given[:18]) > 0:
        raise ValueError(f"{name}: expected a whole number above 0; got {given!r}")
    return int(given[:18])


def not_regular(path: Path) -> str | None:
    """What a path is where it is no regular file; None for a file.

    Only regular files are opened: a FIFO is waited for, and a device may have no end. Raises
    OSError where there is nothing.
    """
    mode = os.stat(path).st_mode
    kinds = {
        "a folder": stat.S_ISDIR,
        "a FIFO": stat.S_ISFIFO,
        "a device": lambda m: stat.S_ISCHR(m) or stat.S_ISBLK(m),
        "a socket": stat.S_ISSOCK,
    }
    if stat.S_ISREG(mode):
        return None
    return next((name for name, test in kinds.items() if test(mode)), "no regular file")
