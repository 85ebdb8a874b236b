"""The player in a real browser, alone on a page, with synthetic videos whose brightness tells their frame."""

from contextlib import contextmanager
from functools import cache

import pytest
from browser import MARKS, collect_errors
from player_page import FPS, FRAMES, LEVELS, STEPS, TOTALS, serve

from ui.player import Player, pair_value

pytestmark = MARKS
LEVEL_OF = """(video) => {
    const pen = new OffscreenCanvas(8, 8).getContext('2d');
    pen.drawImage(video, video.videoWidth - 16, video.videoHeight - 16, 8, 8, 0, 0, 8, 8);
    return pen.getImageData(4, 4, 1, 1).data[0];
}"""
PLAYING = "[...document.querySelectorAll('#player video')].every((v) => v.currentTime > 0.3)"
SETTLED = "[...document.querySelectorAll('#player video')].every((v) => !v.seeking && v.readyState > 1)"
VIEW = "#player button[data-mode={}]"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    demo = serve(tmp_path_factory.mktemp("player"))
    yield demo.local_url
    demo.close()


@pytest.fixture(scope="module")
def context(browser):
    """context(width, motion, touch): a browser context; equal ones are shared, so that Gradio's files load once."""
    return cache(
        lambda width=1280, motion="reduce", touch=False: browser.new_context(
            viewport={"width": width, "height": 900}, reduced_motion=motion, has_touch=touch
        )
    )


@contextmanager
def visit(context, url):
    """A visitor's page; it must end without an error in the console."""
    page = context.new_page()
    errors = collect_errors(page)
    page.goto(url)
    page.wait_for_selector("#player video", state="attached", timeout=30_000)
    page.wait_for_function(SETTLED)
    yield page
    page.close()
    assert errors == []


@pytest.fixture
def page(context, url):
    """A visitor who asked for little motion, so that nothing plays by itself."""
    with visit(context(), url) as page:
        yield page


@pytest.fixture
def moving(context, url):
    """A visitor without that wish."""
    with visit(context(motion="no-preference"), url) as page:
        yield page


@pytest.fixture
def phone(context, url):
    """A visitor with a phone."""
    with visit(context(width=390, touch=True), url) as page:
        yield page


def show(page, name: str, panes: int) -> None:
    """Give the first player another value, and wait until it has that many panes."""
    page.click(f"#set-{name}")
    page.wait_for_function(f"document.querySelectorAll('#player video').length === {panes}")
    page.wait_for_function(SETTLED)


def shown_levels(page) -> list[int]:
    page.wait_for_function(SETTLED)
    return page.evaluate(f"[...document.querySelectorAll('#player video')].map({LEVEL_OF})")


def frame_of(level: int) -> int:
    return int(abs(LEVELS - level).argmin())


def count(page) -> str:
    return page.inner_text("#player .count")


def mode(page, player: str = "#player") -> str:
    return page.get_attribute(f"{player} .player", "data-mode")


def style(page, name: str) -> str:
    return page.evaluate(f"document.querySelector('#player .player').style.getPropertyValue('{name}')")


# ---- one clock


