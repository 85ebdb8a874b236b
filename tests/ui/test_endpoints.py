"""The endpoints of history and vote as a program sees them."""

from collections.abc import Iterator
from itertools import product

import gradio as gr
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from accel.errors import AccelError
from accel.runtime.models import TINY
from ui.context import Context
from ui.endpoints import add_endpoint
from ui.history_tab import HistoryTab
from ui.store import Store
from ui.vote_tab import VoteTab

RUN = {"steps": 50, "guidance": 4.0, "methods": {}}
REPORT = {
    "model": TINY, "prompt": "a red star", "seed": 1, "height": 64, "width": 64, "frames": 17, "fps": 8, **RUN,
    "methods": {"asymrnr": {}}, "reference": RUN, "speedup_denoise": 1.6, "ssim": 0.99,
}  # fmt: skip
FILES = {"a.mp4": b"a", "b.mp4": b"b"}


def fail(text: str) -> dict:
    """Always fails with a text that is not meant for the caller.

    Example: fail("x")
    """
    raise RuntimeError(f"/home/secret/{text}")


def count(limit: int) -> Iterator[dict]:
    """Counts up, and refuses to go beyond a limit.

    Example: count(3)
    """
    yield from ({"count": i} for i in range(limit))
    raise AccelError(f"{limit} is the end")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def client(store):
    with gr.Blocks() as demo:
        for tab in (HistoryTab, VoteTab):
            with gr.Tab():
                tab(Context(TINY, None, store)).add_endpoints()
        add_endpoint(fail)
        add_endpoint(count)
    demo.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    client = Client(demo.local_url, verbose=False)
    yield client
    client.close()
    demo.close()


def refusal(client: Client, *args, api_name: str) -> str:
    with pytest.raises(AppError) as refused:
        client.predict(*args, api_name=api_name)
    return str(refused.value)


def test_a_program_lists_and_deletes_its_own_pairs(client, store):
    run_id = store.add("me", REPORT, FILES)
    assert [entry["run_id"] for entry in client.predict("me", api_name="/history")] == [run_id]
    assert client.predict("other", 5, api_name="/history") == []
    assert client.predict("other", run_id, api_name="/delete_run") == {"deleted": 0}
    assert client.predict("me", run_id, api_name="/delete_run") == {"deleted": 1}


def test_a_program_votes(client, store):
    store.add("voter", REPORT, FILES)
    pair = client.predict("voter", api_name="/next_pair")
    before = client.predict(api_name="/ranking")["votes"]
    assert client.predict("voter", pair["token"], "same", api_name="/vote")["counted"]
    assert client.predict(api_name="/ranking")["votes"] == before + 1


def test_hostile_arguments_are_refused_in_a_sentence_or_find_nothing(store):
    store.add("somebody", REPORT, FILES)
    with gr.Blocks(), gr.Tab():
        history, vote = HistoryTab(Context(TINY, None, store)), VoteTab(Context(TINY, None, store))
    visitors = ["", None, [], {}, 5, "\ud83d", "x" * 100]
    for visitor, other in product(visitors, ["", None, [], {}, -1, 1.5, 10**30, "x"]):
        assert refused_or_result(history.history, visitor, other) in ("refused", [])
        assert refused_or_result(history.delete_run, visitor, other) in ("refused", {"deleted": 0})
        assert refused_or_result(vote.vote, visitor, other, other) == "refused"
    for visitor in visitors:
        shown = vote.show_next(visitor)  # as an event of the page, a recorded pair is shown at most
        assert vote.ballots.find(shown[vote.token]).pair.startswith("recorded/")


def refused_or_result(function, *args):
    try:
        return function(*args)
    except AccelError as error:
        assert str(error) and "\n" not in str(error)
        return "refused"


def test_a_refusal_is_told_and_an_unexpected_error_is_not(client):
    assert "limit is a whole number from 0 to 400" in refusal(client, "me", -1, api_name="/history")
    assert "no pair is open under this token" in refusal(client, "me", "x", "left", api_name="/vote")
    assert "2 is the end" in refusal(client, 2, api_name="/count")
    text = refusal(client, "x", api_name="/fail")
    assert "log has it as error" in text and "secret" not in text
