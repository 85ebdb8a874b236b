"""A scheduler on fixed noise levels, which is what a student runs on, and swapping it into a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from ..ops.flow import euler


class FixedSigmaEuler(SchedulerMixin, ConfigMixin):
    """Given noise levels, first order, as a scheduler of the stock pipeline."""

    order = 1

    @register_to_config
    def __init__(self, levels: tuple[float, ...] = (1.0, 0.0), times: tuple[float, ...] = (999.0,)):
        self.sigmas, self.timesteps = torch.tensor(levels), torch.tensor(times)

    def set_timesteps(self, num_inference_steps: int, device=None) -> None:
        """Raises ValueError for any other number of steps than the student's."""
        if num_inference_steps != len(self.timesteps):
            raise ValueError(
                f"this student makes {len(self.timesteps)} steps, not {num_inference_steps}: "
                f"set steps to {len(self.timesteps)}, or choose another student"
            )
        self.timesteps = self.timesteps.to(device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Nothing to set: a step is known by its timestep."""

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True):
        """The sample at the next level."""
        i = int((self.timesteps == timestep).nonzero()[0])
        now, then = (level.expand(len(sample)) for level in (self.sigmas[i], self.sigmas[i + 1]))
        x = euler(sample.float(), model_output.float(), now, then).to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


@contextmanager
def use_scheduler(pipe, levels: list[float], times: list[float]) -> Iterator[None]:
    """Inside, the pipeline takes its steps on these levels, by Euler."""
    own = pipe.scheduler
    pipe.scheduler = FixedSigmaEuler(tuple(levels), tuple(times))
    try:
        yield
    finally:
        pipe.scheduler = own


def is_student_run(pipe) -> bool:
    """Whether the pipeline takes a student's steps now."""
    return isinstance(pipe.scheduler, FixedSigmaEuler)


@contextmanager
def euler_sampling(pipe, steps: int) -> Iterator[None]:
    """Inside, the pipeline takes so many steps by Euler, on the noise levels and times of its own solver."""
    pipe.scheduler.set_timesteps(steps)
    with use_scheduler(pipe, pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps.tolist()):
        yield
