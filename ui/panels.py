"""Small parts of the page as HTML: notes, the headline figures and the metric cards."""

from __future__ import annotations

from typing import NamedTuple

from markupsafe import Markup

from accel.evaluation.metrics import METRICS, metric_texts
from accel.evaluation.pair_report import conditions
from ui.templating import render

READ_ALOUD = '<div role="status">${value || ""}</div>'  # template of a `gr.HTML` whose changes screen readers speak
HEADLINE_METRICS = ("ssim", "psnr", "vmaf")  # those that were measured


class Figure(NamedTuple):
    """A large value and what it says."""

    value: str
    about: str


def note(text: str, bad: bool = False) -> Markup:
    """A message in one line; a bad one is marked as an error, an empty one is not shown."""
    return render("note", text=text, bad=bad) if text else Markup()


def unexpected(error_id: str) -> str:
    """What a visitor is told of an error that is no refusal; the server's log has the rest."""
    return f"An unexpected error occurred. The server's log has it as error {error_id}."


def headline(report: dict) -> Markup:
    """The figures that are looked at first: speed-up, work, quality, memory."""
    when = report.get("baseline_measured_at")
    low, high = report["speedup_range"]
    n = len(report["b"]["denoise"])
    spread = f"{low:.2f} to {high:.2f}, n={n}" if n > 1 else "n=1"
    figures = [
        Figure(f"{report['speedup_denoise']:.2f}×", f"as fast, {spread}" + (f"; reference of {when}" if when else "")),
        Figure(f"{report['work_ratio']:.0%}", "of the work"),
    ]
    if report.get("bit_equal"):
        figures.append(Figure("identical", "every pixel is equal"))
    else:
        figures += [Figure(METRICS[m].format(report[m]), _short(m, report))
                    for m in HEADLINE_METRICS if report.get(m) is not None]  # fmt: skip
    if report.get("adherence_b") is not None:
        about = f"of the prompt read back; reference {report['adherence_a']:.0%}"
        figures.append(Figure(f"{report['adherence_b']:.0%}", about))
    return render("headline", figures=figures)


def _short(metric: str, report: dict) -> str:
    worst = report.get("ssim_worst")
    return f"SSIM, worst frame {worst:.3f}" if metric == "ssim" and worst is not None else METRICS[metric].title


def metric_cards(report: dict) -> Markup:
    """All metrics of a pair, and the conditions they were measured under."""
    held = report["trace"]["summary"].get("peak_bytes", 0)
    cards = [
        Figure(f"{report['speedup_total']:.2f}×", "as fast end to end"),
        Figure(f"{report['efficiency']:.2f}", "efficiency: speed-up relative to the saved work"),
        *(Figure(*texts) for texts in metric_texts(report)),
        Figure(f"{held / 2**20:.1f} MiB", "held by the methods at most"),
    ]  # fmt: skip
    return render("metric_cards", cards=cards, conditions=conditions(report))
