"""`deit info`: what is installed here, and what runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Info:
    """Print versions, devices, what was built, and which kernels can run here."""

    def run(self) -> int:
        """Print them."""
        from deit.info import info

        info()
        return 0
