"""Sweeps: axes read from text, cells, the front, and the command with a `generate` that takes no time."""

import json
import random
import string

import numpy as np
import pytest
import torch

from accel.cli import main
from accel.core.trace import Event, Trace
from accel.errors import AccelError
from accel.evaluation import sweep_run
from accel.evaluation.compare import Comparison, report
from accel.evaluation.pareto_front import fastest_within, loss, pareto_front
from accel.evaluation.sweep import (
    MAX_CELLS,
    Axis,
    axis_names,
    axis_range,
    check_available,
    count,
    expand,
    parse_axis,
    parse_axis_option,
    parse_steps,
)  # fmt: skip
from accel.evaluation.sweep_run import run_sweep, sweep_table
from accel.runtime.generate import Video
from accel.runtime.models import TINY, ModelDefaults
from accel.runtime.paths import ROOT
from accel.runtime.run import Cancelled, build_run

DEFAULTS = ModelDefaults(height=16, width=16, frames=5, steps=20)
FASTERCACHE = {"methods": {"fastercache": {"guidance_interval": 4}}, "seed": 1}


@pytest.mark.parametrize(
    "option, values",
    [
        ("steps=20,30, 50", (20, 30, 50)),
        ("fastercache.attention_interval=2..6", (2, 3, 4, 5, 6)),
        ("steps=10..50:20, 5", (10, 30, 50, 5)),
        ("steps=2..4,3", (2, 3, 4)),
        ("asymrnr.budget=0.2..0.4:0.05", (0.2, 0.25, 0.3, 0.35, 0.4)),
        ("fastercache.gain_low=-0.1..0.1:0.1", (-0.1, 0.0, 0.1)),
        ("guidance=1..3", (1.0, 2.0, 3.0)),
        ("gpd.steps=6..16", (6, 8, 12, 16)),
        ("fastercache.attention=true,false", (True, False)),
        ("disca.predictor=paper,reuse", ("paper", "reuse")),
        ("preset=fastercache,none", ("fastercache", "none")),
        ("seed=9223372036854775807", (2**63 - 1,)),
    ],
)
def test_values_ranges_and_steps_are_read(option, values):
    assert parse_axis_option(option) == Axis(option.partition("=")[0], values)


