"""The Vote tab: blind votes on pairs of videos, and the ranking that they give."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from accel.errors import AccelError
from ui.ballots import Ballot, Ballots, Choice
from ui.context import Context
from ui.endpoints import add_endpoint
from ui.panels import READ_ALOUD, note
from ui.player import Player, pane_value
from ui.ranking import ranking_report
from ui.run_words import ranked_name
from ui.templating import render

CSS = (Path(__file__).parent / "vote.css").read_text()
HEADERS = {
    "Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff",
    "Last-Modified": "Thu, 01 Jan 1970 00:00:00 GMT",
}  # fmt: skip
CHOICES = {"left": "A is better", "right": "B is better", "same": "Equally good", "bad": "Both bad"}
LETTERS = {"left": "A", "right": "B"}
ALL_VOTED = "You have voted on every pair here. The pairs that you generate in the Compare tab can be voted on too."
CLOSED = "That pair is no longer open; here is another one."
Update = dict[gr.blocks.Block, Any]


class VoteTab:
    """Layout and handlers; create it inside a `gr.Tab`."""

    def __init__(self, context: Context, rng: random.Random | None = None):
        """`rng` chooses the pairs and which video is on the left."""
        self.context, self.ballots = context, Ballots(context.store, rng)
        with gr.Column(elem_id="vote") as column:
            self.question = gr.HTML(css_template=CSS, elem_id="vote-question")
            self.player = Player(elem_id="vote-player")
            with gr.Row(visible=False, elem_id="vote-bar") as self.bar:
                self.buttons = {
                    choice: gr.Button(text, size="md", min_width=96, elem_id=f"vote-{choice}")
                    for choice, text in CHOICES.items()
                }
            self.result = gr.HTML(html_template=READ_ALOUD, css_template=CSS, elem_id="vote-result")
            self.next = gr.Button("Next pair", variant="primary", visible=False, elem_id="vote-next")
            self.table = gr.HTML(css_template=CSS, elem_id="vote-ranking")
        self.token = gr.State("")  # of the ballot that is shown
        self.tab = column.parent

    @property
    def outputs(self) -> list[gr.blocks.Block]:
        """Everything that an event of this tab changes."""
        return [self.question, self.player, self.bar, self.result, self.next, self.table, self.token]

    def wire(self, page) -> None:
        """Connect the events; `page` has the visitor."""
        own = [self.token, page.visitor]
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.tab.select(self.enter, own, self.outputs, **quick)
        page.visitor.change(self.recognise, own, self.outputs, **quick)
        self.next.click(self.show_next, page.visitor, self.outputs, **quick)
        for choice, button in self.buttons.items():
            button.click(partial(self.cast, choice), own, self.outputs, **quick)

    def add_endpoints(self) -> None:
        """Register the endpoints of this tab; call it inside the page's `gr.Blocks`."""
        for function in (self.next_pair, self.vote, self.ranking):
            add_endpoint(function)

    def routes(self) -> list[Route]:
        """What the server answers below vote/: the videos of open ballots."""
        return [Route("/vote/{token}/{side}.mp4", self.video)]

    def video(self, request: Request) -> Response:
        """vote/TOKEN/left.mp4 or right.mp4. No header tells which of the two files is older."""
        token, side = request.path_params["token"], request.path_params["side"]
        file = self.ballots.file_of(token, side)
        if file is None:
            return PlainTextResponse("There is no such file.", 404)
        headers = {**HEADERS, "ETag": f'"{token}-{side}"'}
        return FileResponse(file, media_type="video/mp4", headers=headers)

    # Endpoints

    def next_pair(self, visitor: str) -> dict:
        """A pair that a visitor has not voted on: token, prompt and the addresses of both videos; {} if there is none.

        `visitor` is any text that you keep. Which video is which is told after the vote.

        Example: next_pair("my-id")
        """
        ballot = self.ballots.open(_checked(visitor))
        return {"token": ballot.token, "prompt": ballot.report["prompt"], **urls(ballot)} if ballot else {}

    def vote(self, visitor: str, token: str, choice: str) -> dict:
        """Vote on the pair of a token: "left" or "right" is better, "same" or "bad" (both). Tells what the videos were.

        "counted" is false if the visitor has voted on that pair before.

        Example: vote("my-id", "0123456789abcdef0123456789abcdef", "left")
        """
        ballot = self.ballots.find(token)
        if ballot is None:
            raise AccelError("no pair is open under this token: ask next_pair for one")
        counted = self._count(ballot, choice, _checked(visitor))
        names = {side: ranked_name(ballot.report, which) for side, which in ballot.sides.items()}
        return {"counted": counted, **names, "speedup_denoise": ballot.report.get("speedup_denoise")}

    def ranking(self) -> dict:
        """The ranking of all votes: how many there are, how many are needed, and a row for each setting, best first.

        A row's "score" is the share of votes that the setting would win against the others, from "low" to "high" with
        95 % confidence; "bad" is the share of its votes that called both videos bad.

        Example: ranking()
        """
        return ranking_report(tuple(self.context.store.votes()))

    # Events

    def enter(self, token: str, visitor: str) -> Update:
        """The tab was opened: the pair that is open stays, and the table is renewed."""
        if self.ballots.find(token):
            return {self.table: self._table()}
        return self.show_next(visitor)

    def recognise(self, token: str, visitor: str) -> Update | dict:
        """The visitor's id has come: a pair that was opened before it stays, unless the visitor has voted on it."""
        ballot = self.ballots.find(token)
        return self.show_next(visitor) if ballot and ballot.pair in self.context.store.voted(visitor) else gr.skip()

    def show_next(self, visitor: str, message: str = "") -> Update:
        """A new pair, with nothing told about it."""
        ballot = self.ballots.open(visitor)
        return {
            self.token: ballot.token if ballot else "", self.player: player_value(ballot) if ballot else None,
            self.question: render("vote_question", prompt=ballot.report["prompt"]) if ballot else note(ALL_VOTED),
            self.bar: gr.update(visible=ballot is not None), self.result: note(message) if message else "",
            self.next: gr.update(visible=False), self.table: self._table(),
        }  # fmt: skip

    def cast(self, choice: Choice, token: str, visitor: str) -> Update:
        """Count a vote and tell what the videos were."""
        ballot = self.ballots.find(token)
        if ballot is None:
            return self.show_next(visitor, CLOSED)
        try:
            counted = self._count(ballot, choice, visitor)
        except AccelError as error:
            return {self.result: note(str(error), bad=True)}
        return {
            self.player: player_value(ballot, told=True), self.result: told(ballot, choice, counted),
            self.bar: gr.update(visible=False), self.next: gr.update(visible=True), self.table: self._table(),
        }  # fmt: skip

    def _count(self, ballot: Ballot, choice: Choice, visitor: str) -> bool:
        names = tuple(ranked_name(ballot.report, side) for side in "ab")
        return self.context.store.add_vote(ballot.pair, visitor, ballot.winner(choice), names)

    def _table(self) -> str:
        return render("ranking", **self.ranking())


