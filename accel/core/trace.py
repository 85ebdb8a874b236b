"""What happened in a run, as data: one event per (step, branch, site), times, bytes held and counted work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["compute", "reuse", "rebuild", "reduce", "predict", "skip"]
DENOISER = "denoiser"  # the site of a whole transformer call


@dataclass(frozen=True)
class Step:
    """Where the denoising loop stands: step `index` of `count`, noise level now and next, guidance branch."""

    index: int
    count: int
    sigma: float
    sigma_next: float
    branch: str  # cond | uncond


@dataclass(frozen=True)
class Event:
    """What was done at a site in one branch of one step; `kept` is the share of its work that was computed.

    That is more than 1 where a method had something computed besides.
    """

    step: int
    branch: str
    site: str
    action: Action
    kept: float


@dataclass
class Stopwatch:
    """Adds up the seconds spent inside it; on a GPU these are the launches alone."""

    seconds: float = 0.0
    began: float = 0.0

    def __enter__(self) -> Stopwatch:
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_) -> None:
        self.seconds += time.perf_counter() - self.began


@dataclass
class Trace:
    """The record of the last run inside `accel.apply`."""

    events: dict[tuple[int, str, str], Event] = field(default_factory=dict)
    sigmas: dict[int, float] = field(default_factory=dict)
    milliseconds: dict[int, float] = field(default_factory=dict)  # of the transformer, per step
    notes: list[str] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)  # of one full call, by site
    extras: dict[str, dict] = field(default_factory=dict)  # what a method alone has to tell, JSON-ready, by its name
    started: float = 0.0  # clock reading at the first transformer call
    bytes_forecast: int = 0
    bytes_held: int = 0  # the most that was held at once
    holding: dict[str, int] = field(default_factory=dict)  # now, by method

    def begin(self) -> None:
        """Forget the last run: a new one starts."""
        for record in (self.events, self.sigmas, self.milliseconds, self.notes, self.extras, self.holding):
            record.clear()
        self.bytes_forecast = self.bytes_held = 0

    def record(self, step: Step, site: str, action: Action, kept: float | None = None) -> None:
        """Note what was done. A computation is noted by the host, unless a method has said more about it."""
        key, plain = (step.index, step.branch, site), action == "compute"
        if not plain or kept is not None or key not in self.events:
            self.events[key] = Event(*key, action, float(plain) if kept is None else kept)

    def note(self, text: str) -> None:
        """Something the user should read, once."""
        if text not in self.notes:
            self.notes.append(text)

    def hold(self, method: str, held: int) -> None:
        """Bytes that a method holds now; what counts is the most that all held at once."""
        self.holding[method] = held
        self.bytes_held = max(self.bytes_held, sum(self.holding.values()))

    def expect(self, method: str, held: int) -> None:
        """Bytes that a method holds for the whole run, known before it starts."""
        self.bytes_forecast += held
        self.hold(method, held)

    def drop(self, step: Step, sites: Iterable[str]) -> None:
        """Forget what was noted of sites that this step did not reach."""
        for site in sites:
            self.events.pop((step.index, step.branch, site), None)

    def work(self) -> tuple[int, int]:
        """FLOPs computed, and FLOPs of the same calls without any method."""
        calls = [e for e in self.events.values() if e.site == DENOISER]
        whole = self.flops.get(DENOISER, 0)
        saved = sum((1 - e.kept) * self.flops.get(e.site, 0) for e in self.events.values())
        return round(len(calls) * whole - saved), len(calls) * whole

    def summary(self) -> dict:
        """Counts by action, computed share of the work, bytes, notes: JSON-ready."""
        computed, full = self.work()
        return {
            "steps": len(self.sigmas),
            "calls": dict(Counter(e.action for e in self.events.values() if e.site == DENOISER)),
            "attention": dict(Counter(e.action for e in self.events.values() if e.site != DENOISER)),
            "flops": computed,
            "flops_full": full,
            "work": computed / full if full else 1.0,
            "bytes_forecast": self.bytes_forecast,
            "bytes_held": self.bytes_held,
            "notes": list(self.notes),
        }

    def to_json(self) -> dict:
        """Everything, JSON-ready: the summary, one row per step and one per event that was not plain computing."""
        return {
            "summary": self.summary(),
            "extras": self.extras,
            "sites": sorted({e.site for e in self.events.values()} - {DENOISER}, key=_natural),
            "steps": [
                {"index": i, "sigma": round(s, 5), "ms": round(self.milliseconds.get(i, 0.0), 2)}
                for i, s in sorted(self.sigmas.items())
            ],
            "events": [
                [e.step, e.branch, e.site, e.action, round(e.kept, 4)]
                for e in self.events.values()
                if e.action != "compute" or e.site == DENOISER
            ],
        }


def _natural(site: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in site.split("."))
