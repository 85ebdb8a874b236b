"""The Sweep tab: plans, the running sweep, its grid, plot and proposal; pairs are made by a stub that takes no time."""

import queue
import re
import threading
import uuid
from types import SimpleNamespace

import gradio as gr
import pytest

from accel.errors import AccelError
from accel.evaluation.sweep import check_available, expand, parse_axis, parse_axis_option
from accel.methods import METHODS
from accel.runtime.models import TINY, ModelDefaults, read_defaults
from accel.runtime.presets import DEFAULT_PRESET, Preset, load_preset
from accel.runtime.run import Cancelled
from ui.panels import unexpected
from ui.store import Store
from ui.sweep_api import SweepApi
from ui.sweep_grid import sweep_grid
from ui.sweep_job import Result, Sweep, SweepState
from ui.sweep_plan import make_plan, plan_words
from ui.sweep_points import SPEEDS
from ui.sweep_tab import CANDIDATE, FIRST_AXIS, SweepTab, preset_settings

RUN = {"model": TINY, "prompt": "a red star", "seed": 3}
REFERENCE = {"steps": 20, "guidance": 4.0, "methods": {}}
BASE = {"steps": 20, "guidance": 4.0, "methods": {"fastercache": {}}}


def plan(*axes: str, plain: str = "", base: dict = BASE, run: dict = RUN):
    return make_plan(run, REFERENCE, base, [parse_axis_option(axis) for axis in axes], plain)


class InstantWorkers:
    """Runs each job when its events are read; `stop_after` jobs, the visitor presses Stop."""

    def __init__(self):
        self.submitted, self.stop_after, self.full = 0, None, False

    def submit(self, work, visitor, model, goes_on):
        self.submitted += 1
        job = SimpleNamespace(id=uuid.uuid4().hex, stop=threading.Event(), events=queue.SimpleQueue(), work=work)

        def check():
            if job.stop.is_set():
                raise Cancelled

        job.check, job.emit = check, lambda kind, **data: (job.events.put((kind, data)), check())
        self.job = job
        return job

    def stop(self, visitor, job_id=None):
        self.job.stop.set()
        return 1

    def stream(self, job):
        yield "waiting", {"ahead": 1, "loading": False, "seconds": 2.0}
        if self.full:
            yield "refused", {"reason": "20 runs are waiting already: try again later"}
            return
        if self.stop_after is not None and self.submitted > self.stop_after:
            job.stop.set()
        try:
            job.check()
            job.work(job, None, read_defaults(TINY))
            final = "done", {}
        except Cancelled:
            final = "stopped", {}
        except RuntimeError:
            final = "failed", {"reason": unexpected("00ab")}
        while not job.events.empty():
            yield job.events.get()
        yield final

    def pipeline(self, model):
        return None


def report_of(a, b) -> dict:
    """A report in which fewer steps and more reuse are faster and worse."""
    interval = b.methods.get("fastercache", {}).get("attention_interval", 1)
    speed = a.steps / b.steps * interval
    return {
        **b.model_dump(), "steps_a": a.steps, "guidance_a": a.guidance, "reference": a.model_dump(),
        "b": {"denoise": [b.steps / 10]}, "speedup_denoise": speed, "work_ratio": 1 / speed, "bit_equal": False,
        "ssim": 1 - speed / 100, "ssim_worst": 0.9, "psnr": 30.0, "adherence_a": 1.0, "adherence_b": 0.5,
    }  # fmt: skip


@pytest.fixture
def context(monkeypatch, tmp_path):
    """What the tab needs of the page; a guidance interval of 10 is refused, one of 9 fails."""

    def make_pair(job, context, visitor, a, b, pipe, defaults, reporter=None, group=""):
        interval = b.methods.get("fastercache", {}).get("guidance_interval")
        if interval == 10:
            raise AccelError("this cannot run")
        if interval == 9:
            raise RuntimeError
        for pane, run in {"a": a, "b": b}.items():
            reporter(job, pipe, run, pane)(1, None, None)
        return context.store.find(context.store.add(visitor, report_of(a, b), {"b.mp4": b"x"}, group))

    monkeypatch.setattr("ui.compare_job.make_pair", make_pair, raising=False)
    store = Store(tmp_path)
    yield SimpleNamespace(model=TINY, workers=InstantWorkers(), store=store)
    store.close()