@pytest.mark.parametrize(
    "option, sentence",
    [
        ("steps", "write steps=20,30,50 or method.parameter=2..6"),
        ("speed=1", "unknown axis 'speed'; there are preset, steps, guidance"),
        ("fastercache.speed=1", "the parameters of fastercache are attention, attention_interval"),
        ("steps=", "a value is missing: write values as 2,4,6"),
        ("steps=2...4", "'2...4' is not understood: write values as"),
        ("steps=6..2", "write the lower end first"),
        ("asymrnr.budget=0.2..0.4", "needs a step, as in 0.2..0.4:0.05"),
        ("asymrnr.budget=0.2..0.4:0", "a step above 0"),
        ("steps=0", "steps = 0 is not allowed: a whole number from 1 to 1000"),
        ("guidance=nan", "guidance = 'nan' is not allowed: a number from 0 to 30"),
        ("fastercache.attention_interval=2..7", "attention_interval = 7 is not allowed: a whole number from 2 to 6"),
        ("gpd.steps=7", "gpd.steps = 7 is not allowed: one of 0, 6, 8"),
        ("preset=../secret.yaml", "is not allowed: one of asymrnr"),
        ("steps=1..1000000000000000", "at most 64 are allowed: give fewer values"),
        ("steps=" + "1," * 70 + "1", "at most 64 are allowed"),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_sentence(option, sentence):
    with pytest.raises(AccelError) as refused:
        parse_axis_option(option)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_any_text_gives_an_axis_or_a_sentence():
    rng, names = random.Random(0), axis_names()
    for _ in range(400):
        text = "".join(rng.choice("0123456789..,,::-" + string.printable) for _ in range(rng.randrange(12)))
        try:
            assert 1 <= len(parse_axis(rng.choice(names), text).values) <= MAX_CELLS
        except AccelError as error:
            assert str(error)


def test_every_axis_of_the_page_says_its_range():
    assert {"preset", "steps", "guidance", "seed", "gpd.steps"} <= set(axis_names())
    assert axis_range("fastercache.attention_interval") == "a whole number from 2 to 6"
    assert axis_range("fastercache.attention") == "true or false"
    assert all(axis_range(name) for name in axis_names())


def test_no_plain_steps_are_an_empty_text():
    assert parse_steps(" ") == () and parse_steps("10,20") == (10, 20)


def test_the_first_axis_gives_the_rows_and_plain_steps_come_last():
    axes = [parse_axis("fastercache.attention_interval", "2,3"), parse_axis("steps", "10,20")]
    cells = expand(FASTERCACHE, axes, {"steps": 50, "guidance": 3.0, "seed": 1}, (30,))
    assert [tuple(cell.values.values()) for cell in cells] == [(2, 10), (2, 20), (3, 10), (3, 20), (30,)]
    assert cells[1].settings == {
        "methods": {"fastercache": {"guidance_interval": 4, "attention_interval": 2}}, "seed": 1, "steps": 20,
    }  # fmt: skip
    assert cells[-1].plain and cells[-1].settings == {"methods": {}, "steps": 30, "guidance": 3.0, "seed": 1}
    assert [cell.label for cell in cells[::4]] == ["attention interval 2, 10 steps", "plain, 30 steps"]
    assert FASTERCACHE["methods"] == {"fastercache": {"guidance_interval": 4}}


def test_a_preset_replaces_the_methods_before_a_parameter_changes_them():
    axes = [parse_axis("fastercache.attention_interval", "3"), parse_axis("preset", "fastercache,none")]
    of_preset, without = expand(FASTERCACHE, axes)
    assert of_preset.settings["methods"]["fastercache"]["attention_interval"] == 3
    assert of_preset.settings["methods"]["fastercache"]["extrapolation"] == "sigma"
    assert without.settings["methods"] == {"fastercache": {"attention_interval": 3}}


def test_a_students_steps_and_noise_levels_replace_those_of_the_base_but_not_those_of_an_axis():
    base = {"methods": {"gpd": {"steps": 6}}, "steps": 50, "seed": 0, "solver": "euler", "shift": 2.0}
    (cell,) = expand(base, [parse_axis("gpd.steps", "8")])
    assert (cell.settings["steps"], cell.settings["guidance"]) == (8, 1.0)
    assert build_run(DEFAULTS, model="m", prompt="p", **cell.settings).solver == "default"
    (cell,) = expand(base, [parse_axis("steps", "20")])
    with pytest.raises(AccelError, match="steps = 20 is not possible with gpd"):
        build_run(DEFAULTS, model="m", prompt="p", **cell.settings)


def test_the_number_of_settings_is_limited_before_they_are_expanded():
    wide = parse_axis("steps", "1..40")
    assert count([wide], (10,)) == 41
    with pytest.raises(AccelError, match="the sweep has 80 settings, at most 64 are allowed"):
        expand(FASTERCACHE, [wide, parse_axis("guidance", "1,2")])
    with pytest.raises(AccelError, match="both axes are steps"):
        count([wide, wide])
    with pytest.raises(AccelError, match="one or two axes, not 0"):
        count([])


def test_a_student_that_was_not_trained_is_refused():
    (cell,) = expand({"methods": {}, "seed": 0}, [parse_axis("gpd.steps", "6")])
    check_available(cell, TINY)
    with pytest.raises(AccelError, match="gpd needs weights that have not been trained for models/none"):
        check_available(cell, "models/none")
    (given,) = expand({"methods": {"gpd": {"student": f"{ROOT}/{TINY}/gpd-N6"}}, "seed": 0}, [parse_axis("seed", "1")])
    check_available(given, "models/none")


def test_the_front_has_the_points_that_no_other_point_beats():
    points = [(1, 1.0), (2, 0.9), (2, 0.8), (3, 0.9), (4, 0.5), (3.5, 0.4), (4, 0.5)]
    assert pareto_front(points) == [0, 3, 4, 6]
    assert pareto_front([]) == []


def test_the_front_of_random_points_is_what_comparing_all_pairs_gives():
    rng = random.Random(1)
    points = [(rng.randrange(8), rng.randrange(8)) for _ in range(60)]
    beats = lambda p, q: p != q and p[0] >= q[0] and p[1] >= q[1]
    expected = {i for i, q in enumerate(points) if not any(beats(p, q) for p in points)}
    assert set(pareto_front(points)) == expected


def test_the_fastest_setting_within_a_loss_is_found():
    rows = [{"speedup": s, "ssim": v, "adherence_a": 0.9, "adherence_b": a} for s, v, a in
            ((1.5, 0.999, 0.9), (2.0, 0.99, 0.5), (4.0, 0.95, 1.0), (9.0, None, 0.9))]  # fmt: skip
    assert [fastest_within(rows, allowed) for allowed in (0, 0.001, 0.01, 0.05, 1)] == [None, 0, 1, 2, 2]
    assert fastest_within(rows, 0.0, "adherence") == 3
    assert loss(rows[1], "adherence") == pytest.approx(0.4) and loss(rows[3]) is None
    assert loss({"vmaf": 97.5}, "vmaf") == 2.5 and loss({"vmaf": 97.5, "bit_equal": True}, "vmaf") == 0


def gray_video(run) -> Video:
    trace = Trace()
    trace.flops = {"denoiser": 10}
    for step in range(run.steps):
        trace.events[step, "cond", "denoiser"] = Event(step, "cond", "denoiser", "compute", 1.0)
    frames = np.full((5, 16, 16, 3), 100 + run.steps, np.uint8)
    return Video(frames, torch.full((1, 4, 3, 2, 2), float(run.steps)), {"denoise": run.steps / 10}, trace)


@pytest.fixture
def generated(monkeypatch):
    """The runs that were generated; a run takes a tenth of a second a step, and stops at `stop_at` steps."""
    seen = []

    def generate(run, pipe, defaults, on_step=None):
        if run.steps == generate.stop_at:
            raise Cancelled
        seen.append((run.seed, run.steps))
        for step in range(run.steps) if on_step else ():
            on_step(step + 1, None, None)
        return gray_video(run)

    def compare(a, b, pipe, defaults, on_step, on_video, baseline):
        video = generate(b, pipe, defaults, lambda *step: on_step("b", *step))
        on_video("b", video)
        seconds = {"a": [baseline.seconds], "b": [video.seconds]}
        return Comparison(baseline, video, report(a, b, baseline, video, seconds, pipe, defaults))

    def preflight(run, pipe):
        if run.steps == generate.refuses:
            raise AccelError(f"no run of {run.steps} steps")

    generate.stop_at = generate.refuses = None
    machine = lambda pipe: {"device": "cpu", "threads": 1, "dtype": "float32"}
    monkeypatch.setattr("accel.evaluation.compare.environment", machine)
    replaced = {"generate": generate, "compare": compare, "warm_up": lambda *args: None, "environment": machine,
                "preflight": preflight}  # fmt: skip
    for name, function in {**replaced, "weights": lambda model: []}.items():
        monkeypatch.setattr(sweep_run, name, function)
    seen.append(generate)
    return seen


def cell_runs(text: str, reference_steps: int = 20, name: str = "steps") -> list:
    reference = {"seed": 0, "steps": reference_steps}
    cells = expand({"methods": {}, **reference}, [parse_axis(name, text)], reference)
    build = lambda **settings: build_run(DEFAULTS, model="m", prompt="a red star", **settings)
    return [(cell, build(**{**reference, "seed": cell.settings["seed"]}), build(**cell.settings)) for cell in cells]


def test_all_settings_are_measured_against_one_reference_and_written(generated, tmp_path):
    results = run_sweep(cell_runs("10,5"), None, DEFAULTS, tmp_path)
    assert generated[1:] == [(0, 20), (0, 10), (0, 5)]
    assert [row["speedup"] for row in results["rows"]] == [2, 4] and results["front"] == ["10 steps", "5 steps"]
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == results["rows"]
    report = json.loads((tmp_path / "steps=10" / "run.json").read_text())
    assert report["steps"] == 10 and report["steps_a"] == 20
    assert {file.name for file in tmp_path.iterdir()} == {
        "a-0.mp4", "pareto.png", "results.json", "steps=10", "steps=5",
    }  # fmt: skip
    assert "| 10 steps * | 1.00 | 2.00 |" in sweep_table(results["rows"])


def test_a_cell_that_cannot_run_is_told_before_anything_is_generated(generated, tmp_path):
    generated[0].refuses = 5
    with pytest.raises(AccelError, match="no run of 5 steps"):
        run_sweep(cell_runs("10,5"), None, DEFAULTS, tmp_path)
    assert not generated[1:] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]"])
def test_results_that_no_sweep_wrote_are_refused_in_a_sentence(text, generated, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(AccelError, match="results.json was not written by `accel sweep`: give another --out"):
        run_sweep(cell_runs("10"), None, DEFAULTS, tmp_path)


def test_a_stopped_sweep_goes_on_where_it_stopped(generated, tmp_path):
    generated[0].stop_at = 5
    with pytest.raises(Cancelled):
        run_sweep(cell_runs("10,5,4"), None, DEFAULTS, tmp_path)
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1
    generated[0].stop_at, generated[1:] = None, []
    results = run_sweep(cell_runs("10,5,4"), None, DEFAULTS, tmp_path)
    assert generated[1:] == [(0, 20), (0, 5), (0, 4)] and len(results["rows"]) == 3
    generated[1:] = []
    assert run_sweep(cell_runs("10,5,4"), None, DEFAULTS, tmp_path) == results and not generated[1:]


def test_results_of_another_reference_are_not_mixed_in(generated, tmp_path):
    run_sweep(cell_runs("10"), None, DEFAULTS, tmp_path)
    with pytest.raises(AccelError, match="another reference, model or machine: give another --out"):
        run_sweep(cell_runs("10", reference_steps=40), None, DEFAULTS, tmp_path)


def test_a_cell_whose_student_was_replaced_is_measured_again(generated, tmp_path, monkeypatch):
    run_sweep(cell_runs("10,5"), None, DEFAULTS, tmp_path)
    generated[1:] = []
    monkeypatch.setattr("accel.evaluation.sweep_run._files", lambda run: ["new"] if run.steps == 5 else [])
    run_sweep(cell_runs("10,5"), None, DEFAULTS, tmp_path)
    assert generated[1:] == [(0, 20), (0, 5)]


def test_each_seed_has_its_own_reference(generated, tmp_path):
    run_sweep(cell_runs("1,2", name="seed"), None, DEFAULTS, tmp_path)
    assert generated[1:] == [(1, 20), (1, 20), (2, 20), (2, 20)]
    assert (tmp_path / "a-1.mp4").is_file() and (tmp_path / "a-2.mp4").is_file()


@pytest.fixture
def command(monkeypatch, capsys, tiny_wan, tmp_path):
    """command(*arguments) -> exit code, JSON of the last line of stdout, stderr of `accel sweep`."""
    monkeypatch.setattr("accel.runtime.models.load_pipeline", lambda model: tiny_wan)

    def run(*arguments: str):
        monkeypatch.setattr("sys.argv", ["accel", "sweep", *arguments, "--out", str(tmp_path / "out")])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out and json.loads(out.strip().splitlines()[-1]), err

    return run


@pytest.mark.slow
def test_the_command_measures_presets_and_plain_steps(command, tmp_path):
    code, document, _ = command("--axis", "preset=fastercache,gpd", "--steps", "4", "--plain-steps", "2")
    assert code == 0
    assert [row["label"] for row in document["rows"]] == ["fastercache", "gpd", "plain, 2 steps"]
    assert all(0 < row["ssim"] <= 1 and row["speedup"] > 0 for row in document["rows"])
    gpd = json.loads((tmp_path / "out" / "preset=gpd" / "run.json").read_text())
    assert (gpd["steps"], gpd["guidance"], gpd["steps_a"]) == (6, 1, 4)
    assert (tmp_path / "out" / "preset=gpd" / "b.mp4").is_file()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((), "Missing option '--axis'"),
        (("--axis", "steps=0"), "steps = 0 is not allowed: a whole number from 1 to 1000"),
        (("--axis", "steps=2", "--axis", "seed=1", "--axis", "guidance=1"), "a sweep has one or two axes, not 3"),
        (("--axis", "steps=20", "--preset", "gpd"), "steps = 20 is not possible with gpd, which needs steps = 6"),
        (("--axis", "steps=1..40", "--axis", "seed=1,2"), "the sweep has 80 settings, at most 64 are allowed"),
    ],
)
def test_the_command_refuses_bad_input_before_it_writes(arguments, sentence, command, tmp_path):
    code, _, err = command(*arguments)
    assert code == 2 and sentence in err and not (tmp_path / "out").exists()
