"""The History tab: whose pairs it shows, what it says of them, selecting, opening, deleting."""

import re
from datetime import UTC, datetime
from types import SimpleNamespace

import gradio as gr
import pytest

from ui.context import Context
from ui.history_tab import SHOWN, HistoryTab, age, figures, gallery, still
from ui.run_words import differences, run_of
from ui.store import Store

RUN = {"steps": 50, "guidance": 4.0, "methods": {}}
REPORT = {
    "model": "m", "prompt": "a red star", "seed": 1, "height": 64, "width": 64, "frames": 17, **RUN,
    "methods": {"fastercache": {"attention_interval": 2}}, "steps_a": 50, "guidance_a": 4.0, "reference": RUN,
    "speedup_denoise": 1.604, "ssim": 0.9988, "bit_equal": False,
    "race": {"b": {"columns": 8, "frames": 50}},
}  # fmt: skip
FILES = {"a.mp4": b"a", "b.mp4": b"b"}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def tab(store):
    with gr.Blocks(), gr.Tab():
        tab = HistoryTab(Context("m", None, store, owner_key="key"))
    tab.page = SimpleNamespace(
        compare=SimpleNamespace(show_stored=lambda *a: ("one", *a), show_two=lambda *a: ("two", *a))
    )
    return tab


def request(**query) -> SimpleNamespace:
    return SimpleNamespace(query_params=query)


def ids(html: str) -> list[str]:
    return re.findall(r'data-id="(\w+)"', html)


def test_a_visitor_sees_the_own_pairs_newest_first_and_the_owner_all(tab, store):
    mine, other, newest = (store.add(visitor, REPORT, FILES) for visitor in ("me", "other", "me"))
    shown = lambda visitor, **query: ids(tab.refresh(visitor, "", SHOWN, request(**query))[tab.gallery])
    assert shown("me") == [newest, mine] and shown("me", owner="wrong") == [newest, mine]
    assert shown("me", owner="key") == [newest, other, mine]
    assert shown("") == [] and shown(None) == []


def test_without_an_owner_key_nobody_is_the_owner(store):
    assert not Context("m", None, store).is_owner(request(owner=""))


def test_an_empty_history_says_what_to_do(tab):
    assert "Press Run in the Compare tab" in tab.refresh("me", "", SHOWN, request())[tab.gallery]


def test_a_tile_has_prompt_settings_figures_and_clip_and_nothing_in_it_is_html(store):
    run_id = store.add("me", {**REPORT, "prompt": "<script>x</script>"}, FILES, group="sweep")
    html = gallery(store.list("me"), 1)
    for text in ("fastercache, 50 steps", "against plain, 50 steps", "1.60× · SSIM 0.999", "from a sweep",
                 f'src="runs/{run_id}/b.mp4"', "&lt;script&gt;"):  # fmt: skip
        assert text in html
    assert "<script" not in html and "visitor" not in html
    assert "visitor me" in gallery(store.list("me"), 1, of_all=True)


def test_only_the_newest_clips_play_and_the_number_of_all_is_told(store):
    for _ in range(13):
        store.add("me", REPORT, FILES)
    html = gallery(store.list("me"), 40)
    assert html.count("<video") == 12 and html.count("background-image") == 13 and "newest 13 of 40" in html


def test_the_still_is_the_last_preview_of_the_sheet(store):
    store.add("me", REPORT, FILES)
    (stored,) = store.list("me")
    assert "background-size: 800% 700%" in still(stored)  # 50 previews, 8 in a row
    assert "background-position: 14.29% 100.00%" in still(stored)  # number 50 is the second of the seventh row
    store.add("me", {**REPORT, "race": None}, FILES)
    assert still(store.list("me")[0]) == ""


def test_one_result_can_be_opened_two_compared_any_number_deleted(tab, store):
    older, newer, third = (store.add("me", REPORT, FILES) for _ in range(3))
    allowed = lambda update: [update[button]["interactive"] for button in (tab.open, tab.compare, tab.delete)]
    assert allowed(tab.select([])) == [False, False, False]
    assert allowed(tab.select([newer])) == [True, False, True]
    two = tab.select([newer, older])  # as they are on the page: newest first
    assert allowed(two) == [False, True, True] and two[tab.selected] == [older, newer]
    assert "same settings" in two[tab.differences]
    assert allowed(tab.select([third, newer, older])) == [False, False, True]
    assert tab.open_selected([older]) == ("one", older)
    assert tab.compare_selected([older, newer]) == ("two", older, newer)


