"""What the stages of a distillation need of a task, and what tasks with a guided teacher share."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from ..loop import Task
from ..networks import Networks
from ..optimizer import OptimConfig
from ..rollouts import RolloutContext, TrajectoryPool


class StagedTask(Task, Protocol):
    """A task of several stages, each of which starts from the student of the previous one."""

    stage: int
    nets: Networks
    context: RolloutContext
    keep_best: bool  # whether a stage ends with the student of the lowest validation error
    diverged: bool  # whether the stage should end for a reason that the task itself has found

    @property
    def stages(self) -> dict[str, int]: ...  # name -> base steps of the jump that its student is validated with
    def spread_timesteps(self) -> None: ...  # called before the very first iteration


class StudentTask:
    """A student, its teacher and the trajectories that they are compared on."""

    def __init__(
        self, optim: OptimConfig, nets: Networks, context: RolloutContext, trajectories: int,
        rank_and_world: tuple[int, int],
    ):  # fmt: skip
        """`trajectories` counts those of all processes."""
        self.optim, self.nets, self.context, self.stage = optim, nets, context, 0
        self.empty = context.encode([""])  # embedding (1, n, d) of the empty prompt
        self.trajectories = TrajectoryPool(context, trajectories, rank_and_world, optim.seed)

    @property
    def module(self) -> nn.Module:
        """The student, which is trained."""
        return self.nets.module

    def matrices(self) -> list[nn.Parameter]:
        """Parameters of the student that Muon trains."""
        return self.nets.matrices()

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs besides the weights: the trajectories."""
        return self.trajectories.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore this process's trajectories from those of all processes."""
        self.trajectories.load_state_dict(state)
