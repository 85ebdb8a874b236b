"""Which models the page offers, and why it does not offer the others."""

import os

import pytest

from accel.errors import AccelError
from accel.runtime.models import TINY
from ui import model_list
from ui.model_list import HUB, gpu_gigabytes, hub_answers, model_choices


@pytest.fixture
def machine(monkeypatch):
    """machine(gigabytes, online): the GPU and the network that the list finds."""

    def set_machine(gigabytes: float, online: bool = True) -> None:
        monkeypatch.setattr(model_list, "gpu_gigabytes", lambda: gigabytes)
        monkeypatch.setattr(model_list, "hub_answers", lambda: online)

    set_machine(0)
    return set_machine


def reasons(*arguments) -> dict[str, str]:
    return {choice.id: choice.reason for choice in model_choices(*arguments)}


def test_without_a_gpu_the_shipped_model_alone_is_usable_and_the_hub_is_not_asked(machine, monkeypatch):
    monkeypatch.setattr(model_list, "hub_answers", lambda: pytest.fail("the hub was asked"))
    choices = model_choices()
    assert [choice.id for choice in choices if choice.usable] == [TINY]
    assert "this server has none" in choices[-1].reason


def test_hub_models_need_enough_memory_and_a_network(machine):
    small, large = HUB[0], HUB[-1]
    machine(24)
    assert reasons()[small.id] == "" and "that of this server has 24 GB" in reasons()[large.id]
    machine(80)
    assert not any(reasons().values())
    machine(80, online=False)
    assert "cannot reach" in reasons()[small.id] and reasons()[TINY] == ""


def test_the_titles_of_hub_models_tell_size_and_licence(machine):
    titles = {choice.id: choice.title for choice in model_choices()}
    assert titles[HUB[0].id] == "Wan 2.1 1.3B · 15 GB of weights · Apache 2.0"


def test_folders_of_pipelines_are_offered_and_damaged_ones_say_why(machine, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKLWan"]}')
    (tmp_path / "notes").mkdir()
    found = reasons(TINY, tmp_path)
    assert list(found)[:2] == [TINY, str(tmp_path / "broken")] and "vae" in found[str(tmp_path / "broken")]
    assert str(tmp_path / "notes") not in found


def test_the_model_that_the_owner_names_comes_first_and_is_offered_once(machine):
    machine(80)
    ids = [choice.id for choice in model_choices(HUB[1].id)]
    assert ids[0] == HUB[1].id and len(ids) == len(set(ids)) == len(HUB) + 1
    assert model_choices("someone/else")[0].usable
    machine(0)
    assert model_choices(HUB[0].id)[0].usable and not model_choices(TINY)[-1].usable  # the owner's own is tried


def test_a_missing_folder_of_models_is_refused(tmp_path):
    with pytest.raises(AccelError, match="is not a folder"):
        model_choices(TINY, tmp_path / "none")


def test_the_memory_of_the_largest_gpu_is_read_without_torch(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 24000\necho 80000\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_gigabytes() == 80
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_gigabytes() == 0


def test_the_hub_is_not_asked_when_its_client_is_to_stay_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: pytest.fail("asked"))
    assert not hub_answers()
