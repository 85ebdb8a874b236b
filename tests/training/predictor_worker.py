"""A few iterations of MeanFlow's second stage and of a predictor, in one of several processes: FOLDER PROCESSES."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from support import build_pipe, random_wan, timed

from accel.families.wan import Wan
from accel.methods.disca.predictor import Predictor
from accel.students.interval_embedding import IntervalEmbedder
from accel.training import shutdown_distributed
from accel.training.feature_probe import FeatureProbe
from accel.training.loop import fit
from accel.training.networks import FullNetworks
from accel.training.optim import OptimConfig
from accel.training.tasks.meanflow_distillation import MeanFlowConfig, MeanFlowTask
from accel.training.tasks.predictor_fit import PredictorConfig, PredictorTask

torch.set_num_threads(1)


def main(folder: Path, processes: int) -> None:
    """Two iterations of each on CPU; each process writes the weights that it ends with."""
    state = PartialState(cpu=True)
    assert state.num_processes == processes
    optim, share = OptimConfig(steps=2, lr=1e-2, warmup=1, ema=0.0), (state.process_index, state.num_processes)
    context = timed(build_pipe(), 4)
    model = random_wan()
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    config = MeanFlowConfig(
        base_steps=4, steps=(4, 2), guidance=(2, 5), max_interval=0.5, trajectories=4, max_stride=1, warm=1
    )
    mean = MeanFlowTask(optim, config, FullNetworks(model), context, share)
    mean.stage = 1
    torch.manual_seed(0)
    config = PredictorConfig(steps=4, guidance=(2, 5), trajectories=4, full=(2, 3), strides=(1,))
    learn = PredictorTask(
        optim, config, FeatureProbe(model), Predictor(Wan(), model, "paper", 1), context, (3, 2, 2), share
    )
    learn.spread_timesteps()
    learn.stage = 1
    before = [p.detach().clone() for p in learn.module.predictor.parameters()]
    for name, task in (("mean", mean), ("predictor", learn)):
        fit(task, folder / name, minutes=None, resume=False)
    assert not all(torch.equal(a, b) for a, b in zip(before, learn.module.predictor.parameters(), strict=True))
    ends = {
        name: [p.detach() for p in task.module.parameters()] for name, task in (("mean", mean), ("predictor", learn))
    }
    torch.save(ends, folder / f"{state.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    shutdown_distributed()