def test_a_selection_that_was_deleted_elsewhere_is_told(tab, store):
    kept, gone = (store.add("me", REPORT, FILES) for _ in range(2))
    store.delete([gone], "me")
    assert "no longer stored" in tab.select([gone, kept])[tab.differences]


def test_a_gallery_that_has_not_changed_is_left_alone(tab, store):
    store.add("me", REPORT, FILES)
    seen = tab.refresh("me", "", SHOWN, request())[tab.seen]
    assert set(tab.refresh("me", seen, SHOWN, request())) == {tab.message}
    store.add("me", REPORT, FILES)
    assert tab.gallery in tab.refresh("me", seen, SHOWN, request())


def test_older_results_are_shown_on_request(tab, store):
    ids_of_three = [store.add("me", REPORT, FILES) for _ in range(3)]
    few, all_of_them = (tab.refresh("me", "", limit, request()) for limit in (2, 3))
    assert ids(few[tab.gallery]) == ids_of_three[:0:-1] and few[tab.older]["visible"]
    assert ids(all_of_them[tab.gallery]) == ids_of_three[::-1] and not all_of_them[tab.older]["visible"]


def test_deleting_takes_the_own_selection_and_all_only_what_is_ones_own(tab, store):
    first, second, other = (store.add(visitor, REPORT, FILES) for visitor in ("me", "me", "other"))
    update = tab.delete_selected([first, other], "me", SHOWN, request())
    assert ids(update[tab.gallery]) == [second] and "1 result deleted" in update[tab.message]
    assert "Delete all of your results (1)?" in tab.ask("me", request())[tab.question]
    tab.delete_everything("me", request())
    assert [stored.id for stored in store.list(None)] == [other]
    assert "all visitors" in tab.ask("me", request(owner="key"))[tab.question]
    tab.delete_everything("me", request(owner="key"))
    assert store.list(None) == []


def test_programs_list_and_delete_only_a_visitors_own_pairs(tab, store):
    run_id = store.add("me", REPORT, FILES)
    (entry,) = tab.history("me")
    assert (entry["run_id"], entry["candidate"], entry["ssim"]) == (run_id, "fastercache, 50 steps", 0.9988)
    assert entry["files"]["b.mp4"] == f"runs/{run_id}/b.mp4"
    assert tab.history("other") == tab.history("") == tab.history(None) == tab.history("me", 0) == []
    assert tab.delete_run("other", run_id) == tab.delete_run(None, run_id) == {"deleted": 0}
    assert tab.delete_run("me", run_id) == {"deleted": 1}


def test_what_differs_is_listed_with_defaults_filled_in():
    other = {**REPORT, "seed": 2, "methods": {"fastercache": {"attention_interval": 4, "attention_start": 0.14}},
             "reference": {**RUN, "steps": 30}}  # fmt: skip
    assert differences(REPORT, other) == [
        ("seed", "1", "2"), ("fastercache.attention_interval", "2", "4"), ("reference steps", "50", "30")
    ]  # fmt: skip
    assert differences(REPORT, {**REPORT, "methods": {}}) == [("methods", "fastercache", "none")]
    gone = {**REPORT, "methods": {"a method of before": {"x": 1}}}
    assert differences(gone, gone) == [] and differences(REPORT, REPORT) == []


def test_a_report_without_the_references_run_had_the_stock_pipeline():
    without = {key: value for key, value in REPORT.items() if key != "reference"}
    assert RUN.items() <= run_of({**without, "steps_a": 50, "guidance_a": 4.0}, "a").items()


def test_figures_say_identical_and_leave_out_what_was_not_measured():
    assert figures({"speedup_denoise": 1.2, "bit_equal": True, "ssim": 1.0}) == "1.20× · identical"
    assert figures({"speedup_denoise": None, "ssim": None}) == ""


@pytest.mark.parametrize(
    "created, words",
    [("12:00:00", "just now"), ("11:59:00", "1 minute ago"), ("10:00:00", "2 hours ago"), ("12:00:30", "just now")],
)
def test_age_in_words(created, words):
    assert age(f"2026-01-01T{created}+00:00", datetime(2026, 1, 1, 12, tzinfo=UTC)) == words
