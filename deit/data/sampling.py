"""Which image comes when: the same for any number of workers and processes, and after a resume.

Everything random about a sample follows from counters: the order of an epoch from (seed, epoch),
an image's augmentation from (seed, epoch, image, view). Nothing depends on what was drawn
before, so a run that starts at update u continues exactly as one that came there by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One sample of one update: the `view`-th view of image `image` in `epoch`."""

    update: int
    position: int  # in the update's batch over all processes; mixing pairs 2k with 2k + 1
    epoch: int
    image: int
    view: int


@dataclass(frozen=True)
class Plan:
    """The samples of every update of a run.

    An epoch is `images` samples whatever `views` is: with repeated augmentation (arXiv
    1902.05509) it holds ceil(images / views) images, each in `views` views, as the official
    sampler does; but that one drops all of a data set of fewer than 256 images, and this none.

    An update takes `batch` samples, a multiple of `pieces` (processes times accumulated parts);
    what is left at the end of an epoch is dropped. A data set smaller than a batch gives all that
    divides into `pieces`.
    """

    images: int
    batch: int
    views: int = 1
    seed: int = 0
    pieces: int = 1

    def __post_init__(self) -> None:
        for name in ("images", "batch", "views", "pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1; got {getattr(self, name)}")
        even = 2 * self.pieces if self.pieces > 1 else 1  # pairs are mixed within a piece
        if self.batch % even:
            raise ValueError(
                f"batch_size: expected a multiple of {even}, so that {self.pieces} processes or "
                f"accumulated parts take equal shares of pairs; got {self.batch}"
            )
        if self.size < 1:
            raise ValueError(
                f"data: expected at least {even} images for {self.pieces} processes or "
                f"accumulated parts; got {self.images}"
            )

    @property
    def updates(self) -> int:
        """Updates an epoch."""
        return max(1, self.images // self.batch)

    @property
    def size(self) -> int:
        """Samples in one piece of an update."""
        share = min(self.batch, self.images) // self.pieces
        return share - share % 2 if self.pieces > 1 else share

    def epoch(self, epoch: int) -> list[list[Draw]]:
        """The samples of each update of one epoch.

        The views of an image stand in the same update but as far apart as they can, so that
        mixing, which pairs neighbours, mixes different images.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
        chosen = order[: -(-self.images // self.views)]
        stream = [(int(index), view) for index in chosen for view in range(self.views)]
        taken, batches = self.size * self.pieces, []
        for update in range(self.updates):
            part = sorted(stream[update * taken : (update + 1) * taken], key=lambda s: s[1])
            number = epoch * self.updates + update
            batches.append([Draw(number, p, epoch, i, v) for p, (i, v) in enumerate(part)])
        return batches


class Batches(Sampler[list[Draw]]):
    """The lists of samples that one process loads, from update `start` to the end of `epochs`.

    Of an update's `plan.pieces` pieces, process `rank` of `processes` loads its share in turn.
    """

    def __init__(
        self, plan: Plan, epochs: int, *, start: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        self.plan, self.epochs, self.start = plan, epochs, start
        self.parts = plan.pieces // processes
        self.first = rank * self.parts

    def __len__(self) -> int:
        """Pieces left to load."""
        return max(0, self.epochs * self.plan.updates - self.start) * self.parts

    def __iter__(self) -> Iterator[list[Draw]]:
        size = self.plan.size
        first, skip = divmod(self.start, self.plan.updates)
        for epoch in range(first, self.epochs):
            for batch in self.plan.epoch(epoch)[skip:]:
                for part in range(self.first, self.first + self.parts):
                    yield batch[part * size : (part + 1) * size]
            skip = 0


def stream(*counters: int) -> np.random.SeedSequence:
    """Randomness that is a function of its counters alone."""
    return np.random.SeedSequence(counters)
