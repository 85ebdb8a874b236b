"""Schedulers on given sigmas, which students and fitted solvers need, and swapping one into a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..errors import AccelError, amount


class FixedSigmaEuler(FlowMatchEulerDiscreteScheduler):
    """The stock Euler scheduler on sigmas and timesteps that are given, not computed."""

    has_ended = False  # true once the context that it was made for has ended

    def __init__(self, sigmas: list[float], timesteps: list[float]):
        super().__init__()
        self.sigmas = torch.tensor(sigmas)
        self.timesteps = torch.tensor(timesteps, dtype=torch.float32)  # the stock step refuses whole numbers

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Start a run. Raises AccelError for any number of steps but that of the given timesteps."""
        if self.has_ended:  # a pipeline that was made of another one inside still has it
            raise AccelError("its scheduler is of an accel.apply that has ended: give the pipeline one of its own")
        if num_inference_steps != len(self.timesteps):
            raise AccelError(self._wrong_count(len(self.timesteps), num_inference_steps))
        # a new tensor, as of every scheduler: it tells that a run begins
        self.num_inference_steps, self.timesteps = num_inference_steps, self.timesteps.to(device, copy=True)
        self._step_index = self._begin_index = None

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True):
        """The sample at the next sigma, computed in float32, in the sample's dtype."""
        (x,) = super().step(model_output.float(), timestep, sample, return_dict=False)
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    @staticmethod
    def _wrong_count(steps: int, asked: int) -> str:
        return f"these sigmas are for {amount(steps, 'step')}, not {asked}"


class IgnoresGivenSigmas(SchedulerMixin):
    """Takes only the number of the sigmas that some pipelines give their scheduler, as LTX and HunyuanVideo do."""

    def set_timesteps(self, num_inference_steps: int | None = None, device=None, sigmas=None, mu=None) -> None:
        """Start a run of as many steps."""
        super().set_timesteps(num_inference_steps if sigmas is None else len(sigmas), device=device)


class CombiningScheduler(IgnoresGivenSigmas, FixedSigmaEuler):
    """A scheduler on given noise levels that takes each sample from a function, not from the model's output."""

    combines_outputs = True

    def __init__(self, sigmas: list[float], timesteps: list[float], combine: Callable[[int, Tensor], Tensor]):
        """`combine(step, sample)`: the sample after a step, in any dtype."""
        super().__init__(sigmas, timesteps)
        self._combine = combine

    @staticmethod
    def _wrong_count(steps: int, asked: int) -> str:
        return f"this solver was fitted for {amount(steps, 'step')}, not {asked}: set the steps to {steps}"

    def set_timesteps(
        self, num_inference_steps: int | None = None, device=None, sigmas=None, mu=None, timesteps=None
    ) -> None:
        """Start a run; of timesteps too, which LTX's pipeline of conditions gives, only the number is taken."""
        given = timesteps if sigmas is None else sigmas
        super().set_timesteps(num_inference_steps, device, given)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True, **_):
        """The sample after the present step, in the sample's dtype."""
        if self.step_index is None:
            self._init_step_index(timestep)
        x = self._combine(self.step_index, sample).to(sample.dtype)
        self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


class StudentEuler(FixedSigmaEuler):
    """The scheduler of a student's run; its class tells such a run from a baseline that is sampled with Euler."""

    @staticmethod
    def _wrong_count(steps: int, asked: int) -> str:
        return (
            f"this student makes {amount(steps, 'step')}, not {asked}: set steps to {steps}, or choose another student"
        )


@contextmanager
def use_scheduler(pipe, scheduler) -> Iterator[None]:
    """Inside the context, the pipeline samples with another scheduler."""
    before = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = before
        if isinstance(scheduler, FixedSigmaEuler):
            scheduler.has_ended = True


def is_student_run(pipe) -> bool:
    """Whether a student's weights and scheduler are in the pipeline now."""
    return isinstance(pipe.scheduler, StudentEuler) and not pipe.scheduler.has_ended
