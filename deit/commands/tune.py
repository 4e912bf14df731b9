"""`deit tune`: what runs fastest on this device, measured."""

from __future__ import annotations

from deit.commands import flags
from deit.tune_options import Options


@flags.of_options
class Tune(Options):
    """Measure what runs each operator of a network fastest on this device, for later runs.

    Every candidate is checked against fp64 first. On a GPU the configurations of the Triton kernels
    are measured before. The user's cache directory keeps all of it, by device and versions.

    Exits with 1 if a default configuration is found wrong.
    """

    def run(self) -> int:
        """Measure, keep and say what was found; 1 where a default configuration is wrong."""
        from deit import tune

        return tune.run(self)
