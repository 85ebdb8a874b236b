"""The History tab: a visitor's stored pairs as a gallery; open one, compare two, delete."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from accel.errors import AccelError
from ui.clickable import ClickableHTML
from ui.context import Context
from ui.endpoints import add_endpoint
from ui.panels import READ_ALOUD, note
from ui.run_words import differences, run_of
from ui.side_settings import describe_side
from ui.store import Stored
from ui.templating import render

SHOWN = 60  # pairs at first, and more with each "Show older results"
MAX_LIMIT = 400  # pairs that are shown, or that a program gets, at once
PLAYING = 12  # of them; a browser slows down with many videos at once
CSS = (Path(__file__).parent / "history.css").read_text()
DIFFERENCES_CSS = (Path(__file__).parent / "differences.css").read_text()
# Gradio repeats a click that came while the one before was under way with the data of that one: read what is on now.
PRESSED = "() => [[...document.querySelectorAll('.tile[aria-pressed=true]')].map((tile) => tile.dataset.id)]"
HINT = "Select one result to open it, or two to compare their candidates."
Update = dict[gr.blocks.Block, Any]


class HistoryTab:
    """Layout and handlers; create it inside a `gr.Tab`."""

    def __init__(self, context: Context):
        self.context = context
        with gr.Row(elem_id="history") as row:
            with gr.Column(scale=1, min_width=260, elem_id="history-panel"):
                self._add_panel()
            with gr.Column(scale=3, min_width=320):
                self.gallery = ClickableHTML(gallery([], 0), css_template=CSS, elem_id="history-gallery")
                self.older = gr.Button("Show older results", size="sm", visible=False, elem_id="history-older")
        self.tab = row.parent
        self.pressed = gr.JSON([], visible=False)  # ids, newest first
        self.selected = gr.State([])  # ids, oldest first
        self.seen = gr.State("")  # fingerprint of the gallery
        self.limit = gr.State(SHOWN)  # pairs in the gallery

    def _add_panel(self) -> None:
        with gr.Row():
            self.open = gr.Button(
                "Open", variant="primary", size="sm", interactive=False, min_width=72, elem_id="history-open"
            )
            self.compare = gr.Button(
                "Compare these two", size="sm", interactive=False, min_width=136, elem_id="history-compare"
            )
        with gr.Row():
            self.delete = gr.Button("Delete", size="sm", interactive=False, min_width=96, elem_id="history-delete")
            self.delete_all = gr.Button(
                "Delete all…", size="sm", interactive=False, min_width=96, elem_id="history-delete-all"
            )
        with gr.Column(visible=False, elem_id="history-confirm") as self.confirmation:
            self.question = gr.HTML(html_template=READ_ALOUD)
            with gr.Row():
                self.confirm = gr.Button(
                    "Yes, delete all", variant="stop", size="sm", min_width=96, elem_id="history-yes"
                )
                self.keep = gr.Button("No, keep them", size="sm", min_width=96, elem_id="history-no")
        self.message = gr.HTML(html_template=READ_ALOUD, elem_id="history-message")
        self.differences = gr.HTML(css_template=DIFFERENCES_CSS, elem_id="history-differences")

    @property
    def outputs(self) -> list[gr.blocks.Block]:
        """What changes with the stored pairs."""
        return [self.delete_all, self.confirmation, self.message, self.gallery, self.seen, self.older]

    @property
    def selection_outputs(self) -> list[gr.blocks.Block]:
        """What a new selection changes."""
        return [self.selected, self.open, self.compare, self.delete, self.differences]

    def wire(self, page) -> None:
        """Connect the events; `page` has the visitor and the Compare tab."""
        self.page = page
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        shown = [page.visitor, self.seen, self.limit]
        for event in (self.tab.select, page.visitor.change):
            event(self.refresh, shown, self.outputs, **quick)
        more = self.older.click(lambda limit: min(limit + SHOWN, MAX_LIMIT), self.limit, self.limit, **quick)
        more.then(self.refresh, shown, self.outputs, **quick)
        self.gallery.click(
            self.select, self.pressed, self.selection_outputs, js=PRESSED, trigger_mode="always_last", **quick
        )
        opened = self.open.click(self.open_selected, self.selected, page.compare.outputs, **quick)
        compared = self.compare.click(self.compare_selected, self.selected, page.compare.outputs, **quick)
        for event in (opened, compared):
            page.compare.follow(event)
            page.compare.shows.append(event)
        self.delete.click(self.delete_selected, [self.selected, page.visitor, self.limit], self.outputs, **quick)
        self.delete_all.click(self.ask, page.visitor, [self.confirmation, self.question], **quick)
        self.confirm.click(self.delete_everything, page.visitor, self.outputs, **quick)
        self.keep.click(lambda: gr.update(visible=False), None, self.confirmation, **quick)

    def add_endpoints(self) -> None:
        """Register the endpoints of this tab; call it inside the page's `gr.Blocks`."""
        for function in (self.history, self.delete_run):
            add_endpoint(function)

    # Endpoints

    def history(self, visitor: str, limit: int = 20) -> list[dict]:
        """The finished pairs of a visitor, newest first: id, time, settings in words, speed-up, SSIM and files.

        `visitor` is the text that was given to `run`.

        Example: history("my-id", 5)
        """
        if type(limit) is not int or not 0 <= limit <= MAX_LIMIT:
            raise AccelError(f"limit is a whole number from 0 to {MAX_LIMIT}")
        return [summary(stored) for stored in self.context.store.list(_named(visitor), limit)]

    def delete_run(self, visitor: str, run_id: str) -> dict:
        """Delete a finished pair of a visitor: {"deleted": 1}, or 0 if the visitor has no such pair.

        Example: delete_run("my-id", "0123456789abcdef0123456789abcdef")
        """
        return {"deleted": self.context.store.delete([run_id], _named(visitor))}

    # Events

    def refresh(self, visitor: str, seen: str, limit: int, request: gr.Request) -> Update:
        """The gallery as it is stored now; one that has not changed is left alone, so that its clips play on."""
        shown = self._shown(self._whose(visitor, request), limit)
        return {self.message: ""} if shown[self.seen] == seen else {**shown, self.message: ""}

    def select(self, pressed: list[str]) -> Update:
        """A tile was clicked, or a selected one is gone."""
        return self._selection(pressed[::-1])

    def open_selected(self, selected: list[str]) -> Update:
        """The selected pair in the Compare tab, with its settings."""
        return self.page.compare.show_stored(selected[0])

    def compare_selected(self, selected: list[str]) -> Update:
        """The candidates of the two selected pairs in the Compare tab, the older one on the left."""
        return self.page.compare.show_two(*selected[:2])

    def delete_selected(self, selected: list[str], visitor: str, limit: int, request: gr.Request) -> Update:
        """Delete the selected pairs."""
        owner = self._whose(visitor, request)
        return self._deleted(self.context.store.delete(selected, owner), owner, limit)

    def ask(self, visitor: str, request: gr.Request) -> Update:
        """Ask before everything is deleted."""
        owner = self._whose(visitor, request)
        whose = (
            "all results of all visitors"
            if owner is None
            else f"all of your results ({self.context.store.count(owner)})"
        )
        return {self.confirmation: gr.update(visible=True), self.question: f"Delete {whose}? This cannot be undone."}

    def delete_everything(self, visitor: str, request: gr.Request) -> Update:
        """Delete all pairs of the visitor; of all visitors for the owner."""
        owner = self._whose(visitor, request)
        return self._deleted(self.context.store.delete_all(owner), owner, SHOWN)

    def _whose(self, visitor: str, request: gr.Request) -> str | None:
        """Whose pairs are shown: the visitor's; None (all) for who has the server's key in the address."""
        return None if self.context.is_owner(request) else visitor or ""

    def _deleted(self, count: int, owner: str | None, limit: int) -> Update:
        return {**self._shown(owner, limit), self.message: note(f"{_results(count)} deleted.")}

    def _shown(self, owner: str | None, limit: int) -> Update:
        pairs, total = self.context.store.list(owner, limit), self.context.store.count(owner)
        html = gallery(pairs, total, of_all=owner is None)
        return {
            self.gallery: html, self.seen: sha256(html.encode()).hexdigest(),
            self.older: gr.update(visible=len(pairs) < min(total, MAX_LIMIT)),
            self.confirmation: gr.update(visible=False), self.delete_all: gr.update(interactive=bool(pairs)),
        }  # fmt: skip

    def _selection(self, selected: list[str]) -> Update:
        """Buttons and settings for a selection."""
        count = len(selected)
        return {
            self.selected: selected, self.open: gr.update(interactive=count == 1),
            self.compare: gr.update(interactive=count == 2),
            self.delete: gr.update(interactive=count > 0, value=f"Delete {_results(count)}" if count else "Delete"),
            self.differences: self._differences(selected) if count == 2 else "",
        }  # fmt: skip

    def _differences(self, selected: list[str]) -> str:
        pairs = [self.context.store.find(run_id) for run_id in selected]
        if None in pairs:
            return note("One of these results is no longer stored.", bad=True)
        first, second = (pair.report for pair in pairs)
        return render("differences", rows=differences(first, second))


