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
    layer: str
    action: Action
    compute_fraction: float


@dataclass
class Timer:
    """Adds up the seconds spent inside it; on a GPU these are the launches alone."""

    seconds: float = 0.0
    began: float = 0.0

    def __enter__(self) -> Timer:
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
    messages: list[str] = field(default_factory=list)
    flops: dict[str, int] = field(default_factory=dict)  # of one full call, by site
    method_data: dict[str, dict] = field(
        default_factory=dict
    )  # what a method alone has to tell, JSON-ready, by its name
    started: float = 0.0  # clock reading at the first transformer call
    estimated_bytes: int = 0
    peak_bytes: int = 0  # the most that was held at once
    memory_by_method: dict[str, int] = field(default_factory=dict)  # now, by method

    def begin(self) -> None:
        """Forget the last run: a new one starts."""
        for record in (
            self.events,
            self.sigmas,
            self.milliseconds,
            self.messages,
            self.method_data,
            self.memory_by_method,
        ):
            record.clear()
        self.estimated_bytes = self.peak_bytes = 0

    def record(self, step: Step, layer: str, action: Action, compute_fraction: float | None = None) -> None:
        """Note what was done. A computation is noted by the host, unless a method has said more about it."""
        key, plain = (step.index, step.branch, layer), action == "compute"
        if not plain or compute_fraction is not None or key not in self.events:
            self.events[key] = Event(*key, action, float(plain) if compute_fraction is None else compute_fraction)

    def add_message(self, text: str) -> None:
        """Something the user should read, once."""
        if text not in self.messages:
            self.messages.append(text)

    def set_memory(self, method: str, held: int) -> None:
        """Bytes that a method holds now; what counts is the most that all held at once."""
        self.memory_by_method[method] = held
        self.peak_bytes = max(self.peak_bytes, sum(self.memory_by_method.values()))

    def reserve_memory(self, method: str, held: int) -> None:
        """Bytes that a method holds for the whole run, known before it starts."""
        self.estimated_bytes += held
        self.set_memory(method, held)

    def discard(self, step: Step, layers: Iterable[str]) -> None:
        """Forget what was noted of sites that this step did not reach."""
        for layer in layers:
            self.events.pop((step.index, step.branch, layer), None)

    def flops_computed_and_full(self) -> tuple[int, int]:
        """FLOPs computed, and FLOPs of the same calls without any method."""
        calls = [e for e in self.events.values() if e.layer == DENOISER]
        whole = self.flops.get(DENOISER, 0)
        saved = sum((1 - e.compute_fraction) * self.flops.get(e.layer, 0) for e in self.events.values())
        return round(len(calls) * whole - saved), len(calls) * whole

    def summary(self) -> dict:
        """Counts by action, computed share of the work, bytes, notes: JSON-ready."""
        computed, full = self.flops_computed_and_full()
        return {
            "steps": len(self.sigmas),
            "calls": dict(Counter(e.action for e in self.events.values() if e.layer == DENOISER)),
            "attention": dict(Counter(e.action for e in self.events.values() if e.layer != DENOISER)),
            "flops": computed,
            "flops_full": full,
            "flops_ratio": computed / full if full else 1.0,
            "estimated_bytes": self.estimated_bytes,
            "peak_bytes": self.peak_bytes,
            "messages": list(self.messages),
        }

    def to_json(self) -> dict:
        """Everything, JSON-ready: the summary, one row per step and one per event that was not plain computing."""
        return {
            "summary": self.summary(),
            "method_data": self.method_data,
            "layers": sorted({e.layer for e in self.events.values()} - {DENOISER}, key=_natural),
            "steps": [
                {"index": i, "sigma": round(s, 5), "ms": round(self.milliseconds.get(i, 0.0), 2)}
                for i, s in sorted(self.sigmas.items())
            ],
            "events": [
                [e.step, e.branch, e.layer, e.action, round(e.compute_fraction, 4)]
                for e in self.events.values()
                if e.action != "compute" or e.layer == DENOISER
            ],
        }


def _natural(layer: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in layer.split("."))
