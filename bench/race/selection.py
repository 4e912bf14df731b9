"""The compiled contenders, and the variant of each convnet that is fastest here."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from evidence.timing import spread
from peers import Peer
from race import compiling, planning
from race import contenders as field_of
from race.checks import WrongOutputs
from race.contenders import Contender
from race.race import LEAST_COMPILE, TRIAL_CALLS, Entry, Race

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
        peers = self.settings.peers
        compiler = next((peer for peer in peers if peer.compile_mode), None)
        formats = self.settings.formats if compiler else 0
        self.waiting = len(deits) * len(peers) + formats * len(convnets)
        for entry in deits:
            for peer in peers:
                made = self._made(entry, entry.base, peer)
                entry.variants += [made] if made else []
        # Every convnet is compiled in its better memory format first, and in the other as time
        # allows. If one must do, it is the contiguous one, where Inductor chooses the layouts: it
        # was 0.97, 1.01 and 1.13 times as fast (ResNet-152, RegNetY-16GF, EfficientNet-B4).
        ranked = [self._ranked(entry) for entry in convnets]
        if formats == 1:
            ranked = [[entry.base] for entry in convnets]
        for place in range(formats):
            for entry, eager in zip(convnets, ranked, strict=True):
                assert compiler is not None  # it has formats
                if made := self._made(entry, eager[place], compiler):
                    self._trial(entry, [entry.variants[0], made])
        for entry in deits:  # fused, eager, and the peers in their order
            self.race.finalists += sorted(
                entry.variants, key=lambda v: (v.how != "fused", v.how != "eager")
            )
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

    def _made(self, entry: Entry, base: Contender, peer: Peer) -> Contender | None:
        """A peer's built, checked and warm variant of `base`, or None with the reason noted."""
        race = self.race
        spare = race.left() - self._rounds_cost(entry)
        self.waiting -= 1
        self._estimate()
        variant = replace(base, how=peer.how).variant
        label = f"{base.network.label} {variant}"
        if spare < LEAST_COMPILE:
            entry.base.tried[variant] = "not tried: budget"
            race.note(f"{label}: not tried: budget")
            return None
        race.progress.doing(f"{'compiling' if peer.compile_mode else 'building'} {label}")
        began = time.perf_counter()
        compiling.forget_counters()
        try:
            with compiling.limit(None if math.isinf(spare) else spare):
                made = self._first_calls(entry, base, peer)
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
        entry.base.tried[variant] = outcome
        race.note(f"{label}: {outcome}")
        return None

    def _first_calls(self, entry: Entry, base: Contender, peer: Peer) -> Contender:
        race, train, batch = self.race, self.settings.train, base.batch
        images = race.inputs.get(base, batch)
        began = time.perf_counter()
        made = field_of.by_peer(peer, base, images, train, self.settings.impl)
        made._step = field_of.make_step(made, self.settings.dtype, train, race.teacher)
        made.image_seconds = entry.base.image_seconds
        if not train:
            race.call(made, images)
            race.clock.synchronize()
            made.compile_seconds = time.perf_counter() - began
        race.check(entry, made, images)
        if train:  # the check compiled it: a step would have changed the weights
            made.compile_seconds = time.perf_counter() - began
        made.compile_cached = compiling.from_cache()
        race.warm(made, batch)
        return made

    def _rounds_cost(self, entry: Entry) -> float:
        """Seconds that the least rounds of everything so far, and one more of `entry`, take."""
        contenders = [v for e in self.race.entries for v in e.variants]
        each = sum(c.image_seconds * c.batch for c in contenders)
        own = entry.base.image_seconds * self.race.batch
        calls = 2 if self.settings.latency else 1  # there an untimed one comes before each
        return (each + own) * planning.LEAST_ROUNDS * calls

    def _estimate(self) -> None:
        race = self.race
        known = self.compile_times
        mean = sum(known) / len(known) if known else COMPILE_GUESS[self.settings.device.type]
        each = sum(v.image_seconds * v.batch for e in race.entries for v in e.variants)
        rounds = planning.LEAST_ROUNDS * each
        race.progress.left(min(mean * (self.waiting + 1) + rounds, race.left()))