def test_videos_stay_within_a_frame_of_each_other_while_they_play_and_repeat(moving):
    show(moving, "four", 4)
    moving.wait_for_function(PLAYING)
    lags = moving.evaluate("""() => new Promise((resolve) => {
        const videos = [...document.querySelectorAll('#player video')], lags = [];
        let before = 0, turns = 0;
        const look = () => {
            const times = videos.map((v) => v.currentTime);
            if (videos.every((v) => !v.seeking)) lags.push(Math.max(...times) - Math.min(...times));
            if (times[0] < before) turns += 1;
            before = times[0];
            turns < 3 ? requestAnimationFrame(look) : resolve(lags);
        };
        look();
    })""")
    lags = sorted(lags)
    assert lags[len(lags) // 2] < 0.5 / FPS and lags[int(0.95 * len(lags))] < 1 / FPS  # another process tests too


def test_each_step_shows_exactly_the_next_frame_in_every_pane_and_the_last_frame_is_the_end(page):
    show(page, "three", 3)
    for frame in range(FRAMES):
        assert count(page) == f"{frame + 1} / {FRAMES}"
        assert {frame_of(level) for level in shown_levels(page)} == {frame}
        page.click("#player [data-do=next]")
    assert count(page) == f"{FRAMES} / {FRAMES}"
    times = page.evaluate("[...document.querySelectorAll('#player video')].map((v) => v.currentTime)")
    assert all((FRAMES - 1) / FPS < time <= FRAMES / FPS for time in times)


def test_pause_leaves_all_videos_on_the_same_frame(moving):
    moving.wait_for_function(PLAYING)
    moving.click("#player [data-do=play]")
    levels = shown_levels(moving)
    assert {frame_of(level) for level in levels} == {int(count(moving).split()[0]) - 1}


def test_without_repeat_the_videos_end_on_the_last_frame(moving):
    moving.click("#player [data-do=loop]")
    moving.wait_for_selector("#player .player:not([data-playing])", timeout=20_000)
    assert {frame_of(level) for level in shown_levels(moving)} == {FRAMES - 1}


def test_nothing_plays_by_itself_for_a_visitor_who_wants_little_motion(page):
    assert count(page) == f"1 / {FRAMES}" and page.locator("#player [data-playing]").count() == 0
    page.click("#player [data-do=play]")
    page.wait_for_function(PLAYING)


# ---- views


def test_the_difference_is_amplified_and_against_the_chosen_candidate(page):
    show(page, "four", 4)
    page.click(VIEW.format("difference"))
    square = "(c) => [...c.getContext('2d').getImageData(20, 120, 1, 1).data].slice(0, 3)"
    reds = {}
    for pane, letter in ((1, "b"), (3, "d")):
        page.click(f"#player .{letter} .choose")
        reds[pane] = page.eval_on_selector("#player canvas", square)
    assert abs(reds[1][1] - 20) < 8 and abs(reds[3][1] - 60) < 8 and max(reds[3][0], reds[3][2]) < 8
    page.select_option("#player .factor", "8")
    assert style(page, "--factor") == "8"


def test_a_drag_moves_the_line_of_the_wipe(page):
    page.click(VIEW.format("wipe"))
    box = page.locator("#player .divider").bounding_box()
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.5, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.25, y)
    page.mouse.up()
    assert float(style(page, "--wipe").rstrip("%")) == pytest.approx(25, abs=1)
    clip = page.eval_on_selector("#player .b .view", "(view) => getComputedStyle(view).clipPath")
    assert clip.startswith("inset(0px 0px 0px 25")


def test_overlay_and_flicker_show_one_over_the_other_and_swap_changes_which(page):
    opacity = "(view) => getComputedStyle(view).opacity"
    shown = lambda: [page.eval_on_selector(f"#player .{pane} .view", opacity) for pane in "ab"]
    page.click(VIEW.format("over"))
    assert shown() == ["1", "0.5"]
    page.click(VIEW.format("flicker"))
    assert shown() == ["0", "1"]  # by hand, for a visitor who wants little motion
    page.keyboard.press("s")
    assert shown() == ["1", "0"]


def test_in_a_zoomed_wipe_a_drag_moves_the_line_or_else_the_picture(page):
    page.click(VIEW.format("wipe"))
    page.click("#player [data-zoom='2']")
    box = page.locator("#player .divider").bounding_box()
    y = box["y"] + box["height"] / 2
    for begin, end in ((0.5, 0.75), (0.5, 0.25)):
        page.mouse.move(box["x"] + box["width"] * begin, y)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * end, y)
        page.mouse.up()
    assert float(style(page, "--wipe").rstrip("%")) == pytest.approx(75, abs=1)
    assert float(style(page, "--x")) == pytest.approx(0.25 + 0.125, abs=0.01)


def test_flicker_changes_by_itself(moving):
    moving.click(VIEW.format("flicker"))
    for pane in "abab":
        moving.wait_for_selector(f"#player .pane.{pane}[data-top]", state="attached")
    assert moving.locator("#player .pane[data-top]").count() == 1


def test_zoom_and_drag_move_all_pictures_together_and_stay_inside(page):
    page.click("#player [data-zoom='4']")
    box = page.locator("#player .a .view").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 200, box["y"] + 2000, steps=4)
    page.mouse.up()
    assert float(style(page, "--x")) == pytest.approx(0.375 - 100 / box["width"] / 4, abs=0.01)
    assert float(style(page, "--y")) == 0
    transform = "(picture) => getComputedStyle(picture).transform"
    assert len({page.eval_on_selector(f"#player .{pane} .picture", transform) for pane in "ab"}) == 1


def test_the_wheel_zooms_with_control_and_scrolls_the_page_without_it(page):
    page.hover("#player .a .view")
    page.mouse.wheel(0, -300)
    assert style(page, "--zoom") in ("", "1")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -300)
    page.keyboard.up("Control")
    page.wait_for_function("document.querySelector('#player .player').style.getPropertyValue('--zoom') > 1.1")


