"""A few iterations of MeanFlow's second stage and of a predictor, in one of several processes: FOLDER PROCESSES."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import build_pipe, random_wan
from test_teach_meanflow import timed

from accel.families import wan
from accel.methods.disca.predictor import Predictor
from accel.students.interval_embedding import IntervalEmbedder
from accel.training import part_ways
from accel.training.feature_probe import Watched
from accel.training.loop import Recipe, fit
from accel.training.networks import Copies
from accel.training.tasks.meanflow_distillation import Course, MeanFlowTask
from accel.training.tasks.predictor_fit import Lessons, PredictorTask

torch.set_num_threads(1)


def main(folder: Path, processes: int) -> None:
    """Two iterations of each on CPU; each process writes the weights that it ends with."""
    state = PartialState(cpu=True)
    assert state.num_processes == processes
    recipe, share = Recipe(steps=2, lr=1e-2, warmup=1, ema=0.0), (state.process_index, state.num_processes)
    ground = timed(build_pipe(), 4)
    model = random_wan()
    model.condition_embedder = IntervalEmbedder(model.condition_embedder)
    course = Course(base_steps=4, steps=(4, 2), guidance=(2, 5), longest=0.5, slots=4, hop=1, warm=1)
    mean = MeanFlowTask(recipe, course, Copies(model), ground, share)
    mean.stage = 1
    torch.manual_seed(0)
    lessons = Lessons(steps=4, guidance=(2, 5), slots=4, full=(2, 3), strides=(1,))
    learn = PredictorTask(recipe, lessons, Watched(model), Predictor(wan, model, "plain", 1), ground, (3, 2, 2), share)
    learn.stagger()
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
    part_ways()
