"""`accel tune`: the same tries for the same seed, also after a stop; what is chosen; presets that load again."""

import json
from types import SimpleNamespace

import optuna
import pytest
import torch

from accel.errors import AccelError
from accel.evaluation import tune as tune_module
from accel.evaluation.tune import Judge, at_least, fastest, front, known_settings, suggest, tune, write_preset
from accel.methods import METHODS
from accel.runtime.models import ModelDefaults
from accel.runtime.presets import Preset, load_preset

DEFAULTS = ModelDefaults(height=32, width=32, frames=5, steps=10, guidance=4.0, fps=8, text_length=16)
ROWS = [
    {"preset": {"steps": 40}, "work": 0.8, "speed": 1.25, "ssim": 0.999},
    {"preset": {"steps": 20}, "work": 0.4, "speed": 2.5, "ssim": 0.99},
    {"preset": {"steps": 18}, "work": 0.4, "speed": 2.5, "ssim": 0.98},
    {"preset": {"steps": 10}, "work": 0.2, "speed": 5.0, "ssim": 0.95, "adherence_loss": 0.2},
]


class Counted(Judge):
    """Judges without a model: fewer steps are faster and worse, methods help a little."""

    calls = 0

    def __call__(self, preset: Preset) -> dict:
        type(self).calls += 1
        work = (preset.steps or 6) / 50 / (1 + len(preset.methods))
        preset = preset.model_dump(exclude_defaults=True)
        return {"preset": preset, "work": work, "speed": 1 / work, "ssim": 1 - 0.001 / work}


@pytest.fixture
def search(monkeypatch, tmp_path):
    """search(folder, trials, prompts=, seed=): the rows of a search without a model."""
    monkeypatch.setattr(tune_module, "Judge", Counted)
    monkeypatch.setattr(tune_module, "RANDOM_TRIES", 4)
    monkeypatch.setattr(tune_module, "weights", lambda model: [])
    monkeypatch.setattr(tune_module, "environment", lambda pipe: {"device": "none"})
    pipe = SimpleNamespace(scheduler=SimpleNamespace(config={"flow_shift": 3.0}))
    return lambda folder, trials, prompts=("a",), seed=0: tune(
        "none", pipe, DEFAULTS, prompts, trials, seed, tmp_path / folder
    )


def test_a_search_that_was_stopped_goes_on_to_the_same_result(search, tmp_path, monkeypatch):
    unbroken = search("unbroken", 8)
    search("stopped", 5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Counted, "__call__", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        search("stopped", 8)
    before = Counted.calls
    assert search("stopped", 8) == unbroken and Counted.calls == before + 3
    assert search("stopped", 8) == unbroken and Counted.calls == before + 3
    document = json.loads((tmp_path / "stopped" / "front.json").read_text())
    assert document["rows"] == front(unbroken) and document["tries"] == 8 and document["device"] == "none"
    assert search("other seed", 8, seed=1) != unbroken


def test_a_folder_of_another_search_is_refused(search):
    search("folder", 1)
    with pytest.raises(ValueError, match="holds a search of other prompts, weights, first tries, device or seed"):
        search("folder", 1, prompts=("b",))


def test_tries_that_the_model_refuses_are_left_out_and_a_search_without_any_other_ends(search, monkeypatch, capsys):
    def refuse_unipc(judge, preset):
        if preset.solver == "unipc":
            raise AccelError("no unipc here")
        return judged(judge, preset)

    judged = Counted.__call__
    monkeypatch.setattr(Counted, "__call__", refuse_unipc)
    with pytest.raises(AccelError, match="all 4 tries were refused; the first one: no unipc here"):
        search("known alone", 4)  # all of them take UniPC
    rows = search("more", 12)
    assert rows and all("refused" not in row for row in rows)
    assert "tries were refused; the first one: no unipc here" in capsys.readouterr().err


def test_a_try_that_needs_too_much_memory_is_left_out(search, monkeypatch, capsys):
    def lack_memory(judge, preset):
        if preset.steps == 50:
            raise torch.OutOfMemoryError
        return judged(judge, preset)

    judged = Counted.__call__
    monkeypatch.setattr(Counted, "__call__", lack_memory)
    assert search("known alone", 4)
    assert "2 of 4 tries were refused; the first one: there is not enough memory" in capsys.readouterr().err


def test_any_seed_can_be_searched_with(search):
    assert search("large", 1, seed=2**40) and search("negative", 1, seed=-1)


def test_the_first_tries_take_the_models_own_shift():
    shifts = lambda own: {choice["shift"] for choice in known_settings({}, False, own) if choice["steps"] == 50}
    assert shifts(5.0) == {5.0} and shifts(None) == {3.0} and shifts(12.0) == {7.0} and shifts(1.15) == {2.0}


def test_every_suggestion_is_a_run_that_is_allowed():
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    presets = [suggest(study.ask(), {"gpd": [6, 12], "meanflow": [10]}, True) for _ in range(200)]
    for preset in presets:
        list(preset)  # builds the methods
    used = {name for preset in presets for name in preset.methods}
    assert used == {"gpd", "meanflow", "disca", "stepcache", "fastercache"} and used <= METHODS.keys()
    assert {preset.methods["gpd"]["steps"] for preset in presets if "gpd" in preset.methods} == {6, 12}


def test_a_known_try_that_was_put_in_and_not_begun_is_not_put_in_twice(search, monkeypatch):
    unbroken = search("unbroken", 8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "ask", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        search("stopped", 8)
    assert search("stopped", 8) == unbroken


def test_a_name_has_one_range_in_all_branches_of_a_search():
    """The sampler keeps the first range that it sees of a name."""
    study, ranges = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)), {}
    for _ in range(200):
        suggest(trial := study.ask(), {"gpd": [6, 12], "meanflow": [10]}, True)
        for name, distribution in trial.distributions.items():
            assert ranges.setdefault(name, distribution) == distribution