def run(sweep: Sweep) -> list[str]:
    return [kind for kind, _ in sweep.events() if kind not in ("waiting", "step")]


def test_a_plan_keeps_the_reference_and_gives_each_cell_its_run():
    sweep = plan("steps=10,15", plain="5")
    pairs = [sweep.runs(cell, read_defaults(TINY)) for cell in sweep.cells]
    assert [(a.steps, b.steps, list(b.methods)) for a, b in pairs] == [
        (20, 10, ["fastercache"]), (20, 15, ["fastercache"]), (20, 5, []),
    ]  # fmt: skip
    assert {a.seed for a, _ in pairs} == {3} == {b.seed for _, b in pairs}


def test_plain_cells_are_guided_where_the_reference_is_a_student_that_is_not():
    student = {"steps": 6, "guidance": 1.0, "methods": {"gpd": {}}}
    sweep = make_plan(RUN, student, BASE, [parse_axis_option("steps=10")], "5")
    reference, plain = sweep.runs(sweep.cells[-1], read_defaults(TINY))
    assert (reference.steps, reference.guidance, plain.steps, plain.guidance) == (6, 1.0, 5, 5.0)


def test_a_seed_axis_gives_each_seed_its_reference():
    sweep = plan("seed=1,2")
    assert [[run.seed for run in sweep.runs(cell, read_defaults(TINY))] for cell in sweep.cells] == [[1, 1], [2, 2]]


@pytest.mark.parametrize(
    "axes, change, sentence",
    [
        (["steps=0"], {}, "steps = 0 is not allowed"),
        ([], {}, "a sweep has one or two axes, not 0"),
        (["preset=gpd", "steps=20"], {}, "steps = 20 is not possible with gpd"),
        (["steps=5"], {"prompt": " "}, "the prompt is empty"),
    ],
)
def test_a_plan_is_refused_before_anything_runs(axes, change, sentence):
    with pytest.raises(AccelError, match=re.escape(sentence)):
        plan(*axes, run={**RUN, **change})


def test_the_size_tells_results_steps_and_time_before_the_start():
    sweep = plan("steps=10,15", plain="5")
    each = lambda seconds, at_most: lambda run: SimpleNamespace(seconds=seconds, at_most=at_most and bool(run.methods))
    start = "3 results and their reference: 50 steps"
    assert plan_words(sweep, each(20.0, True)) == f"{start}, at most about 80 s of denoising."
    assert plan_words(sweep, each(60.0, False)) == f"{start}, about 4 min of denoising."
    assert plan_words(sweep, each(None, True)) == f"{start}." == plan_words(sweep)
    assert plan_words(plan("steps=10")) == "1 result and its reference: 30 steps."


def test_each_result_is_stored_for_the_visitor_as_soon_as_it_is_there(context):
    sweep = Sweep(context, "ann", plan("steps=10,15"))
    counts = [len(context.store.list("ann", group=sweep.state.id)) for kind, _ in sweep.events() if kind == "result"]
    assert counts == [1, 2] and context.store.list("bob") == []
    assert [result.row["speedup"] for result in sweep.state.done] == [2.0, 20 / 15]


def test_stop_keeps_what_is_measured_and_submits_nothing_more(context):
    context.workers.stop_after = 1
    sweep = Sweep(context, "ann", plan("steps=5,10,15"))
    assert run(sweep) == ["result", "ended"]
    assert len(sweep.state.done) == 1 and context.workers.submitted == 2


def test_stop_between_two_settings_ends_the_sweep(context):
    sweep = Sweep(context, "ann", plan("steps=5,10,15"))
    for kind, _ in sweep.events():
        if kind == "result":
            sweep.stop()
    assert len(sweep.state.done) == 1


def test_a_closed_page_stops_the_sweep(context):
    events = Sweep(context, "ann", plan("steps=5,10")).events()
    next(events)
    events.close()
    assert context.workers.job.stop.is_set()


def test_a_setting_that_is_refused_or_fails_does_not_end_the_sweep(context):
    sweep = Sweep(context, "ann", plan("fastercache.guidance_interval=8..10"))
    assert run(sweep) == ["result"] * 3 + ["ended"]
    assert [result.reason for result in sweep.state.results] == [
        "", "An unexpected error occurred. The server's log has it as error 00ab.", "this cannot run",
    ]  # fmt: skip


