"""What happened in a run, as data: one event per (step, branch, layer), times, bytes held by methods, counted FLOPs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["compute", "reuse", "rebuild", "reduce", "predict"]
DENOISER = "denoiser"  # the layer name of a full transformer call


@dataclass(frozen=True)
class Step:
    """Where the denoising loop stands: step `index` of `count`, this and the next sigma, and the guidance branch."""

    index: int
    count: int
    sigma: float
    sigma_next: float
    branch: str  # cond | uncond


@dataclass(frozen=True)
class Event:
    """What a layer did in one branch of one step.

    `compute_fraction` is the share of its FLOPs that was computed; above 1 where a method computed something extra.
    """

    step: int
    branch: str
    layer: str
    action: Action
    compute_fraction: float


@dataclass
class Timer:
    """Adds up the seconds spent inside it. It does not synchronise: on a GPU it sees only the kernel launches."""

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
    sigmas: dict[int, float] = field(default_factory=dict)  # by step
    milliseconds: dict[int, float] = field(default_factory=dict)  # of the transformer, by step
    messages: list[str] = field(default_factory=list)  # for the user, each once
    flops: dict[str, int] = field(default_factory=dict)  # of one full call, by layer
    method_data: dict[str, dict] = field(default_factory=dict)  # what only one method reports, JSON-ready, by method
    started: float = 0.0  # clock reading at the first transformer call
    estimated_bytes: int = 0  # that the methods expected to hold
    peak_bytes: int = 0  # the most that all methods held at once
    memory_by_method: dict[str, int] = field(default_factory=dict)  # bytes held at present

    def begin(self) -> None:
        """Clear the record: a new run starts."""
        for record in (self.events, self.sigmas, self.milliseconds, self.messages, self.method_data):
            record.clear()
        self.memory_by_method.clear()
        self.estimated_bytes = self.peak_bytes = 0

    def record(self, step: Step, layer: str, action: Action, compute_fraction: float | None = None) -> None:
        """Store an event. The host records every computation, which never replaces what a method has recorded."""
        key, computed = (step.index, step.branch, layer), action == "compute"
        if not computed or compute_fraction is not None or key not in self.events:
            fraction = float(computed) if compute_fraction is None else compute_fraction
            self.events[key] = Event(*key, action, fraction)

    def add_message(self, text: str) -> None:
        """Store something that the user should read, once."""
        if text not in self.messages:
            self.messages.append(text)

    def set_memory(self, method: str, nbytes: int) -> None:
        """Set how many bytes a method holds at present, and update the peak over all methods."""
        self.memory_by_method[method] = nbytes
        self.peak_bytes = max(self.peak_bytes, sum(self.memory_by_method.values()))

    def reserve_memory(self, method: str, nbytes: int) -> None:
        """Set the bytes that a method holds for the whole run, and add them to the estimate."""
        self.estimated_bytes += nbytes
        self.set_memory(method, nbytes)

    def discard(self, step: Step, layers: Iterable[str]) -> None:
        """Remove the events of layers that this step did not reach."""
        for layer in layers:
            self.events.pop((step.index, step.branch, layer), None)

    def flops_computed_and_full(self) -> tuple[int, int]:
        """FLOPs that were computed, and FLOPs of the same calls without any method."""
        calls = [e for e in self.events.values() if e.layer == DENOISER]
        per_call = self.flops.get(DENOISER, 0)
        saved = sum((1 - e.compute_fraction) * self.flops.get(e.layer, 0) for e in self.events.values())
        return round(len(calls) * per_call - saved), len(calls) * per_call

    def summary(self) -> dict:
        """Counts by action, computed share of the FLOPs, bytes and messages: JSON-ready."""
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
        """The whole trace, JSON-ready: summary, one row per step, and every event but computed attentions."""
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