def test_two_fingers_zoom(phone):
    pinch = """(view) => {
        const { left, top } = view.getBoundingClientRect();
        const fire = (type, id, x) => view.dispatchEvent(new PointerEvent(type, {
            pointerId: id, clientX: left + x, clientY: top + 50, bubbles: true, pointerType: 'touch' }));
        view.closest('.stage').setPointerCapture = () => {};
        fire('pointerdown', 1, 40); fire('pointerdown', 2, 60);
        fire('pointermove', 2, 80);
        fire('pointerup', 1, 40); fire('pointerup', 2, 80);
    }"""
    phone.eval_on_selector("#player .a .view", pinch)
    assert float(style(phone, "--zoom")) == pytest.approx(2)


# ---- quality curve


def test_the_curve_has_a_line_for_each_candidate_and_a_click_on_it_goes_there(page):
    show(page, "three", 3)
    assert page.locator("#player .curve path.b:not(.lowest), #player .curve path.c:not(.lowest)").count() == 2
    box = page.locator("#player .curve").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.5, box["y"] + 10)
    assert count(page) == f"{FRAMES // 2 + 1} / {FRAMES}"


def test_the_worst_frame_is_the_one_with_the_lowest_quality_of_what_is_shown(page):
    show(page, "three", 3)
    label = page.get_attribute("#player .curve", "aria-label")
    b, c = (int(part.rsplit(" ", 1)[1]) for part in label.split("; "))
    page.click("#player [data-do=worst]")
    assert count(page) == f"{c} / {FRAMES}"
    page.click(VIEW.format("wipe"))
    page.keyboard.press("w")
    assert count(page) == f"{b} / {FRAMES}"


# ---- race


def test_a_race_starts_by_itself_and_the_faster_side_is_done_first(moving):
    done = "[...document.querySelectorAll('#player .pane')].map((pane) => pane.hasAttribute('data-done'))"
    moving.click("#set-race")
    first = moving.wait_for_function(f"(() => {{ const done = {done}; return done.some(Boolean) && done }})()")
    assert first.json_value() == [False, False, False, True]  # taken in the page, however busy the machine is
    moving.wait_for_selector("#player .a[data-done]", state="attached", timeout=30_000)
    assert moving.evaluate(done) == [True] * 4
    badges = moving.locator("#player .badge").all_inner_texts()
    assert badges == [f"done in {total:.1f} s" for total in TOTALS]
    moving.wait_for_function(PLAYING)


def test_for_little_motion_a_race_shows_its_end_and_a_button_that_plays_it(page):
    page.click("#set-race")
    page.wait_for_selector("#player .a[data-done]", state="attached")
    assert page.inner_text("#player .b .step") == f"step {STEPS[1]} of {STEPS[1]}"
    page.click("#player .start")
    page.wait_for_selector("#player .a:not([data-done])", state="attached")
    page.wait_for_selector("#player .d[data-done]", state="attached")


def test_playing_goes_on_after_a_race(moving):
    moving.click(VIEW.format("race"))
    moving.wait_for_selector("#player .b[data-done]", state="attached")
    moving.click(VIEW.format("wipe"))
    moving.wait_for_function(PLAYING)
    assert moving.locator("#player [data-playing]").count() == 1


def test_a_paused_race_can_be_stepped_and_scrubbed(page):
    show(page, "race", 4)
    page.eval_on_selector("#player .seek", "(seek) => { seek.value = 100; seek.oninput(); }")
    assert page.locator("#player .clock").all_inner_texts() == ["1.0 s", "1.0 s", "1.0 s", "0.6 s"]
    assert [text.split()[1] for text in page.locator("#player .step").all_inner_texts()] == ["10", "10", "10", "6"]
    page.click("#player [data-do=next]")
    assert page.inner_text("#player .b .clock") == "1.1 s" and page.inner_text("#player .b .step") == "step 11 of 12"


def test_a_pair_without_recorded_previews_has_no_race(page):
    show(page, "race", 4)
    page.click("#set-no-race")
    page.wait_for_selector("#player button[data-mode=race]", state="hidden")
    assert mode(page) == "side"


# ---- keys, and several players on one page


