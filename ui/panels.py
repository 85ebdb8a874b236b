"""Small parts of the page as HTML: notes, the live panes and the metric cards."""

from __future__ import annotations

from statistics import median

from markupsafe import Markup

from accel.evaluation.metrics import metric_texts
from ui.templating import render
from ui.timeline import timeline

EMPTY_PANE = ""
READ_ALOUD = '<div role="status">${value || ""}</div>'  # template of a `gr.HTML` whose changes screen readers speak


def note(text: str, bad: bool = False) -> Markup:
    """A message above the videos; a bad one is marked as an error."""
    return render("note", text=text, bad=bad)


def waiting_pane(title: str, status: str) -> Markup:
    """The pane of a run that has not started or needs none."""
    return render("pane", title=title, steps=1, done=0, status=status, image=None)


def pane(title: str, done: int, steps: int, ms: float, work: float, image: str, trace: dict) -> Markup:
    """The pane of a run: step, ms/step, time left, computed share of the work, preview and timeline.

    `image` is a data URI, `trace` is `Trace.to_json()` or empty.
    """
    left = ms / 1000 * (steps - done)
    status = f"step {done} / {steps} · {ms:.0f} ms/step · {left:.1f} s left · {work:.0%} of these steps' work"
    return render("pane", title=title, steps=steps, done=done, status=status, image=image, timeline=timeline(trace))


def metric_cards(report: dict) -> Markup:
    """The metrics of a pair as cards, its stage times, and the conditions it was measured under."""
    r = report
    when = r.get("baseline_measured_at")
    against = f", baseline measured earlier ({when})" if when else ""
    cards = [
        (f"{r['speedup_denoise']:.2f}×", "speed of denoising" + against),
        (f"{r['speedup_total']:.2f}×", "speed end to end" + against),
        (f"{r['work_ratio']:.0%}", "of the work computed (FLOPs)"),
        *metric_texts(r),
    ]
    stages = {"baseline": _stage_times(r["a"]), "accelerated": _stage_times(r["b"])}
    return render("metric_cards", cards=cards, stages=stages, conditions=_conditions(r))


def _stage_times(seconds: dict[str, list[float]]) -> str:
    return " · ".join(f"{stage} {median(times):.2f} s" for stage, times in seconds.items())


def _conditions(report: dict) -> str:
    """Where and how often a pair was measured, and on which model."""
    recorded = f"recorded, measured {report['measured']}: " if report.get("measured") else ""
    toy = report["model"].endswith("tiny-wan")
    model = "toy model: shows the mechanism, not what you get on Wan 1.3B" if toy else report["model"]
    n = len(report["b"]["denoise"])
    return f"{recorded}{report['device']}, {report['threads']} threads, {report['dtype']}, n={n}; {model}"