def test_a_server_that_takes_no_runs_ends_the_sweep_with_the_reason(context):
    context.workers.full = True
    events = list(Sweep(context, "ann", plan("steps=5,10")).events())
    assert events[-1] == ("ended", {"reason": "20 runs are waiting already: try again later", "stopped": False})
    assert context.workers.submitted == 1


def test_a_queue_that_fills_up_in_the_meantime_does_not_end_a_sweep(shared, monkeypatch):
    monkeypatch.setattr("ui.worker.MAX_WAITING", 0)
    refused = "ended", {"reason": "0 runs are waiting already: try again later", "stopped": False}
    assert [*Sweep(shared, "ann", plan("steps=5,10")).events()][-1] == refused
    monkeypatch.setattr("ui.worker.MAX_WAITING", 1)
    events = Sweep(shared, "ann", plan("steps=5,10")).events()
    while next(events)[0] != "result":
        pass
    monkeypatch.setattr("ui.worker.MAX_WAITING", 0)
    assert [kind for kind, _ in events if kind not in ("waiting", "step")] == ["result", "ended"]


@pytest.fixture
def shared(context, workers, monkeypatch):
    """The context with real workers, whose pipeline does nothing."""
    monkeypatch.setattr("accel.runtime.models.model_defaults", lambda pipe, model: ModelDefaults())
    context.workers, workers.models = workers, {TINY: ""}
    return context


def test_another_visitors_run_comes_in_between_two_settings(shared):
    order = []
    events = Sweep(shared, "ann", plan("steps=5,10")).events()
    for kind, _ in events:
        if kind == "result":
            order.append("ann")
            if len(order) == 1:  # the second setting is submitted after this
                shared.workers.submit(lambda *_: order.append("bob"), "bob", TINY)
    assert order == ["ann", "bob", "ann"]


def test_a_sweep_that_waits_is_stopped_at_once(shared):
    begun, free = threading.Event(), threading.Event()
    blocking = shared.workers.submit(lambda *_: (begun.set(), free.wait(60)), "bob", TINY)
    assert begun.wait(60)
    sweep = Sweep(shared, "ann", plan("steps=5,10"))
    kinds = []
    for kind, _ in sweep.events():
        kinds.append(kind)
        if kind == "waiting":
            sweep.stop()
    assert kinds == ["waiting", "ended"] and not blocking.stop.is_set()
    free.set()


def filled(*axes: str, plain: str = "") -> SweepState:
    """A finished sweep whose pairs are not stored."""
    state = SweepState.of(plan(*axes, plain=plain))
    row = {"speedup": 2.0, "work": 0.5, "ssim": 0.98, "bit_equal": False}
    state.results = [Result(f"{i:032x}", row) for i in range(len(state.results))]
    return state


def test_the_grid_has_the_values_as_headings_and_a_button_for_each_result():
    html = str(sweep_grid(filled("fastercache.attention_interval=2,3", "steps=10,15,20", plain="5")))
    assert re.findall(r'<th scope="col">([^<]*)', html) == ["10 steps", "15 steps", "20 steps"]
    assert re.findall(r'<th scope="row">([^<]*)', html) == ["attention interval 2", "attention interval 3"]
    assert html.count('class="clip" data-id=') == 7 and "plain, 5 steps" in html
    name = "Open attention interval 2, 15 steps: 2.00 times as fast, work 50%, SSIM 0.9800"
    assert f'aria-label="{name}"' in html


def test_few_clips_play_and_many_play_under_the_pointer_or_with_the_focus():
    few, many = (str(sweep_grid(filled(f"steps=1..{n}"))) for n in (12, 13))
    assert few.count("onloadeddata") == 12 and "onfocus" not in few
    assert many.count("onmouseenter") == 13 == many.count("onfocus") and "onloadeddata" not in many
    assert all("prefers-reduced-motion" in html for html in (few, many))


def test_the_grid_shows_what_runs_what_waits_and_why_a_setting_was_refused():
    state = SweepState.of(plan("steps=5,10,15"))
    state.results[0] = Result(reason="<b>no</b>")
    html = str(sweep_grid(state, running=1))
    assert "&lt;b&gt;no" in html and "clip running" in html and "clip waiting" in html
    ended = str(sweep_grid(state))
    assert ended.count("<span>not measured</span>") == 2 and "running" not in ended


