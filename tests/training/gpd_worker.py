"""A few iterations of a distillation, in one of several processes: python gpd_worker.py FOLDER PROCESSES."""

import json
import sys
from pathlib import Path

import torch
from support import build_pipe, words_of

from accel.training import shutdown_distributed
from accel.training.loop import fit
from accel.training.networks import FullNetworks
from accel.training.optim import OptimConfig
from accel.training.rollouts import RolloutContext
from accel.training.tasks.gpd_distillation import GpdConfig, GpdTask

torch.set_num_threads(1)


def main(folder: Path, processes: int) -> None:
    """Leaves the losses (in `log.jsonl`) and the weights (in `state.pt`) in the folder."""
    from accelerate import PartialState

    state, n = PartialState(cpu=True), 4
    assert state.num_processes == processes
    levels = 1 - torch.arange(n + 1, dtype=torch.float64) / n
    context = RolloutContext(
        encode=words_of,
        prompts=lambda rng: "a" * rng.randrange(1, 9), levels=levels, times=1000 * levels[:-1], shape=(4, 3, 8, 8),
    )  # fmt: skip
    optim = OptimConfig(steps=20, lr=1e-3, warmup=1, ema=0.0)
    config = GpdConfig(trajectories=4, base_steps=n, horizons=(1,))
    task = GpdTask(
        optim, config, FullNetworks(build_pipe().transformer), context, (state.process_index, state.num_processes)
    )
    fit(task, folder, minutes=None, resume=False)
    print(json.dumps(task.trajectories.index.tolist()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    shutdown_distributed()
