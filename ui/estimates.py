"""What a pair will take on this machine, for the line under the prompt."""

from __future__ import annotations

from accel.errors import AccelError, sentence
from ui.context import Context
from ui.side_settings import Side


def estimate_text(context: Context, settings: dict, reference: Side, candidate: Side) -> str:
    """Time and memory of both sides; why the settings cannot run; or whether the model is being loaded."""
    if missing := context.missing(settings["model"]):
        return f"This model cannot run here: {missing}."
    loaded = context.workers.pipeline(settings["model"])
    if loaded is None:
        loading = context.workers.is_loading(settings["model"])
        return "The model is being loaded." if loading else "The model is loaded when you press Run."
    from accel.runtime.estimate import estimate
    from ui.compare_job import build_side

    pipe, defaults = loaded
    try:
        a, b = (build_side(defaults, settings, side) for side in (reference, candidate))
        words = lambda run: estimate(run, pipe, context.workers.step_seconds, context.workers.work).words
        before = "generated before" if context.references.find(a) else words(a)
        expected = words(b)
    except AccelError as error:
        return sentence(error)
    return f"A: {before} · B: {expected}"
