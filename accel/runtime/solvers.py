"""The solver of a run: one of diffusers' schedulers for flow matching, in a pipeline for the time of that run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import (
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ..errors import AccelError
from ..students.euler_scheduler import FixedSigmaEuler, IgnoresGivenSigmas, use_scheduler
from .run import Run


class MultistepDPM(IgnoresGivenSigmas, DPMSolverMultistepScheduler):
    """DPM++ 2M; given sigmas are linear, to be shifted, and so are those that it begins with itself."""


class SinglestepDPM(IgnoresGivenSigmas, DPMSolverSinglestepScheduler):
    """DPM++ 2S, in the same way."""


SCHEDULERS = {
    "euler": FlowMatchEulerDiscreteScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
    "dpm++2s": DPMSolverSinglestepScheduler,
}
TAKING_SIGMAS = {DPMSolverMultistepScheduler: MultistepDPM, DPMSolverSinglestepScheduler: SinglestepDPM}


@contextmanager
def solver_of(run: Run, pipe) -> Iterator[None]:
    """Inside the context, the pipeline samples with the solver and the shift of a run; then with its own again.

    Raises AccelError where `build_scheduler` does.
    """
    if run.solver == "default" and run.shift is None:
        yield
        return
    with use_scheduler(pipe, build_scheduler(run, pipe.scheduler)):
        yield


def build_scheduler(run: Run, own):
    """The scheduler for a run of a pipeline whose own scheduler is `own`.

    Its noise levels are those of `own`; DPM++ starts at a sigma that is .0002 to .005 lower.

    Raises AccelError for a pipeline that is not made for flow matching, whose shift depends on the size, or whose noise
    levels rise or end above 0 as no other solver's do.
    """
    key = _shift_key(own)
    shift = own.config[key] if run.shift is None else run.shift
    if run.shift is None and own.config.get("use_dynamic_shifting"):
        raise AccelError("this model's flow shift depends on the size, so another solver needs one: set shift")
    shifted = {key: shift} if run.shift is None else {key: shift, "use_dynamic_shifting": False}
    if run.solver == "default" or isinstance(own, SCHEDULERS[run.solver]):
        return type(own).from_config(own.config, **shifted)
    if own.config.get("invert_sigmas"):
        raise AccelError(
            "this model counts its noise levels upwards, as no other solver does: leave solver at its default"
        )
    if run.solver != "euler" and (end := own.config.get("shift_terminal")):
        raise AccelError(
            f"this model's last step is at a noise level of {end:g}, as only euler and its own solver have it: choose "
            "one of them"
        )
    if run.solver == "euler":
        same = type(own).from_config(own.config, **shifted)
        same.set_timesteps(run.steps)
        return FixedSigmaEuler(same.sigmas.tolist(), same.timesteps.tolist())
    solver = SCHEDULERS[run.solver]
    return TAKING_SIGMAS.get(solver, solver)(
        num_train_timesteps=own.config.num_train_timesteps, prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=shift, lower_order_final=True,
    )  # fmt: skip


def schedule_shift(scheduler) -> float | None:
    """The shift of a scheduler's sigmas towards noise; None if it has none, or one that follows the video's size."""
    config = scheduler.config
    return None if config.get("use_dynamic_shifting") else config.get("flow_shift", config.get("shift"))


def _shift_key(own) -> str:
    """The name of the flow shift in the settings of a pipeline's scheduler."""
    if own.config.get("use_flow_sigmas") and own.config.get("prediction_type") == "flow_prediction":
        return "flow_shift"
    if type(own).__name__.startswith("FlowMatch") and "shift" in own.config:
        return "shift"
    raise AccelError(
        f"{type(own).__name__} is no scheduler for flow matching: leave solver and shift at their defaults"
    )
