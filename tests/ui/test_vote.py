"""The Vote tab: blind until voted, one vote for each visitor and pair, what is told afterwards."""

import json
import random
from types import SimpleNamespace

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from accel.errors import AccelError
from accel.runtime.models import TINY
from accel.runtime.presets import load_preset
from ui import ballots as ballots_module
from ui.ballots import Ballots
from ui.context import Context
from ui.run_words import ranked_name
from ui.store import Store
from ui.vote_tab import VoteTab, urls

RUN = {"steps": 50, "guidance": 4.0, "methods": {}}
REPORT = {
    "model": TINY, "prompt": "a <b>red</b> star", "seed": 1, "height": 64, "width": 64, "frames": 17, "fps": 8, **RUN,
    "methods": {"asymrnr": {}}, "steps": 30, "reference": RUN, "speedup_denoise": 1.604, "bit_equal": False,
}  # fmt: skip
FILES = {"a.mp4": b"a", "b.mp4": b"b"}


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The recorded pairs, none at first."""
    pairs = []
    monkeypatch.setattr(ballots_module, "recorded_pairs", lambda: pairs)
    return pairs


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "data")


@pytest.fixture
def tab(store):
    with gr.Blocks(), gr.Tab():
        return VoteTab(Context(TINY, None, store), random.Random(0))


def test_both_kinds_of_pairs_are_offered_but_not_those_of_others_or_of_equal_videos(store, recorded, tmp_path):
    mine = store.add("me", REPORT, FILES)
    store.add("me", {**REPORT, "bit_equal": True}, FILES)
    store.add("other", REPORT, FILES)
    recorded.append(SimpleNamespace(name="ring", folder=tmp_path, report=REPORT))
    offered = {Ballots(store).open("me").pair for _ in range(40)}
    assert offered == {mine, "recorded/ring"}


def test_a_pair_is_shown_until_its_visitor_has_voted_on_it(tab, store):
    pair = store.add("me", REPORT, FILES)
    shown = tab.show_next("me")
    assert shown[tab.bar]["visible"] and len(shown[tab.player]["panes"]) == 2
    tab.cast("left", shown[tab.token], "me")
    assert store.voted("me") == {pair}
    assert "voted on every pair" in tab.show_next("me")[tab.question] and tab.show_next("me")[tab.player] is None


def test_nothing_tells_which_video_is_which_before_the_vote(tab, store):
    store.add("me", REPORT, FILES)
    shown = tab.show_next("me")
    value = json.dumps([shown[tab.player], str(shown[tab.question]), str(shown[tab.result])])
    for hint in ("asymrnr", "plain", "steps", "a.mp4", "b.mp4", "runs/", 'race": {'):
        assert hint not in value
    left, right = (pane["video"] for pane in shown[tab.player]["panes"])
    assert left == f"vote/{shown[tab.token]}/left.mp4" and right == f"vote/{shown[tab.token]}/right.mp4"


def test_sides_are_shuffled_and_addresses_lead_to_the_right_file(store):
    store.add("me", REPORT, FILES)
    ballots, seen = Ballots(store, random.Random(0)), set()
    for _ in range(20):
        ballot = ballots.open("me")
        left, right = (ballots.file_of(ballot.token, side).read_bytes() for side in ("left", "right"))
        assert (left, right) == ((b"b", b"a") if ballot.swapped else (b"a", b"b"))
        assert ballot.winner("left") == left.decode() and ballot.winner("right") == right.decode()
        assert ballot.winner("same") == "same" and ballot.winner("bad") == "bad"
        seen.add(ballot.swapped)
    assert seen == {True, False}


def test_an_address_that_was_never_given_or_is_deleted_leads_nowhere(store):
    ballots = Ballots(store)
    run_id = store.add("me", REPORT, FILES)
    token = ballots.open("me").token
    assert ballots.file_of(token, "a") is None and ballots.file_of("0" * 32, "left") is None
    store.delete([run_id], "me")
    assert ballots.file_of(token, "left") is None


def test_the_server_sends_the_videos_of_a_ballot_without_telling_their_age(tab, store):
    run_id = store.add("me", REPORT, FILES)
    client = TestClient(Starlette(routes=tab.routes()))
    left, right = (client.get(url) for url in urls(tab.ballots.open("me")).values())
    assert {left.content, right.content} == {b"a", b"b"} and left.headers["content-type"] == "video/mp4"
    assert left.headers["last-modified"] == right.headers["last-modified"]
    part = client.get(left.url, headers={"Range": "bytes=0-0"})
    assert (part.status_code, part.content) == (206, left.content)
    store.delete([run_id], "me")
    for url in (left.url, "/vote/x/left.mp4", f"{str(left.url)[:-8]}a.mp4"):
        assert client.get(url).status_code == 404


def test_the_number_of_open_ballots_is_bounded(store, monkeypatch):
    monkeypatch.setattr(ballots_module, "MAX_BALLOTS", 2)
    store.add("me", REPORT, FILES)
    ballots = Ballots(store)
    first, *others = (ballots.open("me").token for _ in range(3))
    assert ballots.find(first) is None and all(ballots.find(token) for token in others)


def test_a_vote_counts_for_the_video_on_the_chosen_side_and_tells_what_both_were(tab, store):
    store.add("me", REPORT, FILES)
    token = tab.show_next("me")[tab.token]
    told = tab.cast("right", token, "me")
    (vote,) = store.votes()
    assert vote.names == ("plain, 50 steps", "asymrnr with own parameters, 30 steps")
    assert vote.winner == tab.ballots.find(token).sides["right"]
    for text in ("You preferred B.", "plain, 50 steps", "own parameters, 30 steps, 1.60× as fast as the other"):
        assert text in told[tab.result]
    assert {pane["label"] for pane in told[tab.player]["panes"]} == set(vote.names)
    assert not told[tab.bar]["visible"] and told[tab.next]["visible"]
    assert "1 of 30 votes: the table appears at 30" in told[tab.table]


def test_a_second_vote_on_a_pair_does_not_count(tab, store):
    store.add("me", REPORT, FILES)
    tokens = [tab.show_next("me")[tab.token] for _ in range(2)]
    tab.cast("same", tokens[0], "me")
    assert "had been counted already" in tab.cast("bad", tokens[1], "me")[tab.result]
    assert [vote.winner for vote in store.votes()] == ["same"]


def test_a_pair_that_is_open_stays_when_the_tab_is_entered_again(tab, store):
    store.add("me", REPORT, FILES)
    token = tab.enter("", "me")[tab.token]
    assert set(tab.enter(token, "me")) == {tab.table}
    assert "no longer open" in tab.cast("left", "gone", "me")[tab.result]


def test_a_prompt_is_shown_as_text(tab, store):
    store.add("me", REPORT, FILES)
    assert "&lt;b&gt;red" in tab.show_next("me")[tab.question]


def test_a_visitor_without_an_id_cannot_vote(tab, recorded, tmp_path):
    recorded.append(SimpleNamespace(name="ring", folder=tmp_path, report=REPORT))
    token = tab.show_next("")[tab.token]
    assert "needs the id of its visitor" in tab.cast("left", token, "")[tab.result]


def test_the_table_appears_with_thirty_votes(tab, store):
    for i in range(30):
        store.add_vote(f"pair {i}", "me", "a" if i % 3 else "b", ("x<y", "plain"))
    html = tab.show_next("me")[tab.table]
    assert "x&lt;y" in html and "30 votes" in html and html.count('scope="row"') == 2


def test_programs_vote_on_a_token_and_read_the_ranking(tab, store):
    store.add("me", REPORT, FILES)
    pair = tab.next_pair("me")
    assert set(pair) == {"token", "prompt", "left", "right"}
    with pytest.raises(AccelError, match="one of left, right, same, bad"):
        tab.vote("me", pair["token"], "a")
    result = tab.vote("me", pair["token"], "left")
    assert result["counted"] and {result["left"], result["right"]} == set(store.votes()[0].names)
    assert not tab.vote("me", pair["token"], "left")["counted"] and tab.next_pair("me") == {}
    assert tab.ranking() == {"votes": 1, "needed": 30, "ranking": []}
    with pytest.raises(AccelError, match="no pair is open"):
        tab.vote("me", "gone", "left")
    with pytest.raises(AccelError, match="needs the id"):
        tab.next_pair("")


def test_names_in_the_ranking_tell_presets_own_parameters_and_other_models():
    fastercache = {**REPORT, "methods": load_preset("fastercache").methods, "steps": 50}
    assert [ranked_name(fastercache, side) for side in "ab"] == ["plain, 50 steps", "fastercache, 50 steps"]
    own = {**fastercache, "methods": {"fastercache": {"attention_interval": 7}}, "model": "org/Wan-1.3B"}
    assert ranked_name(own, "b") == "fastercache with own parameters, 50 steps (Wan-1.3B)"


def test_an_open_pair_stays_when_the_visitors_id_comes_unless_the_visitor_has_voted_on_it(tab, store):
    store.add("me", REPORT, FILES)
    token = tab.show_next("me")[tab.token]
    assert set(tab.recognise(token, "me")) == set(gr.skip())
    tab.cast("left", token, "me")
    assert tab.recognise(token, "me")[tab.token] == ""
