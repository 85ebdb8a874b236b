"""What a pair shows, in one sentence: faster, slower, equal or nothing done, and how near the videos are."""

from __future__ import annotations

from statistics import median

from ..errors import AccelError
from ..methods import METHODS
from ..runtime.presets import RUN_SETTINGS, required_settings
from ..runtime.repeat import reference_of

SAME_SPEED = 0.05  # a ratio this near to 1 is no difference: two equal runs differ by as much
NEARNESS = (  # SSIM from which on a sentence holds
    (0.99, "hardly differs from the reference"),
    (0.95, "differs a little from the reference"),
    (0.85, "differs visibly from the reference"),
    (-1.0, "is another one than the reference"),
)


def verdict(report: dict) -> str:
    """One sentence about a pair, from the content of its `run.json`."""
    if idle := idle_reason(report):
        steps, other = report["steps"], reference_of(report)["steps"]
        own = ("It", "was") if steps == other else (f"Its {steps} steps instead of {other}", "were")
        return f"{idle}. {_speed(report, *own)}, and {_likeness(report)}."
    return f"{_speed(report, subject(report))}, and {_likeness(report)}."


def subject(report: dict) -> str:
    """What was compared with the reference: the methods' titles, else the solver or the number of steps."""
    if report["methods"]:
        return " + ".join(METHODS[name].title if name in METHODS else name for name in report["methods"])
    steps = f"{report['steps']} step{'s' * (report['steps'] != 1)}"
    solver = report.get("solver", "default")
    return f"The {solver} solver in {steps}" if solver != "default" else f"The model in {steps}"


def idle_reason(report: dict) -> str:
    """A clause that says that the candidate's methods saved nothing, and why; empty if they did something."""
    if not report["methods"]:
        reference = reference_of(report)
        same = all(reference.get(key) == report.get(key, reference.get(key)) for key in (*RUN_SETTINGS, "methods"))
        return "Both runs have the same settings and no method was on" if same else ""
    trace = report["trace"]
    idle = all(action == "compute" for _, _, _, action, _ in trace["events"])
    if not idle or trace["summary"]["flops_ratio"] < 0.999 or _saves_steps(report["methods"]):
        return ""
    reasons = [text for text in trace["summary"]["messages"] if " does nothing: " in text or " is off: " in text]
    because = f", because {'; '.join(_reason(text) for text in reasons)}" if reasons else ""
    return f"{subject(report)} computed everything and saved nothing{because}"


def _saves_steps(methods: dict[str, dict]) -> bool:
    """Whether there is a student among the methods, which computes in full what it computes."""
    try:
        return bool(required_settings(methods))
    except AccelError:  # methods of an earlier version
        return False


def _reason(message: str) -> str:
    """What stands after the colon of "FasterCache does nothing: at these settings ..."."""
    return message.partition(": ")[2].rstrip(".")


def _speed(report: dict, name: str, was: str = "was") -> str:
    """How long the candidate took, as a clause whose subject is `name`."""
    ratio, times = report["speedup_denoise"], [median(report[side]["denoise"]) for side in "ba"]
    took = f"{times[0]:.2f} s of denoising instead of {times[1]:.2f} s"
    low, high = report.get("speedup_range", (ratio, ratio))
    if abs(ratio - 1) < SAME_SPEED or (low < 1 < high):
        return f"{name} took as long as the reference ({took}, no difference beyond chance)"
    if ratio > 1:
        return f"{name} {was} {ratio:.{1 if ratio >= 10 else 2}f} times as fast ({took})"
    work = report["work_ratio"]
    although = f", although it computed {work:.0%} of the work" if work < 1 - SAME_SPEED else ""
    return f"{name} {was} slower: {ratio:.2f} times the speed ({took}{although})"


def _likeness(report: dict) -> str:
    if report["bit_equal"]:
        return "its video is identical to the reference, bit for bit"
    if report["ssim"] is None:
        return "its video has another size than the reference, so the two are not compared"
    words = next(words for least, words in NEARNESS if report["ssim"] >= least)
    return f"its video {words} (SSIM {report['ssim']:.3f})"
