"""`accel train`: parts, the record of runs, and what an unfinished run leaves alone."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import UMT5EncoderModel

from accel.errors import AccelError
from accel.files import only_writer
from accel.runtime.models import TINY
from accel.training.optimizer import OptimConfig
from accel.training.parts import check_run, export_base, parent_run, train_parts
from accel.training.settings import OPTIM_CONFIGS, SETTINGS, ModelSetting
from accel.training.tasks import base_model as base
from accel.training.tasks.vae import Autoencoder, build_vae


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="unknown part 'everything'; there are vae, base, gpd, meanflow, predictor and all"
    ):
        train_parts("everything", None, False, tmp_path)


def test_a_stopped_training_changes_neither_the_shipped_model_nor_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr("accel.training.parts.ROOT", tmp_path)
    monkeypatch.setattr("accel.training.tasks.vae.CURRICULUM", ((1.0, 1, 1),))
    finished = []
    monkeypatch.setattr("accel.training.tasks.vae.finish", lambda task, folder: finished.append(folder) or {})
    monkeypatch.setitem(OPTIM_CONFIGS["small"], "vae", {"steps": 2, "lr": 1e-3, "warmup": 1})
    (tmp_path / TINY).mkdir(parents=True)
    assert train_parts("vae", 0, False, tmp_path / "out")["vae"]["step"] == 1
    assert not finished and not list((tmp_path / TINY).iterdir())
    assert train_parts("vae", None, True, tmp_path / "out")["vae"]["step"] == 2
    assert finished and [f.name for f in (tmp_path / TINY).iterdir()] == ["training.json"]


@pytest.mark.parametrize("base", ["transformer/config.json", "base/state.pt"])
def test_a_resumed_autoencoder_keeps_the_latents_that_a_base_model_knows(base, tmp_path, monkeypatch):
    """Where a base is finished or in training, but not where the autoencoder's own run has not ended."""
    monkeypatch.setattr("accel.training.parts.ROOT", tmp_path)
    tasks, out = [], tmp_path / "out"
    stopped = lambda task, *_, **__: tasks.append(task) or {"step": 1, "steps": 2}
    monkeypatch.setattr("accel.training.parts.fit", stopped)
    vae = build_vae(8)
    vae.save_pretrained(tmp_path / TINY / "vae")
    train_parts("vae", None, True, out)
    for file in (tmp_path / TINY / base, out / base):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    train_parts("vae", None, True, out)
    (out / "vae").mkdir(parents=True, exist_ok=True)
    torch.save({"module": Autoencoder(vae).state_dict()}, out / "vae" / "state.pt")
    train_parts("vae", None, True, out)
    assert [task.keeps_latents for task in tasks] == [False, True, False]


def test_an_export_writes_the_ema_weights_of_an_unfinished_base(tmp_path, monkeypatch):
    monkeypatch.setattr("accel.training.parts.ROOT", tmp_path)
    monkeypatch.setattr("accel.training.fast_blocks.can_compile", lambda device: False)  # for one step
    monkeypatch.setattr(base, "CURRICULUM", ((1.0, ((1, 2),)),))
    monkeypatch.setitem(SETTINGS, "small", ModelSetting(16, 5, fps=8, clips=2, save_every=9))
    monkeypatch.setitem(OPTIM_CONFIGS["small"], "base", {"steps": 9, "lr": 1e-3, "warmup": 1})
    build_vae(8).save_pretrained(tmp_path / TINY / "vae")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        export_base("base", "small", tmp_path / "out")
    train_parts("base", 0, False, tmp_path / "out")
    (tmp_path / "out" / "base" / "pool.safetensors").unlink()
    assert not (tmp_path / TINY / "transformer").exists()
    assert export_base("base", "small", tmp_path / "out")["step"] == 1
    assert not (tmp_path / "out" / "base" / "pool.safetensors").exists()  # no clips are encoded for it
    weights = torch.load(tmp_path / "out" / "base" / "state.pt", weights_only=True)["ema"]["shadow_params"]
    written = UMT5EncoderModel.from_pretrained(tmp_path / TINY / "text_encoder").shared.weight
    assert torch.equal(written, weights[0])
    assert json.loads((tmp_path / TINY / "training.json").read_text())["base"]["step"] == 1


