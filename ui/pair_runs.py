"""The pairs that the Compare tab generates: from Run to the pair in the player, and Stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import gradio as gr
from markupsafe import escape

from accel.errors import AccelError
from accel.runtime.run import Run
from ui.context import compare_work
from ui.controls import Update
from ui.job_queue import Job
from ui.live import Live
from ui.panels import note
from ui.share import link_query
from ui.side_settings import describe_side, side_of

if TYPE_CHECKING:
    from ui.compare_tab import CompareTab

STILL_WAITING = 2.0  # seconds after which an unchanged message is sent again: only so is a closed page noticed


class PairRuns:
    """Submits the pairs of all visitors to the workers, and reports on each in the widgets of the Compare tab."""

    def __init__(self, tab: CompareTab):
        self.tab, self.context = tab, tab.context
        self.jobs: set[tuple[str | None, str, str]] = set()  # browser tab, visitor and id of each that is under way

    @property
    def outputs(self) -> list[gr.blocks.Block]:
        """What a run changes: Gradio goes through all of these at each of its events, several times a second."""
        tab = self.tab
        return [tab.message, tab.live, tab.run, tab.stop, tab.shown, tab.panes, *tab.view.components,
                tab.reference.last, tab.page.code.link]  # fmt: skip

    def run_pair(
        self, request: gr.Request, shown: str | None, panes: list[str], visitor: str, model: str, preset: str, *values
    ) -> Iterator[Update]:
        """Generate a pair from what the widgets say, and report its progress.

        The link is that of the run while it goes, so that a page that loads anew, as after a lost connection, has its
        settings; of a run that does not end, that of the pair shown comes back.
        """
        tab = self.tab
        try:
            settings = tab.settings(model, values)
        except AccelError as error:
            yield self._refused(str(error))
            return
        work = compare_work(self.context, visitor, settings.run, settings.reference, settings.candidate)
        job = self.context.workers.submit(work, visitor, model)
        running = request.session_hash, visitor, job.id
        self.jobs.add(running)
        try:
            done = False
            for update in self._follow(job, panes, settings.keep):
                done |= tab.shown in update
                yield update
            if not done:
                yield {tab.page.code.link: tab.page.code.link_of(shown)}
        finally:
            self.jobs.discard(running)

    def stop_pairs(self, request: gr.Request):
        """Stop the pairs of this browser tab after their current step. The runs report that they have stopped."""
        own = [job for session, *job in list(self.jobs) if session == request.session_hash]
        return gr.skip() if sum(self.context.workers.stop(*job) for job in own) else note("Nothing is running.")

    def _follow(self, job: Job, panes: list[str], keep: bool) -> Iterator[Update]:
        """What the page shows at each event of a job."""
        tab, live, told, until = self.tab, None, "", 0.0
        for kind, data in self.context.workers.stream(job):
            if kind == "started":
                live = self._live(**data)
                begun = "Generating B; A was generated before." if data["cached"] else "Generating A, then B."
                link = f"?{link_query({**data['b'].model_dump(), 'reference': data['a'].model_dump()})}"
                yield {
                    tab.message: note(data["message"] or begun), **self._buttons(True), tab.page.code.link: link,
                    tab.live: gr.update(value=live.html(), elem_classes=[]),
                }  # fmt: skip
            elif kind == "step":
                yield {tab.live: live.step(**data)}
            elif kind == "pair":
                yield self._finished(data["run_id"], data["message"], panes, keep)
            elif kind == "waiting":
                text, now = waiting_text(**data), time.monotonic()
                if text != told or now > until:
                    told, until = text, now + STILL_WAITING
                    yield {tab.message: note(text), **self._buttons(True)}
            elif kind == "stopping":
                yield {tab.message: note("Stopping after this step…")}
            elif kind == "stopped":
                yield {tab.message: note("Stopped. The last pair is still here."), **self._ended()}
            elif kind in ("refused", "failed"):
                yield self._refused(data["reason"])

    def _live(self, a: Run, b: Run, cached: bool, message: str) -> Live:
        kept = self.context.references.find(a) if cached else None
        sides = [describe_side(run.model_dump()) for run in (a, b)]
        return Live(sides[0], a.steps, sides[1], b.steps, kept and kept.video.seconds["denoise"])

    def _finished(self, run_id: str, message: str, panes: list[str], keep: bool) -> Update:
        """The new pair in the player, with `keep` beside the earlier candidates of the same reference.

        Without earlier pairs the player shows the recorded race, so it changes to the videos.
        """
        tab, find = self.tab, self.context.store.find
        stored = find(run_id)
        same = [other for other in map(find, panes if keep else [])
                if other and other.report["reference"] == stored.report["reference"]]  # fmt: skip
        pairs = [*same, stored][-3:]
        return {
            **self._ended(), **tab.view.show(pairs, None if panes else "side"), tab.message: note(message),
            tab.shown: run_id, tab.panes: [pair.id for pair in pairs], tab.reference.last: side_of(stored.report),
        }  # fmt: skip

    def _refused(self, reason: str) -> Update:
        gr.Warning(str(escape(reason)))
        return {self.tab.message: note(reason, bad=True), **self._ended()}

    def _ended(self) -> Update:
        """The buttons after a run; its panes go."""
        return {**self._buttons(False), self.tab.live: ""}

    def _buttons(self, running: bool) -> Update:
        return {
            self.tab.run: gr.update(interactive=not running),
            self.tab.stop: gr.update(interactive=running, variant="stop" if running else "secondary"),
        }


def waiting_text(ahead: int, loading: bool, seconds: float | None = None) -> str:
    """Why a job has not started."""
    if loading:
        return "Loading the model…"
    about = f", about {max(10, round(seconds, -1)):.0f} s" if seconds else ""  # a text that is read aloud: calm
    return f"Waiting: {ahead} run{'s' * (ahead > 1)} ahead of you{about}."
