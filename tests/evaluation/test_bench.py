"""Running a suite: what is generated, what is resumed, how results are summarized."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from accel.errors import AccelError
from accel.evaluation import bench, measure
from accel.evaluation.measure import settings_keys
from accel.evaluation.metrics import METRICS
from accel.evaluation.report import conditions, pairs_table, summarize, table
from accel.evaluation.suites import NEUTRAL, NOISE_FLOOR, PROMPT_SEED, SUITES, TUNING_SEED, Setting, Suite
from accel.methods import METHODS, StepCache
from accel.runtime.generate import Video
from accel.runtime.models import TINY, ModelDefaults
from accel.world.scene import held_out_prompts


def test_results_of_another_model_or_machine_have_another_key(pipe, monkeypatch):
    settings = {"baseline": Setting(), "fastercache": Setting("fastercache")}
    key = lambda model: settings_keys(settings, model, pipe, ModelDefaults())
    first = key("some/model")
    assert first == key("some/model") and not {*first.values()} & {*key("some/other").values()}
    monkeypatch.setattr(measure, "environment", lambda _: {"device": "another"})
    assert not {*first.values()} & {*key("some/model").values()}


def test_a_students_files_change_the_key_of_its_settings_alone(pipe, students, tmp_path):
    settings = {"baseline": Setting(), "gpd": Setting("gpd")}
    keys = lambda: settings_keys(settings, str(tmp_path), pipe, ModelDefaults())
    before = keys()
    (tmp_path / "gpd-N6" / "gpd.json").write_text("{}")
    assert keys()["baseline"] == before["baseline"] and keys()["gpd"] != before["gpd"]


def test_solver_shift_and_noise_change_the_key(pipe):
    settings = {i: Setting(steps=8, **solver) for i, solver in enumerate(({}, {"solver": "euler"}, {"shift": 5.0}))}
    settings["noise"] = Setting(steps=8, noise=0.01)
    assert len({*settings_keys(settings, "m", pipe, ModelDefaults()).values()}) == 4


def test_a_share_of_the_initial_noise_is_replaced_inside_the_context_only(pipe):
    prepare = lambda: pipe.prepare_latents(1, 4, 64, 64, 5, torch.float32, "cpu", torch.Generator().manual_seed(0))
    own = prepare()
    with measure.perturbed_noise(pipe, 0.1):
        mixed = prepare()
    with measure.perturbed_noise(pipe, 0.0):
        assert torch.equal(prepare(), own)
    assert torch.equal(prepare(), own) and vars(pipe).get("prepare_latents") is None
    assert (mixed - own).norm() / own.norm() == pytest.approx(0.1, rel=0.1)
    assert mixed.var() == pytest.approx(own.var(), rel=0.02)


@pytest.fixture
def generated(pipe, monkeypatch):
    """Prompt, seed and steps of the runs that were generated; each takes as many seconds as steps."""
    seen = []

    def generate(run, *_):
        if "peer" in run.methods:
            raise AccelError("Peer cannot run here")
        seen.append((run.prompt, run.seed, run.steps))
        frames = np.full((5, 16, 16, 3), 10 * run.steps, np.uint8)
        trace = SimpleNamespace(flops_computed_and_full=lambda: (run.steps, run.steps))
        return Video(frames, torch.ones(1, 4, 3, 2, 2), {"denoise": float(run.steps), "decode": 0.1}, trace)

    monkeypatch.setattr(bench, "load_pipeline", lambda model: pipe)
    monkeypatch.setattr(bench, "model_defaults", lambda *_: ModelDefaults(height=16, width=16, frames=5, steps=4))
    monkeypatch.setattr(bench, "metrics_of", lambda _: [METRICS[name] for name in ("ssim", "ssim_worst", "psnr")])
    monkeypatch.setattr(bench, "plot_summary", lambda *_: None)
    monkeypatch.setattr(measure, "generate", generate)
    monkeypatch.setattr(measure, "warm_up", lambda *_: None)
    monkeypatch.setattr(bench, "overheads", lambda *_: [0.0])
    monkeypatch.setitem(SUITES, "small", Suite({"baseline": Setting(), "fewer": Setting(steps=2)}))
    return seen


def test_a_line_that_stands_twice_in_the_log_counts_once(generated, tmp_path):
    first = bench.run_suite("small", 2, 1, "m", tmp_path)
    log = tmp_path / "results.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines, lines[0], lines[1], lines[1]]))
    again = bench.run_suite("small", 2, 1, "m", tmp_path)
    assert again == first and len(generated) == 4


def test_a_setting_for_which_the_memory_is_too_small_is_left_out_and_the_others_are_measured(
    generated, tmp_path, monkeypatch
):
    known = measure.generate

    def generate(run, *rest):
        if run.steps == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return known(run, *rest)

    monkeypatch.setattr(measure, "generate", generate)
    monkeypatch.setitem(
        SUITES, "small", Suite({"baseline": Setting(), "large": Setting(steps=3), "fewer": Setting(steps=2)})
    )
    found = bench.run_suite("small", 2, 1, "m", tmp_path)
    assert [*found["rows"]] == ["baseline", "fewer"]
    assert found["refused"] == {"large": "there is not enough memory for large"}


def test_each_prompt_has_noises_of_its_own_that_no_tuning_has_seen_and_more_prompts_change_none():
    cases = bench.report_cases(["p", "q"], 2)
    assert cases == [("p", 1), ("q", 2), ("p", 1001), ("q", 1002)] and cases[:2] == bench.report_cases(["p", "q"], 1)
    assert bench.TUNING_NOISE not in dict(cases).values()


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": {}}'])
def test_results_that_no_bench_wrote_are_refused_in_a_sentence(text, generated, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(AccelError, match="results.json was not written by `accel bench`: give another --out"):
        bench.run_suite("small", 1, 1, "m", tmp_path)


def test_a_suite_is_resumed_and_fewer_results_do_not_replace_more(generated, tmp_path, monkeypatch):
    bench.run_suite("small", 2, 1, "m", tmp_path)
    assert [steps for *_, steps in generated] == [4, 2, 4, 2]
    summary = bench.run_suite("small", 2, 2, "m", tmp_path)
    assert len(generated) == 8 and {seed for _, seed, _ in generated[4:]} == {1001, 1002}
    assert summary["n"] == 4 and summary["rows"]["fewer"]["speedup"] == 2.0
    with pytest.raises(ValueError, match="holds results of 4 videos of 2 prompts, more than 2 of 2: give"):
        bench.run_suite("small", 2, 1, "m", tmp_path)
    with pytest.raises(ValueError, match="holds results of 4 videos of 2 prompts, more than 4 of 1: give"):
        bench.run_suite("small", 1, 4, "m", tmp_path)
    monkeypatch.setitem(SUITES, "small", Suite({"baseline": Setting()}))
    with pytest.raises(ValueError, match="holds results of the settings fewer"):
        bench.run_suite("small", 2, 2, "m", tmp_path)
    assert len(generated) == 8


def test_of_groups_only_the_best_on_the_tuning_prompts_are_measured_on_the_others(generated, tmp_path, monkeypatch):
    settings = {"baseline": Setting(), NOISE_FLOOR: Setting(noise=0.01), NEUTRAL: Setting(guidance=1.0)}
    ours = {"half": Setting(steps=2), "as good and later": Setting(steps=2, guidance=2.0), "quarter": Setting(steps=1)}
    monkeypatch.setitem(SUITES, "small", Suite({**settings, **ours}, groups={"ours": tuple(ours)}))
    monkeypatch.setattr(bench, "FINALISTS", 1)
    summary = bench.run_suite("small", 2, 1, "m", tmp_path)
    assert [*summary["rows"]] == [*settings, "half", "quarter"] and (summary["tried"], summary["prompts"]) == (3, 2)
    assert [found["best"].get("ours") for found in summary["classes"]] == ["half"] * 2 + ["quarter"] * 2 + [None] * 4
    few, final, reported = (held_out_prompts(*some) for some in ((3, TUNING_SEED), (6, TUNING_SEED), (2, PROMPT_SEED)))
    assert {prompt for prompt, *_ in generated} == {*final, *reported} and not {*final} & {*reported}
    assert few == final[:3] and (summary["finalists"], summary["final_prompts"]) == (2, 6)
    count = 3 * 6 + 3 * 3 + 2 * 5  # all on three, the baseline and two finalists on three more, what is reported
    assert len(generated) == count
    assert bench.run_suite("small", 2, 1, "m", tmp_path) == summary and len(generated) == count


def test_what_a_suite_compares_in_pairs_is_measured_even_if_it_is_not_the_best(generated, tmp_path, monkeypatch):
    settings = {"baseline": Setting(), NOISE_FLOOR: Setting(noise=0.01), NEUTRAL: Setting(guidance=1.0)}
    ours = {"half": Setting(steps=2), "as good and later": Setting(steps=2, guidance=2.0)}
    monkeypatch.setitem(SUITES, "small", Suite({**settings, **ours}, (tuple(ours),), {"ours": tuple(ours)}))
    summary = bench.run_suite("small", 2, 1, "m", tmp_path)
    assert [*summary["rows"]] == [*settings, *ours] and summary["pairs"][0]["b"] == "as good and later"


def test_tables_say_how_many_noises_their_prompts_begin_with():
    shared = {"device": "cpu", "threads": 1, "dtype": "float32", "rows": {}}
    said = lambda **about: conditions({**shared, **about}).split(", cpu")[0]
    assert said(n=2, prompts=2, noises=2) == "n = 2 held-out prompts, each from noise of its own"
    assert said(n=2, prompts=2, noises=1) == "n = 2 held-out prompts, all from one noise"
    assert said(n=2) == "n = 2 held-out prompts" and said(n=1, prompts=1, noises=1) == "n = 1 held-out prompt"
    assert said(n=6, prompts=2, noises=6) == "n = 6: 2 held-out prompts x 3 noises, each from noise of its own"
    assert said(n=6, prompts=2, noises=3) == "n = 6: 2 held-out prompts x 3 noises, the same for all"
    cases = [{**_case(prompt, a=1.0), "seed": seed} for seed, prompt in enumerate("pq")]
    assert summarize(cases)["noises"] == 2


def test_a_new_setting_of_a_suite_is_measured_and_the_others_keep_their_lines(generated, tmp_path, monkeypatch):
    settings = {"baseline": Setting(), "fewer": Setting(steps=2)}
    bench.run_suite("small", 1, 1, "m", tmp_path)
    monkeypatch.setitem(SUITES, "small", Suite(settings | {"fewest": Setting(steps=1)}))
    generated.clear()
    summary = bench.run_suite("small", 1, 1, "m", tmp_path)
    assert [steps for *_, steps in generated] == [4, 1]  # the baseline of its turn, and itself
    assert summary["rows"]["fewest"]["speedup"] == 4.0 and summary["rows"]["fewer"]["speedup"] == 2.0


def test_with_another_baseline_all_settings_are_measured_again(generated, tmp_path, monkeypatch):
    bench.run_suite("small", 1, 1, "m", tmp_path)
    monkeypatch.setitem(SUITES, "small", Suite({"baseline": Setting(steps=8), "fewer": Setting(steps=2)}))
    generated.clear()
    assert bench.run_suite("small", 1, 1, "m", tmp_path)["rows"]["fewer"]["speedup"] == 4.0
    assert [steps for *_, steps in generated] == [8, 2]


def test_a_new_choice_replaces_the_results_of_the_one_before(generated, tmp_path, monkeypatch):
    settings = {"baseline": Setting(), NOISE_FLOOR: Setting(noise=0.01), NEUTRAL: Setting(guidance=1.0)}
    suite = lambda **ours: Suite({**settings, **ours}, groups={"ours": tuple(ours)})
    half = Setting(steps=2)
    monkeypatch.setitem(SUITES, "small", suite(half=half))
    assert [*bench.run_suite("small", 1, 1, "m", tmp_path)["rows"]] == [*settings, "half"]
    first = Setting(steps=2, shift=2.0)  # as good, and named first
    monkeypatch.setitem(SUITES, "small", suite(first=first, half=half))
    assert [*bench.run_suite("small", 1, 1, "m", tmp_path)["rows"]] == [*settings, "first"]


def test_a_missing_setting_is_measured_against_a_baseline_that_is_generated_again(generated, tmp_path):
    bench.run_suite("small", 1, 1, "m", tmp_path)
    log = tmp_path / "results.jsonl"
    log.write_text(log.read_text()[:-9])  # killed in the middle of the last line
    summary = bench.run_suite("small", 1, 1, "m", tmp_path)
    assert [steps for *_, steps in generated] == [4, 2, 4, 2] and summary["n"] == 1
    assert len(log.read_text().splitlines()) == 2


def test_two_processes_share_the_work_and_give_the_table_of_one(generated, tmp_path):
    alone = bench.run_suite("small", 3, 1, "m", tmp_path / "one")
    barrier = Barrier(2)
    state = lambda i: SimpleNamespace(
        process_index=i, num_processes=2, is_main_process=i == 0, wait_for_everyone=partial(barrier.wait, 60)
    )
    measured = []

    def run(i: int) -> dict:
        return bench.run_suite("small", 3, 1, "m", tmp_path / "two", state(i))

    with ThreadPoolExecutor(2) as pool:
        for _ in range(2):  # the second time, what one line of the first process and all of the second's hold is there
            generated.clear()
            shared, other = pool.map(run, (0, 1))
            measured.append(sorted(generated))
            log = tmp_path / "two" / "results.jsonl"
            lines = log.read_text().splitlines(keepends=True)
            log.write_text(lines[0])
            log.with_name("results-1.jsonl").write_text("".join(lines[3:]) + lines[1][:-9])
    assert {**shared, "out": 0} == {**alone, "out": 0} and other == {}
    first, second, third = held_out_prompts(3, PROMPT_SEED)
    half = [(second, 2, 4)]  # the baseline of the prompt that both have a part of
    assert measured[0] == sorted([(p, i, n) for i, p in enumerate((first, second, third), 1) for n in (4, 2)] + half)
    assert measured[1] == sorted([(first, 1, 4), (first, 1, 2), (second, 2, 4)])


def test_a_setting_that_the_model_refuses_is_left_out_and_the_reason_is_kept(generated, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "preflight", lambda run, pipe: refuse() if run.solver == "euler" else None)
    refuse = lambda: (_ for _ in ()).throw(AccelError("no Euler here"))
    suite = Suite({"baseline": Setting(), "euler": Setting(solver="euler")}, (("baseline", "euler"),))
    monkeypatch.setitem(SUITES, "small", suite)
    summary = bench.run_suite("small", 1, 1, "m", tmp_path)
    assert summary["refused"] == {"euler": "no Euler here"} and list(summary["rows"]) == ["baseline"]


def test_a_refused_setting_that_is_called_like_a_method_takes_no_other_with_it(generated, tmp_path, monkeypatch):
    def refuse_euler(run, pipe):
        if run.solver == "euler":
            raise AccelError("no Euler here")

    monkeypatch.setattr(measure, "preflight", refuse_euler)
    settings = {"baseline": Setting(), "stepcache": Setting(solver="euler"), "fewer": Setting("stepcache", steps=2)}
    monkeypatch.setitem(SUITES, "small", Suite(settings))
    assert list(bench.run_suite("small", 1, 1, "m", tmp_path)["rows"]) == ["baseline", "fewer"]


def test_a_peer_that_the_model_refuses_is_left_out_and_the_reason_is_kept(generated, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "peer", type("Peer", (StepCache,), {"peer": True}))
    peers = {name: Setting(overrides={"peer": {}}, steps=n) for name, n in (("peer", 4), ("peer, fewer", 2))}
    monkeypatch.setitem(SUITES, "small", Suite({"baseline": Setting(), **peers}))
    summary = bench.run_suite("small", 1, 1, "m", tmp_path)
    assert summary["refused"] == {"peer": "Peer cannot run here"} and list(summary["rows"]) == ["baseline"]


def _timed(prompt, **rows):
    """A case with seconds and FLOPs of each setting."""
    same = {"decode": 0.1, "psnr": None, "ssim": 1.0, "ssim_worst": 0.5}
    same["baseline_denoise"] = next(iter(rows.values()))[0]
    return {"prompt": prompt, "rows": {name: {"denoise": s, "flops": f, **same} for name, (s, f) in rows.items()}}


def test_half_the_time_is_twice_the_speed_and_half_the_flops_half_the_work():
    cases = [_timed("p", a=(4.0, 8), b=(2.0, 4)), _timed("q", a=(8.0, 8), b=(4.0, 4))]
    summary = summarize(cases, [("b", "a")])
    row = summary["rows"]["b"]
    assert (row["speedup"], row["work"], row["efficiency"], row["seconds"]) == (2.0, 0.5, 1.0, 3.0)
    assert summary["pairs"][0]["speed"] == 2.0


def test_each_setting_is_as_fast_as_the_baseline_of_its_own_turn_says():
    (case,) = [_timed("p", a=(4.0, 8), b=(2.0, 4))]
    case["rows"]["b"]["baseline_denoise"] = 6.0  # measured on a slower day than a
    assert summarize([case])["rows"]["b"]["speedup"] == 3.0


def _case(prompt, **ssim):
    same = {"decode": 0.1, "flops": 8, "psnr": None, "ssim_worst": 0.5, "baseline_denoise": 2.0}
    return {"prompt": prompt, "rows": {name: {"denoise": 2.0, "ssim": s, **same} for name, s in ssim.items()}}


def test_seeds_of_one_prompt_are_averaged_before_an_interval_is_computed():
    cases = [_case("p", a=1.0, b=0.8), _case("p", a=1.0, b=0.4), _case("q", a=1.0, b=0.6), _case("q", a=1.0, b=0.6)]
    summary = summarize(cases, [("b", "a")])
    assert summary["rows"]["b"]["ssim"] == pytest.approx((0.6, 0.6, 0.6))  # both prompts have 0.6
    conditions = {"device": "cpu", "threads": 1, "dtype": "float32"}
    assert summary["n"] == 4 and "n = 4: 2 held-out prompts x 2 noises" in table({**summary, **conditions}, "report")
    assert table({**summary, **conditions, "model": "models/other"}, "report").startswith("other, n = 4: ")
    assert table({**summary, **conditions, "model": TINY}, "report").startswith("n = 4: ")


def test_attributes_that_only_some_prompts_name_have_their_mean_over_those():
    cases = [_case("p", a=1.0), _case("q", a=1.0), _case("r", a=1.0)]
    read = ({"mean": 1.0, "shape": 1.0}, None, {"mean": 0.5, "shape": 1.0, "second_shape": 0.0})
    for case, adherence in zip(cases, read, strict=True):
        case["rows"]["a"]["adherence"] = adherence
    summary = summarize(cases)
    means = {name: value[0] for name, value in summary["rows"]["a"]["attributes"].items()}
    assert means == {"shape": 1.0, "second_shape": 0.0}
    assert summarize(cases[1:2])["rows"]["a"]["attributes"] == {}
    conditions = {"device": "cpu", "threads": 1, "dtype": "float32"}
    assert "| second_shape |" in table({**summary, **conditions}, "details")
    assert table({**summarize(cases[1:2]), **conditions}, "details")


def test_values_that_are_not_defined_are_left_out_of_a_mean():
    cases = [_case("p", a=1.0), _case("q", a=1.0), _case("r", a=1.0)]
    for case, psnr in zip(cases, (None, 30.0, 40.0), strict=True):
        case["rows"]["a"]["psnr"] = psnr
    assert summarize(cases)["rows"]["a"]["psnr"][0] == 35
    assert summarize(cases[:1])["rows"]["a"]["psnr"] is None


def test_pairs_are_compared_prompt_by_prompt():
    cases = [_case("p", a=0.9, b=0.8), _case("q", a=0.5, b=0.4)]  # far apart between prompts, never between settings
    (pair,) = summarize(cases, [("b", "a"), ("b", "not measured")])["pairs"]
    assert pair["ssim"] == pytest.approx((-0.1, -0.1, -0.1)) and pair["speed"] == 1
    assert "| b | a | 1.00 | -0.1000 [-0.1000, -0.1000] |" in pairs_table({"pairs": [pair]})