def test_a_resumed_training_of_all_parts_begins_with_the_first_that_is_not_finished(tmp_path, monkeypatch):
    trained, ends = [], {"vae": [1], "base": [0, 1]}  # steps of one that each call has made

    def trainer(part):
        def train(optim, model, device, minutes, resume, out):
            out.mkdir(parents=True, exist_ok=True)
            trained.append(part)
            return {"step": ends[part].pop(0), "steps": 1, "seconds": 1.0}

        return train

    (tmp_path / TINY).mkdir(parents=True)
    monkeypatch.setattr("accel.training.parts.ROOT", tmp_path)
    monkeypatch.setattr("accel.training.parts.TRAINERS", {part: trainer(part) for part in ends})
    monkeypatch.setitem(OPTIM_CONFIGS, "small", {part: {"steps": 1, "lr": 1e-3} for part in ends})
    first = train_parts("all", None, False, tmp_path / "out", "small")
    assert trained == ["vae", "base"] and first["base"]["step"] == 0
    record = train_parts("all", None, True, tmp_path / "out", "small")
    assert trained == ["vae", "base", "base"] and record["base"]["step"] == 1
    file = tmp_path / TINY / "training.json"
    assert json.loads(file.read_text()).keys() == {"vae", "base"}
    file.write_text(json.dumps(record | {"vae": {"step": 7}}))
    with pytest.raises(AccelError, match="holds another vae than the one that was finished in"):
        train_parts("all", None, True, tmp_path / "out", "small")


def test_a_training_refuses_a_folder_in_which_another_one_writes(tmp_path):
    with only_writer(tmp_path), pytest.raises(AccelError, match="another process writes into"):
        train_parts("vae", None, True, tmp_path)
    with only_writer(tmp_path / "gpd" / "m"), pytest.raises(AccelError, match="another process writes into"):
        train_parts("gpd", None, True, tmp_path, model="somebody/m")


def test_a_run_of_other_settings_is_not_resumed(tmp_path):
    optim = OptimConfig(steps=9, lr=1e-3)
    check_run(tmp_path, "small", optim)
    check_run(tmp_path, "large", optim)  # nothing was trained yet
    (tmp_path / "state.pt").touch()
    check_run(tmp_path, "large", optim)
    with pytest.raises(ValueError, match="was begun with --setting large: go on with these"):
        check_run(tmp_path, "small", optim)
    with pytest.raises(ValueError, match="was begun with other settings of its optimizer"):
        check_run(tmp_path, "large", OptimConfig(steps=8, lr=1e-3))


def test_a_finished_base_leaves_no_checkpoint_and_removes_students_of_the_earlier_one(tmp_path, monkeypatch):
    def train(optim, model, device, minutes, resume, out):
        (out / "state.pt").touch()
        return {"step": 1, "steps": 1, "seconds": 1.0}

    out = tmp_path / "out"
    for part in ("vae", "gpd", "meanflow", "predictor"):
        (out / part).mkdir(parents=True)
        (out / part / "part.json").touch()
    (tmp_path / TINY).mkdir(parents=True)
    monkeypatch.setattr("accel.training.parts.ROOT", tmp_path)
    monkeypatch.setattr("accel.training.parts.TRAINERS", {"base": train})
    monkeypatch.setitem(OPTIM_CONFIGS, "small", {"base": {"steps": 1, "lr": 1e-3}})
    train_parts("base", None, True, out, "small")
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*.*")) == ["base/part.json", "vae/part.json"]


def test_the_record_of_a_run_includes_the_run_whose_weights_it_started_from(tmp_path):
    first = {"steps": 10}
    assert parent_run(first, tmp_path) == first  # it started from finished weights
    (tmp_path / "state.pt").touch()
    assert parent_run(first, tmp_path) == first  # its second chunk, after a stop
    assert parent_run({"steps": 5, "parent_run": first}, tmp_path) == first  # and after it has once been finished
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.pt").touch()
    assert parent_run(first, tmp_path / "other") is None  # the second chunk of a run from scratch


def test_a_setting_is_refused_where_it_would_be_ignored(tmp_path):
    with pytest.raises(ValueError, match="the setting large has no vae; it has base, gpd, meanflow, predictor"):
        train_parts("vae", None, False, tmp_path, "large")
    with pytest.raises(ValueError, match="leave it out with --model or --ablation"):
        train_parts("gpd", None, False, tmp_path, "small", ablation="halving")
    with pytest.raises(ValueError, match="unknown setting 'huge'; there are small, large"):
        export_base("base", "huge", tmp_path)
    with pytest.raises(ValueError, match="only the base model can be exported, not gpd"):
        export_base("gpd", None, tmp_path)


@pytest.mark.slow
def test_processes_of_torchrun_train_together_on_a_cpu(tmp_path):
    (script := tmp_path / "script.py").write_text(
        "from accelerate import PartialState\n"
        "from accel.training.parts import train_parts\n"
        "try:\n    train_parts('base', None, False, None, 'huge')\n"
        "except ValueError:\n    print('of', PartialState().num_processes)\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    assert subprocess.run(run, capture_output=True, text=True).stdout.split() == ["of", "2"] * 2
