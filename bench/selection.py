"""The compiled contenders, and of each convnet the variant that is fastest here."""

from __future__ import annotations

import math
import time

import compiling
import contenders as field_of
import planning
from contenders import Contender, WrongOutputs
from race import LEAST_COMPILE, TRIAL_CALLS, Entry, Race
from timing import spread

COMPILE_GUESS = {"cpu": 25.0, "cuda": 90.0}  # seconds, for the time left; only a guess


class Selection:
    """Compiles what the budget allows (DeiTs first) and keeps each convnet's best variant."""

    def __init__(self, race: Race) -> None:
        self.race = race
        self.settings = race.settings
        self.waiting = 0
        self.compile_times: list[float] = []

    def run(self) -> None:
        """Fill `race.finalists`."""
        entries = self.race.entries
        deits = [e for e in entries if e.network.config]
        convnets = [e for e in entries if not e.network.config]
        compiles = self.settings.compile and self.settings.protocol == "modern"
        self.waiting = len(deits) + 2 * len(convnets) if compiles else 0
        for entry in deits:
            if compiles:
                made = self._compiled(entry, entry.base)
                entry.variants += [made] if made else []
        # First every convnet in its better memory format, then, as time allows, in the other.
        ranked = [self._ranked(entry) for entry in convnets]
        for place in range(2) if compiles else ():
            for entry, eager in zip(convnets, ranked, strict=True):
                if made := self._compiled(entry, eager[place]):
                    self._trial(entry, [entry.variants[0], made])
        places = ("fused int8", "fused", "eager", "compiled").index
        for entry in deits:
            self.race.finalists += sorted(entry.variants, key=lambda v: places(v.how))
        self.race.finalists += [e.variants[0] for e in convnets]

    def _ranked(self, entry: Entry) -> list[Contender]:
        """A convnet's eager variants, the faster first; the faster alone stays in the race."""
        eager = entry.variants
        self._trial(entry, eager)
        return sorted(eager, key=lambda v: v.image_seconds)

    def _trial(self, entry: Entry, variants: list[Contender]) -> None:
        """Time a network's variants against each other; the best alone stays."""
        race = self.race
        tried = entry.base.tried
        if len(variants) > 1:
            rounds = TRIAL_CALLS - 1
            what = f"choosing a variant of {entry.network.label}:"
            samples = race.rounds(variants, rounds, [1] * len(variants), what)
            for variant, taken in zip(variants, samples, strict=True):
                median = spread(taken).median
                variant.image_seconds = median / variant.batch
                tried[variant.variant] = round(variant.batch / median, 3)
        best = min(variants, key=lambda v: v.image_seconds)
        best.tried = tried
        entry.variants = [best]

    def _compiled(self, entry: Entry, base: Contender) -> Contender | None:
        """A compiled, checked and warm variant of `base`, or None with the reason noted."""
        s, race = self.settings, self.race
        made = field_of.compiled(base, s.compile_mode, s.train)
        spare = race.left() - self._rounds_cost(made, entry)
        self.waiting -= 1
        self._estimate()
        if spare < LEAST_COMPILE:
            entry.base.tried[made.variant] = "not tried: budget"
            race.note(f"{made.label}: not tried: budget")
            return None
        race.progress.doing(f"compiling {made.label}")
        began = time.perf_counter()
        compiling.forget_counters()
        try:
            with compiling.limit(None if math.isinf(spare) else spare):
                self._first_calls(entry, made, base.batch)
        except compiling.OutOfTime:
            compiling.abandon()
            outcome = f"not finished in {spare:.0f} s: budget"
        except WrongOutputs as error:
            race.refuse(error)
            outcome = "refused: wrong outputs"
        except Exception as error:
            outcome = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
            if planning.is_out_of_memory(error):
                outcome = f"does not fit in memory at batch {base.batch}"
        else:
            self.compile_times.append(time.perf_counter() - began)
            return made
        entry.base.tried[made.variant] = outcome
        race.note(f"{made.label}: {outcome}")
        return None

    def _first_calls(self, entry: Entry, made: Contender, batch: int) -> None:
        race = self.race
        made._step = field_of.make_step(made, self.settings.dtype, self.settings.train)
        made.image_seconds = entry.base.image_seconds
        images = race.inputs.get(made, batch)
        began = time.perf_counter()
        if not self.settings.train:
            race.call(made, images)
            race.clock.synchronize()
            made.compile_seconds = time.perf_counter() - began
        race.check(entry, made, images)
        if self.settings.train:  # the check compiled it: a step would have changed the weights
            made.compile_seconds = time.perf_counter() - began
        made.compile_cached = compiling.from_cache()
        race.warm(made, batch)

    def _rounds_cost(self, made: Contender, entry: Entry) -> float:
        """Seconds that the least number of rounds of everything so far, and `made`, will take."""
        contenders = [v for e in self.race.entries for v in e.variants]
        each = sum(c.image_seconds * c.batch for c in contenders)
        own = entry.base.image_seconds * self.race.batch
        return (each + own) * planning.LEAST_ROUNDS

    def _estimate(self) -> None:
        race = self.race
        known = self.compile_times
        mean = sum(known) / len(known) if known else COMPILE_GUESS[self.settings.device.type]
        each = sum(v.image_seconds * v.batch for e in race.entries for v in e.variants)
        rounds = planning.LEAST_ROUNDS * each
        race.progress.left(min(mean * (self.waiting + 1) + rounds, race.left()))
