"""One comparison from start to end: build, check, fit, warm up, compile, time in rounds.

Everything apart from the rounds (building, checking, compiling, warming up, choosing among a
convnet's variants) happens before them and is reported apart.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import evidence
from deit.fused_vit.modules import Fused
from evidence import devices
from evidence.timing import Clock, interleave, spread
from race import compiling, neighbour, planning
from race import contenders as field_of
from race.checks import Agreement, Oracle, WrongOutputs, verify_gradients
from race.contenders import Contender, Network
from race.inputs import Inputs
from race.progress import Progress, human
from race.settings import Settings

RESERVE, RESERVED_SHARE = 12.0, 0.1  # seconds, or of a small budget that share, for what comes last
SLOW = 1.0  # seconds: a call that takes longer is timed once, not three times, for planning
COMPILE_SHARE = 0.45  # of a budget: seven compilations took 140 s of 540 s on two cores
LEAST_COMPILE = 8.0  # seconds; DeiT-B alone takes 8 s on two idle cores
PROBE = 2  # images, to learn speed and memory by; a first guess of what a batch will take
FIRST_RESULT = 60.0  # seconds that the preliminary figure may take once its models are built
LATENCY_SECONDS = 20.0  # of timed calls for each contender: 100 of DeiT-B's on two cores
PAUSE = 5e-3  # seconds, untimed: another runtime's threads may spin on for a millisecond or two
TRIAL_CALLS = 3  # to choose among a convnet's variants: one to warm up, two timed


@dataclass
class Entry:
    """One network in the race: its eager model, the check on its logits, the variants still in."""

    network: Network
    base: Contender
    oracle: Oracle | None
    variants: list[Contender] = field(default_factory=list)


class Race:
    """Runs a comparison; afterwards `finalists` hold samples of the same rounds."""

    def __init__(self, settings: Settings, progress: Progress) -> None:
        self.settings, self.progress = settings, progress
        self.clock = Clock(settings.device)
        input_dtype = torch.float32 if settings.train else settings.dtype
        self.inputs = Inputs(settings.device, input_dtype)
        self.peak = settings.peak or devices.Peak(settings.device, settings.dtype)
        self.reserve = min(RESERVE, RESERVED_SHARE * (settings.budget or math.inf))
        self.teacher = settings.teacher and field_of.labeller(settings.teacher, settings.device)
        self.entries: list[Entry] = []
        self.finalists: list[Contender] = []
        self.batch = settings.batch
        self.notes: list[str] = []  # what was shortened, refused or left out, and why
        scopes = map(self.scope, ("dtype", *evidence.EIGHT_BITS))
        self.kernels = {s: evidence.kernels_sha256(scope=s) for s in scopes}  # as the race begins
        self.refused = False  # some contender computed something else

    def scope(self, precision: str) -> str:
        """Which sources a contender of that precision (`Contender.precision`) can run here."""
        device = self.settings.device.type
        return evidence.scope_of(device, int8=precision == "int8", fp8=precision == "fp8")

    # What is left -------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds of the budget that the race may still use."""
        if self.settings.budget is None:
            return math.inf
        return self.settings.budget - self.progress.elapsed() - self.reserve - self.settings.keep

    def note(self, message: str) -> None:
        """A message that is printed now and again beneath the results."""
        self.notes.append(message)
        self.progress.say(message)

    def refuse(self, error: WrongOutputs) -> None:
        """A contender is out, with a message, and the run's exit status will say so."""
        self.refused = True
        self.note(str(error))

    # Building and checking ----------------------------------------------------------------

    def prepare(self) -> None:
        """Build every network, check fused against eager, and probe speed and memory.

        DeiTs come first, and with a budget a first figure of them, before any convnet is built.
        """
        networks = self.settings.networks
        self._prepare([network for network in networks if network.config])
        if self.settings.budget is not None and self.settings.early:
            self._preliminary([v for entry in self.entries for v in entry.variants])
        self._prepare([network for network in networks if not network.config])

    def _prepare(self, networks: Sequence[Network]) -> None:
        for network in networks:
            self.progress.doing(f"building and checking {network.label}")
            try:
                self.entries.append(self._entry(network))
            except WrongOutputs as error:
                self.refuse(error)

    def _fused(self, base: Contender) -> Contender:
        """The fused form; a note on what `fuse` took, and where it left the network as it was."""
        s, start = self.settings, time.perf_counter()
        made = field_of.fused(base, s.impl, s.train, s.dtype)
        took, label = time.perf_counter() - start, base.network.label
        if took > 1.0:
            self.note(f"{label}: fuse() took {took:.0f} s, which is in no figure (--measure)")
        if not any(isinstance(module, Fused) for module in made.module.modules()):
            self.note(f"{label}: fuse() left it as it was, which is not slower here (--measure)")
        return made

    def _entry(self, network: Network) -> Entry:
        s = self.settings
        base = field_of.eager(network, s.device, s.dtype, s.train)
        probe = self.inputs.get(base, min(s.batch, PROBE))
        entry = Entry(network, base, None, [base])
        if not s.train:
            entry.oracle = Oracle(base, probe)
            base.logits_error = entry.oracle.eager_error
        others = []
        if network.config:
            others.append(self._fused(base))
        elif s.protocol == "modern":
            others.append(field_of.in_channels_last(base))
        for contender in [base, *others]:
            contender._step = field_of.make_step(contender, s.dtype, s.train, self.teacher)
            try:
                if contender is not base:
                    self.check(entry, contender, probe)
                    entry.variants.append(contender)
            except WrongOutputs as error:
                self.refuse(error)
        for contender in entry.variants:
            self._probe(contender)
        self.inputs.forget()
        return entry

    def check(self, entry: Entry, contender: Contender, images: Tensor) -> None:
        """Raise WrongOutputs where `contender` does not compute what the eager model does.

        In training their gradients are compared, so both must still have the same weights.
        """
        images = contender.to_layout(images)
        if self.settings.train:
            verify_gradients(contender, entry.base, images, self.settings.dtype)
            return
        if contender.precision in evidence.EIGHT_BITS:
            agreement = Agreement(entry.base, images)
            contender.logits_error = agreement.verify(contender, contender._step)
            return
        # A peer sees another batch than the probe's, with an oracle of its own.
        oracle = entry.oracle
        if oracle is None or contender.about is not None:
            oracle = Oracle(entry.base, images)
        contender.logits_error = oracle.verify(contender, self.call(contender, images))

    def call(self, contender: Contender, images: Tensor) -> Tensor:
        """One step of a contender on a batch: its logits, or in training its loss."""
        assert contender._step is not None
        return contender._step(images)

    def _probe(self, contender: Contender) -> None:
        """Seconds and bytes an image at a small batch, for planning only."""
        batch = min(self.settings.batch, PROBE)
        images = self.inputs.get(contender, batch)
        if self.settings.train:  # its first step makes the moments; logits were made when checked
            self.call(contender, images)
        taken = devices.step_bytes(lambda: self.call(contender, images), self.settings.device)
        contender.image_bytes = taken / batch + images[0].nbytes * self.inputs.count
        # The best of three: on a shared machine one call may take five times its usual time.
        best = self._measure(contender, images)
        if best < SLOW:
            best = min(best, *(self._measure(contender, images) for _ in range(2)))
        contender.image_seconds = best / batch

    def _measure(self, contender: Contender, images: Tensor, calls: int = 1) -> float:
        seconds = self.clock.time(lambda: self.call(contender, images), calls)
        contender.image_seconds = seconds / len(images)
        return seconds

    # Fitting ------------------------------------------------------------------------------

    def choose_batch(self) -> None:
        """Shorten the batch, for all alike, to what memory and the budget allow."""
        s = self.settings
        need, free, fits = self._fit_memory([v for e in self.entries for v in e.variants])
        if fits < self.batch:
            self.batch = fits
            self.note(
                f"asked for batch {s.batch}; {free / 1e9:.1f} GB are free and an image takes "
                f"{need / 1e6:.0f} MB: batch {fits}"
            )
        if s.budget is not None:
            self._fit_budget(s.budget)

    def _fit_memory(self, contenders: Sequence[Contender]) -> tuple[float, float, int]:
        """Bytes an image, bytes free, and the batch that fits; a GPU is asked by trying."""
        need = max((c.image_bytes for c in contenders), default=0.0)
        if self.settings.device.type != "cpu":
            return need, math.inf, self.batch
        free = devices.available_bytes(self.settings.device)
        return need, free, planning.batch_for_memory(self.batch, need, free)

    def _fit_budget(self, budget: float) -> None:
        s = self.settings
        rounds = s.rounds if s.protocol == "deit2021" else planning.LEAST_ROUNDS
        deits = [v for e in self.entries if e.network.config for v in e.variants]
        work = [v.image_seconds * (rounds + 2) for v in deits]
        compiles = any(peer.compile_mode for peer in s.peers)
        for _ in s.peers:
            work += [e.base.image_seconds * (rounds + 2) for e in self.entries if e.network.config]
        for entry in self.entries:
            if not entry.network.config:
                eager = [v.image_seconds for v in entry.variants]
                trials = TRIAL_CALLS * (sum(eager) + (4 * min(eager) if compiles else 0.0))
                work.append(min(eager) * (rounds + 2) + trials)
        share = self.left() * (1 - COMPILE_SHARE if s.peers else 0.9)
        fits = planning.batch_for_time(self.batch, work, 1, share)
        if fits < self.batch:
            asked = human(sum(work) * self.batch)
            self.note(
                f"asked for batch {s.batch}; measured at batch {fits}, because the runs at "
                f"{self.batch} would take about {asked} and the budget is {human(budget)}"
            )
            self.batch = fits

    # Warming up and the first result --------------------------------------------------------

    def warm_up(self) -> None:
        """Run every variant at the batch; where it does not fit, halve it for all."""
        if self.settings.protocol == "deit2021" and self.settings.device.type == "cuda":
            for entry in self.entries:
                for contender in entry.variants:
                    self._largest(contender)
            return
        everyone = [v for e in self.entries for v in e.variants]
        self.batch, _ = planning.halve_until_it_fits(
            self.batch, lambda batch: self._warm_all(everyone, batch), self.note
        )

    def _warm_all(self, contenders: Sequence[Contender], batch: int) -> None:
        self.inputs.forget()
        for contender in contenders:
            self.progress.doing(f"warming up {contender.label}", f"batch {batch}")
            self.warm(contender, batch)

    def warm(self, contender: Contender, batch: int) -> None:
        """First calls at the batch that is timed, with the memory of one of them."""
        start = time.perf_counter()
        device = self.settings.device
        images = self.inputs.get(contender, batch)
        pools = devices.graph_pool_bytes(device)
        operators = field_of.operators_in(lambda: self.call(contender, images))
        contender.operators = operators if contender.is_fused else None
        above = devices.step_bytes(lambda: self.call(contender, images), device)
        above += max(0, devices.graph_pool_bytes(device) - pools)
        if contender.counted:
            contender.memory_bytes = contender.resident_bytes(self.settings.train) + above
        if device.type == "cuda":
            while time.perf_counter() - start < 0.5:  # clocks rise, algorithms are chosen
                self._measure(contender, images)
            self._measure(contender, images)
        contender.batch = batch
        contender.warmup_seconds = time.perf_counter() - start

    def _largest(self, contender: Contender) -> None:
        def attempt(batch: int) -> None:
            self.inputs.forget()
            torch.cuda.empty_cache()
            self.progress.doing(f"largest batch of {contender.label}", f"{batch}")
            self.warm(contender, batch)

        self._warm_all([contender], planning.largest_that_fits(attempt))

    def _preliminary(self, deits: Sequence[Contender]) -> None:
        """A first figure early: a few interleaved rounds of the DeiTs' eager and fused forms."""
        if not deits:
            return
        rounds = planning.PRELIMINARY_ROUNDS
        _, _, batch = self._fit_memory(deits)
        seconds = [v.image_seconds for v in deits]
        batch = planning.batch_for_time(batch, seconds, rounds + 2, min(FIRST_RESULT, self.left()))
        batch, _ = planning.halve_until_it_fits(
            batch, lambda batch: self._warm_all(deits, batch), self.progress.say
        )
        speeds = []
        taken = self.rounds(deits, rounds, [1] * len(deits), "preliminary")
        for contender, samples in zip(deits, taken, strict=True):
            median = spread(samples).median
            contender.image_seconds = median / batch
            speeds.append(f"{contender.label} {batch / median:.4g} img/s")
        self.inputs.forget()
        what = f"preliminary, {rounds} rounds at batch {batch}: "
        self.progress.announce(what + ", ".join(speeds))

    # Rounds ---------------------------------------------------------------------------------

    def final(self) -> None:
        """The rounds that are reported: all finalists interleaved."""
        s = self.settings
        if s.peak is None:
            self.progress.doing("measuring the device's matrix-product peak")
            self.peak.measure()
        times = [c.image_seconds * c.batch for c in self.finalists]
        if s.protocol == "deit2021":
            cost = sum(times)
            affordable = int(self.left() / cost) if math.isfinite(self.left()) else s.rounds
            plan = planning.Rounds(max(1, min(s.rounds, affordable)), (1,) * len(times), cost)
        elif s.latency:
            plan = planning.plan_latency(times, s.seconds or LATENCY_SECONDS, self.left())
        else:
            seconds = s.seconds or (5.0 if s.device.type == "cuda" else 40.0)
            plan = planning.plan_rounds(times, seconds, self.left())
        graphs = compiling.graphs()
        with neighbour.busy_core() if s.neighbour else contextlib.nullcontext():
            samples = self.rounds(self.finalists, plan.rounds, plan.calls, "timing")
        if compiling.graphs() != graphs:
            self.note("something was compiled within the rounds: compiled figures are too low")
        for contender, taken, calls in zip(self.finalists, samples, plan.calls, strict=True):
            contender.samples, contender.calls = taken, calls
        done = len(samples[0])
        if s.protocol == "deit2021" and done < s.rounds:
            self.note(f"the protocol's 30 runs were cut to {done} by the budget")
        if s.peak is None:
            self.peak.measure()

    def rounds(
        self, contenders: Sequence[Contender], rounds: int, calls: Sequence[int], what: str
    ) -> list[list[float]]:
        """Seconds a batch, in interleaved rounds; fewer than asked where the budget runs out.

        `calls[i]` consecutive calls make a sample of contender i; `what` names the step.
        """
        began = time.perf_counter()
        pause = not all(contender.counted for contender in contenders)

        def sample(contender: Contender, count: int, turn: int) -> float:
            images = self.inputs.get(contender, contender.batch, turn)
            if pause:
                time.sleep(PAUSE)
            if self.settings.device.type == "cuda" or self.settings.latency:
                self.call(contender, images)  # clocks and caches as this contender leaves them
            return self._measure(contender, images, count)

        def enough(done: int) -> bool:
            each = (time.perf_counter() - began) / done
            if what == "timing":
                self.progress.left(min(each * (rounds - done), self.left()) + self.reserve)
            self.progress.doing(f"{what} {len(contenders)} contenders", f"round {done} of {rounds}")
            # Quartiles want three rounds, unless the run is about to overrun its budget badly.
            return self.left() < each and (done >= 3 or self.left() < -2 * self.reserve)

        steps = [
            lambda turn, c=contender, n=count: sample(c, n, turn)
            for contender, count in zip(contenders, calls, strict=True)
        ]
        self.progress.doing(f"{what} {len(contenders)} contenders", f"{rounds} rounds")
        return interleave(steps, rounds, before=self.inputs.refresh, enough=enough)