class Tile(NamedTuple):
    """One pair in the gallery."""

    id: str
    plays: bool  # its video plays; otherwise its last preview is shown
    video: str
    still: str  # style that shows the last preview, or ""
    ratio: float
    candidate: str
    reference: str
    figures: str
    prompt: str
    created: str
    age: str
    group: str
    visitor: str  # only where pairs of several visitors are shown


def gallery(pairs: list[Stored], total: int, of_all: bool = False) -> str:
    """HTML of the newest pairs of `total` as tiles, or of what to do where there are none."""
    tiles = [
        Tile(
            pair.id, i < PLAYING, f"runs/{pair.id}/b.mp4", still(pair), ratio(pair.report),
            describe_side(run_of(pair.report, "b")), describe_side(run_of(pair.report, "a")), figures(pair.report),
            pair.report["prompt"], pair.created, age(pair.created), pair.group, pair.visitor[:6] if of_all else "",
        )
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    return render("gallery", tiles=tiles, total=total, hint=HINT)


def summary(pair: Stored) -> dict:
    """A stored pair for programs."""
    report = pair.report
    return {
        "run_id": pair.id, "created": pair.created, "prompt": report["prompt"], "seed": report["seed"],
        "candidate": describe_side(run_of(report, "b")), "reference": describe_side(run_of(report, "a")),
        "speedup_denoise": report.get("speedup_denoise"), "ssim": report.get("ssim"), "group": pair.group,
        "files": {name: f"runs/{pair.id}/{name}" for name in ("a.mp4", "b.mp4", "run.json")},
    }  # fmt: skip


def figures(report: dict) -> str:
    """Speed-up and likeness of a report in a few signs."""
    speedup, ssim = report.get("speedup_denoise"), report.get("ssim")
    texts = [f"{speedup:.2f}×"] if speedup else []
    if report.get("bit_equal"):
        texts.append("identical")
    elif ssim is not None:
        texts.append(f"SSIM {ssim:.3f}")
    return " · ".join(texts)


def still(pair: Stored) -> str:
    """CSS that shows the last preview of the candidate's sheet; "" if there is none."""
    race = (pair.report.get("race") or {}).get("b")
    if not race:
        return ""
    columns, last = int(race["columns"]), int(race["frames"]) - 1
    rows = last // columns + 1
    across, down = 100 * (last % columns) / max(1, columns - 1), 100 * (last // columns) / max(1, rows - 1)
    return (
        f"background-image: url('runs/{pair.id}/b.jpg'); background-size: {columns * 100}% {rows * 100}%;"
        f" background-position: {across:.2f}% {down:.2f}%"
    )


def ratio(report: dict) -> float:
    """Width over height of a clip, within what a tile can show."""
    return round(min(max(report["width"] / report["height"], 0.75), 1.8), 4)


def age(created: str, now: datetime | None = None) -> str:
    """How long ago a UTC time was, in words."""
    seconds = int(((now or datetime.now(UTC)) - datetime.fromisoformat(created)).total_seconds())
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {unit}{'s' * (count > 1)} ago"
    return "just now"


def _named(visitor: str) -> str:
    """The id of a program's visitor. None is no id: the store takes it as the owner of everything."""
    return visitor if isinstance(visitor, str) else ""


def _results(count: int) -> str:
    return f"{count} result{'s' * (count != 1)}"
