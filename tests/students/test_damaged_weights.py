"""Damaged weights of students and predictors are refused in one sentence, and the pipeline stays as it was."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import accel
from accel.errors import AccelError
from accel.methods.disca.disca import DisCa
from accel.methods.gpd import GPD
from accel.methods.meanflow import MeanFlow
from accel.students.weights import ADAPTER, NAME, with_lora


def truncate(file) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def overwrite_header(file) -> None:
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def rename_tensors(file) -> None:
    save_file({f"other.{name}": tensor for name, tensor in load_file(file).items()}, file)


USERS = {
    "gpd-N6/model.safetensors": GPD(steps=6),
    "meanflow/model.safetensors": MeanFlow(steps=8),
    "meanflow/interval_embedder.safetensors": MeanFlow(steps=8),
    "predictor/residual/model.safetensors": DisCa(),
}


DAMAGE = [(truncate, "damaged"), (overwrite_header, "damaged"), (rename_tensors, "architecture")]


@pytest.mark.parametrize("damage, words", DAMAGE)
@pytest.mark.parametrize("name, method", USERS.items(), ids=USERS)
def test_damaged_weights_are_refused_in_one_sentence(damage, words, name, method, pipe, students, sample, tmp_path):
    before = sample(pipe, steps=4)
    damage(tmp_path / name)
    with pytest.raises(AccelError) as refused, accel.apply(pipe, [method]):
        pass
    sentence = str(refused.value)
    assert words in sentence and name.split("/")[-1] in sentence
    assert "\n" not in sentence and str(tmp_path) not in sentence
    assert torch.equal(sample(pipe, steps=4), before)


def test_missing_weights_are_named(pipe, students, tmp_path):
    (tmp_path / "gpd-N6" / "model.safetensors").unlink()
    with pytest.raises(AccelError, match="^gpd-N6/model.safetensors is missing: restore it, or train the weights"):
        with accel.apply(pipe, [GPD(steps=6)]):
            pass


def test_a_damaged_lora_is_refused_before_it_touches_the_model(pipe, tmp_path):
    (tmp_path / ADAPTER).write_bytes(b"\x00" * 50)
    with pytest.raises(AccelError, match="is damaged: restore it"), with_lora(pipe.transformer, tmp_path):
        pass
    assert NAME not in (getattr(pipe.transformer, "peft_config", None) or {})