class Page:
    """A page with a Compare tab of one prompt, whose candidate is FasterCache."""

    def __init__(self, context):
        with gr.Blocks() as self.blocks:
            self.model, self.visitor, prompt = gr.State(TINY), gr.State("ann"), gr.Textbox()
            opened, message = gr.Textbox(), gr.HTML()
            settings = lambda model, values: SimpleNamespace(
                run={**RUN, "model": model, "prompt": values[0]}, reference=REFERENCE, candidate=BASE
            )
            self.compare = SimpleNamespace(
                setting_components=[prompt], outputs=[opened], settings=settings, message=message,
                show_stored=lambda run_id: {opened: run_id},
                load_settings=lambda preset, run, model: {opened: preset}, follow=lambda event: None,
                switched=self.model.change(lambda: None),
            )  # fmt: skip
            with gr.Tabs() as self.tabs, gr.Tab("Sweep"):
                self.sweep = SweepTab(context)
            self.sweep.wire(self)
            self.sweep.add_endpoints()


SHOWN = ("ssim", "measured", False, 0.1)  # quality, speed, earlier results, allowed loss


def values(base=CANDIDATE, plain=False, plain_steps="", first=("steps", "10,5"), second=("", ""), prompt="a red star"):
    return [base, plain, plain_steps, *first, *second, prompt]


@pytest.fixture
def tab(context):
    return Page(context).sweep


def test_the_tab_shows_each_result_as_it_comes_and_proposes_the_fastest_within_the_loss(tab):
    updates = list(tab.run_sweep(*SHOWN, "ann", TINY, *values()))
    assert all(set(update) <= set(tab.outputs) for update in updates)
    results = [update for update in updates if tab.grid in update and tab.plot in update]
    assert [str(update[tab.grid]).count("data-id") for update in results] == [0, 1, 2]
    assert "Finished: 2 of 2 settings are measured" in updates[-1][tab.message]
    state = results[-1][tab.state]
    text, proposed, _ = tab.show_proposal(state, "measured", 0.03, TINY)
    assert "10 steps: 2.00× as fast with 50% of the work" in text and proposed == state.results[0].run_id
    assert tab.use_proposal(proposed, TINY) == tab.page.compare.show_stored(proposed)
    assert tab.show_proposal(state, "by work", 0.1, TINY)[1] == state.results[1].run_id
    assert tab.show_proposal(state, "measured", 0.03, "another/model")[1] == ""
    assert "No measured setting loses at most 0.001" in tab.show_proposal(state, "measured", 0.001, TINY)[0]
    assert not tab.running


def test_before_a_sweep_the_fastest_setting_of_the_search_for_the_model_is_proposed(tab, monkeypatch):
    rows = [
        {"preset": {"steps": 25, "shift": 5.0}, "work": 0.5, "speed": 2.0, "ssim": 0.99},
        {"preset": {"methods": {"gpd": {"steps": 6}}}, "work": 0.12, "speed": 8.33, "ssim": 0.91},
    ]
    searches = {TINY: {"rows": rows, "prompts": ["one", "two"]}}
    monkeypatch.setattr("ui.sweep_tab.tuned", searches.get)
    text, proposed, use = tab.show_proposal(None, "measured", 0.1, TINY)
    assert f"{METHODS['gpd'].title} with steps 6: 8.33× less work, SSIM 0.9100" in text and "2 other prompts" in text
    assert proposed == rows[1]["preset"] and use["interactive"]
    assert next(iter(tab.use_proposal(proposed, TINY).values())).selected == "compare"
    assert Preset(**proposed) in tab.use_proposal(proposed, TINY).values()
    assert "No method, steps 25, shift 5" in tab.show_proposal(None, "measured", 0.02, TINY)[0]
    assert "loses at most 0.001" in tab.show_proposal(None, "measured", 0.001, TINY)[0]
    text, proposed, use = tab.show_proposal(None, "measured", 0.1, "another/model")
    assert "is proposed here" in text and not proposed and not use["interactive"]


def test_what_is_plotted_may_change_during_a_sweep(tab):
    plots = (str(update[tab.plot]) for update in tab.run_sweep(*SHOWN, "ann", TINY, *values()) if tab.plot in update)
    assert next(plots) == ""  # nothing is measured yet
    assert SPEEDS["measured"] in next(plots)
    tab.remember_choices("ann", "ssim", "by work", False, 0.1)
    assert SPEEDS["by work"] in next(plots)