def test_keys_change_the_view(page):
    page.click("#player .stage")
    for key, expected in (("[", "wipe"), ("0", "difference"), ("f", "flicker"), ("f", "side")):
        page.keyboard.press(key)
        assert mode(page) == expected
    page.keyboard.press("2")
    assert page.is_hidden("#player .a .view") and page.is_visible("#player .b .view")
    page.keyboard.press("2")
    page.keyboard.press("+")
    assert style(page, "--zoom") == "2"
    page.keyboard.press("l")
    assert page.get_attribute("#player [data-do=loop]", "aria-pressed") == "false"
    page.keyboard.press("?")
    assert page.is_visible("#player dialog")
    page.keyboard.press("Escape")
    assert page.is_hidden("#player dialog")


def test_keys_go_to_the_player_that_was_used_last(page):
    page.click("#second " + VIEW.format("wipe").removeprefix("#player "))
    page.click("#player " + VIEW.format("over").removeprefix("#player "))
    page.keyboard.press("0")
    assert (mode(page), mode(page, "#second")) == ("difference", "wipe")
    page.focus("#second .seek")
    page.keyboard.press("f")
    assert (mode(page), mode(page, "#second")) == ("difference", "flicker")


def test_keys_that_are_typed_into_a_text_box_change_nothing(page):
    page.click(VIEW.format("wipe"))
    page.click("#text textarea")
    page.keyboard.type("0f ,.rw")
    assert page.input_value("#text textarea") == "0f ,.rw"
    assert mode(page) == "wipe" and count(page) == f"1 / {FRAMES}"


# ---- values


def test_settings_survive_a_new_value(page):
    page.click(VIEW.format("wipe"))
    page.eval_on_selector(
        "#player input.wipe", "(wipe) => { wipe.value = 20; wipe.dispatchEvent(new Event('input')); }"
    )
    page.select_option("#player .rate", "0.5")
    page.click("#player [data-zoom='2']")
    page.click("#player [data-do=loop]")
    show(page, "three", 3)
    assert mode(page) == "wipe" and style(page, "--wipe") == "20%" and style(page, "--zoom") == "2"
    assert page.get_attribute("#player [data-do=loop]", "aria-pressed") == "false"
    page.click("#player [data-do=play]")
    page.wait_for_function("Math.abs(document.querySelector('#player video').playbackRate - 0.5) < 0.06")


def test_labels_are_text(page):
    show(page, "three", 3)
    assert page.inner_text("#player .c .label") == "<b>asymrnr</b>, 50 steps"
    assert page.get_attribute("#player .c video", "aria-label") == "C: <b>asymrnr</b>, 50 steps"


def test_no_value_hides_the_player_and_a_value_brings_it_back(page):
    page.click("#set-nothing")
    page.wait_for_selector("#player .player", state="hidden")
    show(page, "pair", 2)
    assert page.is_visible("#player .stage")


# ---- everyone


def test_every_control_and_every_video_has_a_name(page):
    nameless = """[...document.querySelectorAll('#player :is(button, input, select, video, svg[role], canvas, dialog)')]
        .filter((e) => !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim()))
        .filter((e) => e.checkVisibility()).map((e) => e.outerHTML)"""
    for view in ("side", "wipe", "flicker", "difference", "over", "race"):
        page.click(VIEW.format(view))
        assert page.evaluate(nameless) == []


def test_a_wide_column_shows_two_large_panes(page):
    sides = [page.locator(f"#player .{pane} .view").bounding_box()["width"] for pane in "ab"]
    assert all(400 <= side <= 425 for side in sides)


@pytest.mark.parametrize("value, panes", [("pair", 2), ("three", 3), ("race", 4)])
def test_a_phone_shows_everything_without_scrolling_sideways_and_controls_can_be_touched(phone, value, panes):
    small = """[...document.querySelectorAll('#player :is(button, input, select)')].filter((e) => e.checkVisibility())
        .filter((e) => !e.matches('.choose') && e.getBoundingClientRect().height < 40).map((e) => e.outerHTML)"""
    show(phone, value, panes)
    for view in ("side", "wipe", "difference", "race"):
        phone.click(VIEW.format(view))
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390
        assert phone.evaluate(small) == []


# ---- in Python


def test_the_value_of_a_pair_has_its_urls_curve_and_race():
    report = {"fps": 8, "frames": 2, "height": 16, "width": 32, "ssim_frames": [0.9, 1.0], "race": {"a": None, "b": {}}}
    value = pair_value(report, "runs/x", ("A", "B"), mode="wipe")
    assert [pane["video"] for pane in value["panes"]] == ["runs/x/a.mp4", "runs/x/b.mp4"]
    assert value["curves"][0]["values"] == [0.9, 1.0] and value["mode"] == "wipe"
    assert pair_value({**report, "ssim_frames": None}, "runs/x", ("A", "B"))["curves"] == []
    assert Player(value).value == value
