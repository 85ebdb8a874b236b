"""A few iterations of every distillation in one of several processes: python distributed_worker.py FOLDER PROCESSES."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from support import build_pipe, gpd_task, meanflow_task, predictor_task

from accel.training.loop import fit
from accel.training.optimizer import OptimConfig
from accel.training.parts import shutdown_distributed

torch.set_num_threads(1)


def main(folder: Path, processes: int) -> None:
    """Train each task and save the weights of this process; `fit` leaves its log and state in the folder, too."""
    state = PartialState(cpu=True)
    assert state.num_processes == processes
    share = (state.process_index, state.num_processes)
    optim = OptimConfig(steps=20, lr=1e-3, warmup=1, ema=0.0)
    gpd = gpd_task(build_pipe(), 4, trajectories=4, horizons=(1,), rank_and_world=share)
    gpd.optim = optim
    fit(gpd, folder / "gpd", minutes=None, resume=False)
    if processes == 1:  # the reference of GPD alone
        return
    tasks = {
        "meanflow": meanflow_task(build_pipe(), rank_and_world=share),
        "predictor": predictor_task(build_pipe(), "paper", rank_and_world=share),
    }
    tasks["meanflow"].stage = tasks["predictor"].stage = 1
    tasks["predictor"].spread_timesteps()
    before = [p.detach().clone() for p in tasks["predictor"].module.predictor.parameters()]
    for name, task in tasks.items():
        task.optim = optim.model_copy(update={"steps": 2})
        fit(task, folder / name, minutes=None, resume=False)
    after = tasks["predictor"].module.predictor.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    weights = {name: [p.detach() for p in task.module.parameters()] for name, task in {"gpd": gpd, **tasks}.items()}
    torch.save(weights, folder / f"{state.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    shutdown_distributed()
