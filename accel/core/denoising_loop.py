"""Where a pipeline's denoising loop stands: the noise level of each step, and the run, step and branch of each call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AccelError


def is_flow(scheduler) -> bool:
    """Whether latents are (1 - sigma) signal + sigma noise, and not sqrt(1 - sigma^2) signal + sigma noise."""
    sigmas, config = getattr(scheduler, "sigmas", None), scheduler.config
    known = config.get("use_flow_sigmas") or config.get("invert_sigmas")
    return sigmas is not None and bool(known or torch.as_tensor(sigmas).max() <= 1)  # it may lie on a GPU


def noise_levels(scheduler) -> list[float]:
    """Sigma of each of a scheduler's timesteps, falling from near 1, and at last 0.

    A flow model's sigma is the share of noise. Where a scheduler knows only the signal's variance alpha, it is
    sqrt(1 - alpha). Raises AccelError for a scheduler that tells neither.
    """
    times, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) > len(times):
        levels = [float(sigma) for sigma in sigmas[: len(times) + 1]]
        if scheduler.config.get("invert_sigmas"):  # Mochi counts the signal
            return [1 - level for level in levels]
        return levels if is_flow(scheduler) else [level / (1 + level**2) ** 0.5 for level in levels]
    if not hasattr(scheduler, "alphas_cumprod"):
        raise AccelError(
            f"{type(scheduler).__name__} tells no noise levels: choose a scheduler with sigmas, such as "
            "FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler or DDIMScheduler"
        )
    return [float((1 - scheduler.alphas_cumprod[int(time)]) ** 0.5) for time in times] + [0.0]


@dataclass(frozen=True)
class CallPosition:
    """Where a call belongs: step `index` of `count`, its position in the scheduler's list, and its branch."""

    index: int
    count: int
    position: int
    branch: str
    begins: bool  # a new run
    has_new_text: bool  # a callback has exchanged this branch's text in mid-run


class CallTracker:
    """Places each transformer call.

    A run begins where the scheduler has a new list of timesteps, or the loop goes back in it. A step begins with a new
    timestep, or where a branch comes again (a solver may evaluate one timestep twice). A branch has its name from the
    pipeline; where that gives none, it is a text embedding: all pipelines call cond first.
    """

    def __init__(self):
        self._schedule: Tensor | None = None
        self._index, self._time, self._skipped, self._count = -1, 0.0, 0, 0
        self._seen: set[str] = set()  # branches of this step
        self._texts: dict[str, tuple[Tensor, int]] = {}  # by branch, with how often they had been changed in place

    def locate(
        self, pipe, timestep: Tensor, text: Tensor, name: str | None, is_guided: bool, by_pipeline: bool = True
    ) -> CallPosition:
        """The place of a call of a pipeline; `name` is that of its cache context.

        `by_pipeline`: it makes the call, and not a loop of the user's own, of which the pipeline knows nothing. Raises
        AccelError for a loop that makes more steps than the scheduler has.
        """
        times = pipe.scheduler.timesteps
        time = float(timestep.max())  # with one timestep per token, those of a given first frame are 0
        begins = times is not self._schedule or self._goes_back(time, times)
        if begins:
            self._begin(pipe, times, by_pipeline)
        branch = name.removeprefix("pred_") if name else self._branch_of(text, begins or time != self._time, is_guided)
        if not begins and time == self._time and branch in self._seen and not self._comes_twice(times, timestep.dtype):
            raise AccelError(
                f"this pipeline runs the {branch} branch more than once in a step, as guidance by skipped layers does: "
                "its calls cannot be told apart"
            )
        if begins or time != self._time or branch in self._seen:
            self._index, self._time, self._seen = self._index + 1, time, set()
        if self._index == self._count:  # the same short list once more
            self._begin(pipe, times, by_pipeline)
            self._index, begins = 0, True
        self._seen.add(branch)
        has_new_text = branch in self._texts and has_changed(*self._texts[branch], text)
        self._texts[branch] = text, num_changes(text)
        return CallPosition(self._index, self._count, self._skipped + self._index, branch, begins, has_new_text)

    def _begin(self, pipe, times: Tensor, by_pipeline: bool) -> None:
        scheduled = len(times)
        planned = (by_pipeline and getattr(pipe, "num_timesteps", scheduled)) or scheduled
        if planned > scheduled:
            raise AccelError(
                f"this pipeline makes {planned} steps of a schedule of {scheduled}, frames one after the other: "
                "what a step is cannot be told; set ar_step to 0"
            )
        self._count = planned
        self._skipped = scheduled - self._count  # video to video starts later in the list
        self._schedule, self._index, self._seen, self._texts = times, -1, set(), {}

    def _comes_twice(self, times: Tensor, dtype: torch.dtype) -> bool:
        """Whether the next step has the timestep of this one, as the model is given it, or the same list begins again.

        Half precision gives one number to several timesteps.
        """
        following = self._skipped + self._index + 1
        return following >= len(times) or bool(times[following].to(dtype) == times[following - 1].to(dtype))

    def _goes_back(self, time: float, times: Tensor) -> bool:
        rising = len(times) > 1 and bool(times[-1] > times[0])
        return self._index >= 0 and (time < self._time if rising else time > self._time)

    def _branch_of(self, text: Tensor, new_step: bool, is_guided: bool) -> str:
        """The branch whose text this is; a text that a callback has exchanged belongs to the branch that is due.

        Both branches of guidance can have one text, such as an empty one: then it is the branch that is due as well.
        """
        for branch, (known, _) in self._texts.items():
            if is_same(known, text):
                is_second = is_guided and not new_step and self._seen == {"cond"}
                return "uncond" if is_second else branch
        return "cond" if new_step or "cond" not in self._seen else "uncond"


def has_changed(before: Tensor, changes: int, now: Tensor) -> bool:
    """Whether a tensor has other values than before, when it had been changed in place so often."""
    return not is_same(before, now) or (before.data_ptr() == now.data_ptr() and num_changes(now) != changes)


def num_changes(x: Tensor) -> int:
    """How often a tensor has been changed in place; under inference mode nobody counts."""
    return 0 if x.is_inference() else x._version


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same values; of one storage they are not compared."""
    return a is b or (a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b)))
