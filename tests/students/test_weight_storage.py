"""Students on models whose weights are stored, converted or fused in other ways than in training."""

from copy import deepcopy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from support import random_wan

import accel
from accel.errors import AccelError
from accel.methods.disca.disca import DisCa
from accel.methods.gpd import GPD
from accel.methods.meanflow import MeanFlow
from accel.students.interval_embedding import IntervalEmbedder
from accel.students.weights import fingerprint
from accel.training.lora_networks import LoRANetworks
from accel.training.stages import store

CPU = torch.device("cpu")
STORAGES = {  # and how far the video may be from that of the model in float32
    "bfloat16": (lambda pipe: pipe.to(torch.bfloat16), 0.03),
    "float16": (lambda pipe: pipe.to(torch.float16), 0.01),
    "layerwise": (lambda pipe: pipe.transformer.enable_layerwise_casting(torch.bfloat16, torch.float32), 0.03),
    "fused": (lambda pipe: pipe.transformer.fuse_qkv_projections(), 1e-5),
    "model": (lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), 0),
    "group": (lambda pipe: pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level"), 0),
}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(p.dtype == b[name].dtype and p.equal(b[name]) for name, p in a.items())


@pytest.mark.parametrize("storage", STORAGES)
def test_a_student_runs_however_the_weights_are_stored(storage, students, pipe, sample):
    store, tolerance = STORAGES[storage]
    base = sample(pipe, steps=6, guidance=1.0)
    with accel.apply(pipe, GPD(steps=6)):
        expected = sample(pipe, steps=6, guidance=1.0)
    store(pipe)
    before = weights(pipe.transformer)
    with accel.apply(pipe, GPD(steps=6)):
        found = sample(pipe, steps=6, guidance=1.0)
    assert distance(found.float(), expected) <= tolerance < distance(base, expected) / 3
    assert are_equal(weights(pipe.transformer), before)


@pytest.mark.parametrize("form", ["disk", "sequential"])
def test_weights_that_are_not_in_memory_are_refused_with_the_offloading_that_works(form, students, pipe, tmp_path):
    if form == "disk":
        path = str(tmp_path / "offloaded")
        pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=path)
    else:
        pipe.enable_sequential_cpu_offload(device="cpu")
    for method in (GPD(steps=6), DisCa()):
        with pytest.raises(AccelError, match=r"need the model's in memory.*use enable_model_cpu_offload\(\)"):
            with accel.apply(pipe, method):
                pass


@pytest.fixture(scope="module")
def half(tiny_wan):
    """The shipped model in bfloat16."""
    pipe = deepcopy(tiny_wan)
    return pipe.to(torch.bfloat16)


def test_the_shipped_predictor_knows_its_student_in_bfloat16(half):
    with accel.apply(half, "turbo"):
        pass


def test_the_shipped_predictor_refuses_other_models_in_bfloat16(half):
    for methods in (DisCa(), [GPD(steps=6), DisCa()]):
        with pytest.raises(AccelError, match="belongs to another model"), accel.apply(half, methods):
            pass


@pytest.mark.parametrize("method", [GPD(steps=6), DisCa(num_full_steps=4)], ids=["student", "predictor"])
def test_a_pipeline_that_is_converted_inside_runs_right_and_stays_converted(method, students, pipe, sample):
    with accel.apply(pipe, method):
        expected = sample(pipe, steps=6, guidance=1.0)
    base = deepcopy(pipe.transformer).to(torch.bfloat16)
    with accel.apply(pipe, method):
        pipe.to(torch.bfloat16)
        assert distance(sample(pipe, steps=6, guidance=1.0).float(), expected) < 0.03
    assert are_equal(weights(pipe.transformer), weights(base))


def test_projections_fused_inside_are_the_students_and_go_with_it(students, pipe, sample):
    before = weights(pipe.transformer)
    with accel.apply(pipe, GPD(steps=6)):
        expected = sample(pipe, steps=6, guidance=1.0)
        pipe.transformer.fuse_qkv_projections()
        torch.testing.assert_close(sample(pipe, steps=6, guidance=1.0), expected)
    assert are_equal(weights(pipe.transformer), before)


def test_group_offloading_does_not_begin_under_a_student(students, pipe):
    """It would keep the student's weights, and bring them back after the context."""
    with accel.apply(pipe, GPD(steps=6)):
        with pytest.raises(AccelError, match="cannot be offloaded in groups: enable that before accel.apply"):
            pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")


@pytest.mark.parametrize("method", [GPD(steps=6), MeanFlow(steps=6)], ids=["gpd", "meanflow"])
def test_offloading_one_by_one_under_a_student_leaves_the_base(method, students, pipe, sample, monkeypatch):
    """It would keep copies of the student's weights, and bring them back after the context."""
    before = weights(pipe.transformer)
    with accel.apply(pipe, method):
        with pytest.raises(AccelError, match=r"cannot be offloaded one by one: use enable_model_cpu_offload\(\)"):
            pipe.enable_sequential_cpu_offload(device="cpu")
        expected = sample(pipe, steps=6, guidance=1.0)
        cpu_offload(pipe.transformer, CPU)
        monkeypatch.setattr(type(pipe), "_execution_device", property(lambda _: CPU))  # its other models have no hooks
        assert sample(pipe, steps=6, guidance=1.0).equal(expected)
    assert are_equal(weights(pipe.transformer), before)


def test_embeddings_of_a_student_go_where_the_input_is(students, pipe):
    """Offloading that was set up before does not know them, and would leave them on the CPU."""
    embedder = IntervalEmbedder(deepcopy(pipe.transformer.condition_embedder))
    embedder.base.to("meta")
    time, *_ = embedder(torch.zeros(3, device="meta"), torch.zeros(1, 2, 16, device="meta"))
    assert time.is_meta and all(p.is_meta for p in embedder.scalars.parameters())


@pytest.mark.parametrize("own", [False, True], ids=["no other LoRA", "a LoRA of the user's"])
def test_a_student_lora_that_is_unloaded_inside_is_missed_and_leaves_nothing(own, pipe, sample, tmp_path):
    sigmas = [1 - i / 6 for i in range(7)]
    facts = {"steps": 6, "sigmas": sigmas, "timesteps": [1000 * s for s in sigmas[:-1]]}
    nets = LoRANetworks(random_wan(0), rank=2)
    store(nets, tmp_path / "gpd-N6", "gpd.json", {**facts, "base_fingerprint": fingerprint(pipe.transformer)})
    pipe.register_to_config(_name_or_path=str(tmp_path))
    base, before = sample(pipe, steps=6, guidance=1.0), weights(pipe.transformer)
    if own:
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "mine")
    trained = [p.requires_grad for name, p in pipe.transformer.named_parameters() if "lora" not in name]
    with accel.apply(pipe, GPD(steps=6)):
        assert sample(pipe, steps=6, guidance=1.0).isfinite().all()
        pipe.transformer.unload_lora()
        with pytest.raises(AccelError, match="acts in full or not at all"):
            sample(pipe, steps=6, guidance=1.0)
    assert are_equal(weights(pipe.transformer), before) and torch.equal(sample(pipe, steps=6, guidance=1.0), base)
    assert [p.requires_grad for p in pipe.transformer.parameters()] == trained


def test_a_lora_is_not_fused_into_a_student(students, pipe):
    with accel.apply(pipe, GPD(steps=6)):
        for fuse in (pipe.fuse_lora, pipe.transformer.fuse_lora):
            with pytest.raises(AccelError, match="a LoRA cannot be fused into a student"):
                fuse()
    assert "fuse_lora" not in vars(pipe.transformer)
