"""`deit info`: what is installed here, and what runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Info:
    """Print versions, devices, what was built, which kernels run here, and on what evidence."""

    json: bool = False
    """As JSON, with every measurement."""

    def run(self) -> int:
        """Print them."""
        from deit.info import info

        info(as_json=self.json)
        return 0