def _checked(visitor: str) -> str:
    """The id of a visitor. Raises AccelError if there is none: the store takes None as the owner of everything."""
    if not visitor or not isinstance(visitor, str):
        raise AccelError("a vote needs the id of its visitor")
    return visitor


def urls(ballot: Ballot) -> dict[str, str]:
    """The addresses of both videos of a ballot."""
    return {side: f"vote/{ballot.token}/{side}.mp4" for side in LETTERS}


def player_value(ballot: Ballot, told: bool = False) -> dict:
    """The player's value for a ballot; what the videos are is in the labels only if it may be told."""
    report = ballot.report
    labels = {side: ranked_name(report, which) if told else "" for side, which in ballot.sides.items()}
    return {
        "panes": [pane_value(labels[side], url) for side, url in urls(ballot).items()], "curves": [],
        **{key: report[key] for key in ("fps", "frames", "height", "width")},
    }  # fmt: skip


def told(ballot: Ballot, choice: Choice, counted: bool) -> str:
    """What the videos of a ballot were, as HTML."""
    names = {side: ranked_name(ballot.report, which) for side, which in ballot.sides.items()}
    chosen = f"You preferred {LETTERS[choice]}." if choice in LETTERS else f"You said: {CHOICES[choice].lower()}."
    sides = [(LETTERS[side], name, ballot.sides[side] == "b") for side, name in names.items()]
    return render("vote_result", chosen=chosen, counted=counted, sides=sides, report=ballot.report)