def test_cached_runs_are_tried_first_and_then_students_and_solvers_in_all_of_their_steps():
    own_steps = {"fittedsolver": [8, 20], "meanflow": [6]}
    study = optuna.create_study(directions=["minimize", "minimize"])
    presets = []
    for choice in known_settings(own_steps, True, 3.0):
        study.enqueue_trial(choice)
        presets.append(suggest(study.ask(), own_steps, True))
    assert [(preset.steps, preset.shift, preset.methods["stepcache"]["threshold"]) for preset in presets[:4]] == [
        (50, 3.0, 0.1), (50, 3.0, 0.2), (32, 4.0, 0.2), (25, 4.0, 0.3),
    ]  # fmt: skip
    assert [preset.methods for preset in presets[4:]] == [
        {"fittedsolver": {"steps": 8}}, {"fittedsolver": {"steps": 20}}, {"meanflow": {"steps": 6}},
        {"meanflow": {"steps": 6}, "disca": {"num_full_steps": 3}},
    ]  # fmt: skip
    assert len(known_settings(own_steps, False, 3.0)) == 4 + 3


def test_the_front_the_fastest_within_a_loss_and_the_best_at_a_speed():
    assert front([*ROWS, dict(ROWS[1])]) == [ROWS[0], ROWS[1], ROWS[3]]  # a try that came again counts once
    assert fastest(ROWS, 0.01) == fastest(ROWS, 0.1) == ROWS[1]  # the fastest row has lost what the prompt says
    assert at_least(ROWS, 2) == ROWS[1] and at_least(ROWS, 6) is None
    rounded = {"work": 0.4000000000000001, "speed": 1 / 0.4000000000000001, "ssim": 0.99}  # 20 of 50 steps
    assert rounded["speed"] < 2.5 and at_least([rounded], 2.5) == rounded
    beaten = {"preset": {"steps": 11}, "work": 0.21, "speed": 4.8, "ssim": 0.94, "adherence_loss": 0.0}
    assert fastest([*ROWS, beaten], 0.07) == beaten and beaten not in front([*ROWS, beaten])  # by one that says less
    sentence = (
        "no try loses at most 0.0001 of SSIM and 0.01 of adherence; the least of those that keep adherence is 0.001"
    )
    with pytest.raises(ValueError, match=sentence):
        fastest(ROWS, 0.0001)


def test_a_preset_of_a_row_loads_and_says_how_it_was_found(tmp_path):
    row = {**ROWS[1], "preset": {"steps": 20, "methods": {"stepcache": {"schedule": "spread", "full_share": 0.42}}}}
    write_preset(row, file := tmp_path / "found.yaml", prompts=4, trials=150)
    preset = load_preset(file)
    assert preset.model_dump(exclude_defaults=True, exclude={"about"}) == row["preset"]
    assert preset.about.startswith("2.50 times less work at SSIM 0.9900, the mean over 4 tuning prompts")


@pytest.mark.slow
def test_a_try_is_measured_against_the_baseline_of_the_same_noise(tiny_wan):
    judge = Judge("none", tiny_wan, DEFAULTS, ["a ball"])
    plain = judge(Preset())
    assert plain["work"] == plain["ssim"] == 1 and plain["preset"] == {}
    row = judge(Preset(methods={"stepcache": {"schedule": "spread", "full_share": 0.5}}))
    assert 0.4 < row["work"] < 0.7 and row["speed"] == 1 / row["work"] and row["ssim"] < 1
