"""Fixtures: a random Wan of the real class (two blocks, width 24) in a stock pipeline, and runs of it."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import get_args

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests run on the CPU, also where there is a GPU

import pytest
import torch
from diffusers import WanPipeline
from support import build_pipe, euler_as_fitted_solver, make_meanflow, make_predictor, random_wan

from accel.methods import FittedSolver
from accel.runtime.models import load_pipeline
from accel.students.weights import fingerprint
from accel.training.networks import FullNetworks
from accel.training.stages import store

torch.set_num_threads(1)  # test processes run side by side


@pytest.fixture
def pipe() -> WanPipeline:
    return build_pipe()


@pytest.fixture
def installed_neutral(monkeypatch):
    """Neutral methods are put into the model all the same: what is tested is that their wrappers change nothing."""
    monkeypatch.setattr("accel.runtime.apply._announced", lambda method, host, trace: method.apply(host, trace))


@pytest.fixture(scope="session")
def tiny_wan() -> WanPipeline:
    """The shipped model, loaded once for each test process; leave it as it is."""
    return load_pipeline()


@pytest.fixture
def two_models() -> WanPipeline:
    """As Wan 2.2: a second transformer takes over below a sigma."""
    return build_pipe(transformer_2=random_wan(1), boundary_ratio=0.7)


@pytest.fixture(scope="session")
def student_files(tmp_path_factory) -> Path:
    """A folder with random students of all kinds for the pipeline `pipe`, and predictors of the model itself."""
    pipe, folder = build_pipe(), tmp_path_factory.mktemp("students")
    nets = FullNetworks(pipe.transformer)
    nets.module.proj_out.weight.data.mul_(0.5)
    for n in (6, 8, 12, 16, 24, 48):
        sigmas = [1 - i / n for i in range(n + 1)]
        facts = {
            "sigmas": sigmas,
            "timesteps": [1000 * s for s in sigmas[:-1]],
            "base_fingerprint": fingerprint(pipe.transformer),
        }
        store(nets, folder / f"gpd-N{n}", "gpd.json", {"steps": n, **facts})
    for n in get_args(FittedSolver.model_fields["steps"].annotation)[1:]:
        file = folder / "fittedsolver" / f"{n}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(euler_as_fitted_solver(pipe, n, uncond_steps=range(0, n, 2)).model_dump_json())
    make_meanflow(pipe, folder / "meanflow")
    for form in ("residual", "paper", "guided-base"):
        make_predictor(pipe, folder / "predictor" / form, form)
    return folder


@pytest.fixture
def students(pipe, tmp_path, student_files):
    """The same in the folder of the pipeline's model; a test may change its files."""
    shutil.copytree(student_files, tmp_path, dirs_exist_ok=True)
    pipe.register_to_config(_name_or_path=str(tmp_path))


@pytest.fixture
def sample():
    """sample(pipe, steps=, guidance=, height=, on_step=, attention=, inputs=): the final latents of one run."""

    def run(
        pipe, steps=20, guidance=4.0, height=64, on_step=None, seed=0, attention=None, inputs=("latents",)
    ) -> torch.Tensor:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        words = torch.randn(2, 1, 6, 16, generator=torch.Generator().manual_seed(99))
        negative = words[1] if guidance > 1 else None
        return pipe(
            prompt_embeds=words[0], negative_prompt_embeds=negative, height=height, width=64, num_frames=5,
            num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="latent",
            callback_on_step_end=on_step, attention_kwargs=attention, callback_on_step_end_tensor_inputs=list(inputs),
        ).frames  # fmt: skip

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the groups that stay in one process: at the end, the other process would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take all imported modules out of the garbage collector's rounds, each of which took a second with them."""
    gc.collect()
    gc.freeze()