def test_the_sweep_that_a_page_begins_with_is_possible():
    base = {**preset_settings(DEFAULT_PRESET), "model": TINY, "prompt": "a red star", "seed": 1}
    found = expand(base, [parse_axis(*FIRST_AXIS)])
    assert len(found) > 2
    for cell in found:
        check_available(cell, TINY)
        assert list(cell.settings["methods"]) == list(load_preset(DEFAULT_PRESET).methods)


def test_the_base_can_be_a_preset(tab):
    sweep = tab.plan(TINY, values(base="combined"))
    assert list(sweep.cells[0].settings["methods"]) == list(load_preset("combined").methods)
    assert sweep.cells[0].settings["guidance"] == BASE["guidance"]
    with pytest.raises(AccelError, match="no preset '../x'"):
        tab.plan(TINY, values(base="../x"))


def test_the_size_says_why_a_sweep_is_not_possible(tab):
    assert "2 results and their reference" in tab.show_size(TINY, *values())
    assert "note bad" in tab.show_size(TINY, *values(first=("steps", "0")))
    assert "&lt;b&gt;" in tab.show_size(TINY, *values(first=("steps", "<b>")))


def test_a_second_sweep_of_a_visitor_is_refused_while_one_runs(tab):
    first = tab.run_sweep(*SHOWN, "ann", TINY, *values())
    next(first)
    (refused,) = tab.run_sweep(*SHOWN, "ann", TINY, *values())
    assert "a sweep of yours is running already" in refused[tab.message]
    assert "Stopping" in tab.stop_sweep("ann") and "No sweep is running" in tab.stop_sweep("bob")
    assert "Stopped: 0 of 2" in list(first)[-1][tab.message]


def test_the_plot_has_the_sweep_and_on_demand_the_visitors_other_pairs_of_the_prompt(tab):
    list(tab.run_sweep(*SHOWN, "ann", TINY, *values()))
    list(tab.run_sweep(*SHOWN, "ann", TINY, *values(prompt="another prompt")))
    *_, last, _ = tab.run_sweep(*SHOWN, "ann", TINY, *values(first=("steps", "4,8"), plain=True, plain_steps="6"))
    state = last[tab.state]
    shown = lambda earlier: str(tab.show_plot(state, "ssim", "by work", earlier, 0.1, "ann"))
    assert shown(False).count("data-id") == 3 and shown(True).count("data-id") == 5
    assert "earlier results" in shown(True) and "plain steps" in shown(True)
    stored = tab.context.store.list("ann")[-1].report
    other = {**stored, "reference": {**stored["reference"], "steps": 10}}  # SSIM to it is not SSIM to the sweep's
    tab.context.store.add("ann", other, {"b.mp4": b"x"})
    assert shown(True).count("data-id") == 5


def test_another_model_moves_the_axis_only_from_a_method_that_it_lacks(tab, tmp_path):
    (tmp_path / "accel.json").write_text("{}")
    name, axis_values = tab.move_axis("fittedsolver.steps", str(tmp_path))
    assert (name["value"], axis_values) == FIRST_AXIS
    assert tab.move_axis("steps", str(tmp_path)) == tab.move_axis("fittedsolver.steps", TINY) == (gr.skip(), gr.skip())


def test_two_axes_have_a_series_for_each_value_of_the_first(tab):
    axes = {"first": ("fastercache.attention_interval", "2,3"), "second": ("steps", "10,5")}
    *_, last, _ = tab.run_sweep(*SHOWN, "ann", TINY, *values(**axes))
    html = str(last[tab.plot])
    assert ">attention interval 2</span>" in html and ">attention interval 3</span>" in html


def test_a_program_gets_the_results_so_far(context):
    *_, results = SweepApi(context).sweep("a red star", "steps=10,5", candidate={"steps": 20}, reference={"steps": 20})
    assert [(r["label"], r["speedup"]) for r in results] == [("10 steps", 2.0), ("5 steps", 4.0)]
    assert context.store.find(results[0]["run_id"]).report["steps"] == 10
    with pytest.raises(gr.Error, match="steps = 0 is not allowed"):
        list(SweepApi(context).sweep("a red star", "steps=0"))
