"""The store: all or nothing, caps, who may read and delete, several processes."""

import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from accel.errors import AccelError
from accel.runtime.paths import ROOT
from ui import store as module
from ui.store import Store

REPORT = {"prompt": "a red star", "steps": 4}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "data")
    yield store
    store.close()


def files(size: int = 10) -> dict[str, bytes]:
    return {"a.mp4": b"a" * size, "b.mp4": b"b" * size}


def is_whole(store: Store) -> bool:
    """Every row has its folder, every folder its row, and nothing is half written."""
    ids = {stored.id for stored in store.list(None)}
    return ids == {folder.name for folder in store.runs.iterdir()} and not list(store.folder.glob("part-*"))


def test_a_pair_is_found_with_its_report_and_files(store, tmp_path):
    video = tmp_path / "video.mp4"
    video.write_bytes(b"moved")
    run_id = store.add("me", REPORT, {"a.mp4": video, "b.mp4": b"written"}, group="sweep")
    stored = store.find(run_id)
    assert (stored.visitor, stored.group, stored.report) == ("me", "sweep", REPORT)
    assert (stored.folder / "a.mp4").read_bytes() == b"moved" and (stored.folder / "b.mp4").read_bytes() == b"written"
    assert (stored.folder / "run.json").read_text() == '{"prompt": "a red star", "steps": 4}'
    assert not video.exists() and len(run_id) == 32 and stored.created.endswith("+00:00")


def test_newest_come_first_and_groups_can_be_selected(store):
    ids = [store.add("me", REPORT, files(), group) for group in ("", "x", "x")]
    assert [stored.id for stored in store.list("me")] == ids[::-1]
    assert [stored.id for stored in store.list("me", limit=1)] == ids[2:]
    assert [stored.id for stored in store.list("me", group="x")] == ids[:0:-1]
    assert store.count("me") == 3


def test_a_visitor_neither_lists_nor_deletes_what_belongs_to_another(store):
    mine, other = store.add("me", REPORT, files()), store.add("other", REPORT, files())
    assert [stored.id for stored in store.list("me")] == [mine]
    assert store.delete([mine, other], "me") == 1
    assert store.find(other) and store.find(mine) is None and is_whole(store)
    assert store.delete_all("me") == 0 and [stored.id for stored in store.list(None)] == [other]
    assert store.delete([other], None) == 1 and not store.list(None)


def test_nothing_belongs_to_a_visitor_without_an_id(store):
    store.add("", REPORT, files())
    assert store.list("") == [] and store.count("") == 0 and store.delete_all("") == 0 and store.voted("") == set()


def test_ids_that_were_never_given_are_not_found(store):
    store.add("me", REPORT, files())
    for wrong in ("", "../page.sqlite", "0" * 32, "\ud800", "%"):
        assert store.find(wrong) is None and store.delete([wrong], None) == 0


def test_long_or_unprintable_names_and_unknown_files_are_refused(store):
    for name in ("x" * 65, "\ud800", "a\nb"):
        with pytest.raises(AccelError, match="printable text of at most 64"):
            store.add(name, REPORT, files())
    with pytest.raises(ValueError, match="no file '../a.mp4'"):
        store.add("me", REPORT, {"../a.mp4": b""})
    assert is_whole(store) and not store.list(None)


def test_the_oldest_go_beyond_a_number(tmp_path):
    store = Store(tmp_path, max_runs=3)
    ids = [store.add(visitor, REPORT, files()) for visitor in "abcde"]
    assert [stored.id for stored in store.list(None)] == ids[:1:-1] and is_whole(store)


def test_those_of_the_visitor_who_has_most_go_first(tmp_path):
    store = Store(tmp_path / "number", max_runs=4)
    first, *many = [store.add(visitor, REPORT, files(900 if visitor == "a" else 10)) for visitor in "abbbbb"]
    assert {stored.id for stored in store.list(None)} == {first, *many[2:]} and is_whole(store)
    store = Store(tmp_path / "size", max_bytes=3000)
    first, *many = [store.add(visitor, REPORT, files(150)) for visitor in "abbbbbbbb"]
    left = {stored.id for stored in store.list(None)}
    assert first in left and many[-1] in left and many[0] not in left and is_whole(store)


def test_a_full_disk_is_told_in_a_sentence(store, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store, "_evict", full)
    with pytest.raises(AccelError, match="results cannot be stored here now .database or disk is full."):
        store.add("me", REPORT, files())
    assert is_whole(store) and not store.list(None)


def test_the_oldest_go_beyond_a_size_but_the_newest_stays(tmp_path):
    store = Store(tmp_path, max_bytes=1000)
    ids = [store.add("me", REPORT, files(150)) for _ in range(4)]
    assert [stored.id for stored in store.list(None)] == ids[:1:-1]
    large = store.add("me", REPORT, files(600))
    assert [stored.id for stored in store.list(None)] == [large] and is_whole(store)


class Died(BaseException):
    """Stands for the end of the process."""


def die(*_, **__):
    raise Died


@pytest.mark.parametrize("name", ["shutil.move", "os.replace", "_db.execute INSERT", "_evict", "COMMIT"])
def test_an_error_at_any_step_stores_nothing(store, tmp_path, monkeypatch, name):
    kept = store.add("me", REPORT, files())
    video = tmp_path / "video.mp4"
    video.write_bytes(b"")
    if name in ("shutil.move", "os.replace"):
        monkeypatch.setattr(f"ui.store.{name}", die)
    elif name == "_evict":
        monkeypatch.setattr(store, "_evict", die)
    else:
        monkeypatch.setattr(store, "_db", DyingDatabase(store._db, name.split()[-1]))
    with pytest.raises(Died):
        store.add("me", REPORT, {"a.mp4": video, "b.mp4": b""})
    monkeypatch.undo()
    assert [stored.id for stored in store.list(None)] == [kept] and is_whole(store)
    store.add("me", REPORT, files())


class DyingDatabase:
    """A database whose process dies before one kind of statement."""

    def __init__(self, db, statement: str):
        self.db, self.statement = db, statement

    def execute(self, query: str, *values):
        return die() if query.startswith(self.statement) else self.db.execute(query, *values)

    def __getattr__(self, name):
        return getattr(self.db, name)


KILLED = """
import os, sys
from pathlib import Path
from ui.store import Store
import ui.store

store = Store(Path(sys.argv[1]))
kept = store.add("me", {}, {"a.mp4": b"a"})
end = lambda *_, **__: os._exit(9)
where = sys.argv[2]
if where == "before":
    ui.store._fill = end
elif where == "part":
    ui.store.os.replace = end
elif where == "folder":
    store._evict = end
elif where == "row deleted":
    store._remove_folders = end
    store.delete([kept], "me")
store.add("me", {}, {"a.mp4": b"a"})
"""


@pytest.mark.parametrize("where, left", [("before", 1), ("part", 1), ("folder", 1), ("row deleted", 0)])
def test_a_killed_process_leaves_the_store_whole(tmp_path, where, left):
    code = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), where], cwd=ROOT).returncode
    assert code == 9
    store = Store(tmp_path)
    assert len(store.list(None)) == left and is_whole(store)


def test_rows_whose_folder_was_removed_go_at_the_next_start(tmp_path):
    store = Store(tmp_path)
    ids = [store.add("me", REPORT, files()) for _ in range(2)]
    store.close()
    shutil.rmtree(tmp_path / "runs" / ids[0])
    (tmp_path / "part-left").mkdir()
    store = Store(tmp_path)
    assert [stored.id for stored in store.list(None)] == ids[1:] and is_whole(store)


def test_a_second_process_leaves_what_the_first_is_writing(tmp_path):
    first = Store(tmp_path)
    (tmp_path / "part-writing").mkdir()
    second = Store(tmp_path)
    assert (tmp_path / "part-writing").is_dir()
    first.close(), second.close()
    Store(tmp_path)
    assert not (tmp_path / "part-writing").exists()


WRITER = """
import sys
from pathlib import Path
from ui.store import Store

store = Store(Path(sys.argv[1]), max_runs=30)
for i in range(25):
    store.add(sys.argv[2], {"i": i}, {"a.mp4": b"a" * 100})
    store.add_vote(f"pair {i}", sys.argv[2], "a", ("x", "y"))
"""


def test_two_processes_and_many_threads_write_at_once(tmp_path):
    store = Store(tmp_path, max_runs=30)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name], cwd=ROOT) for name in "ab"]
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda i: store.add("me", {"i": i}, files()), range(20)))
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert len(set(ids)) == 20 and store.count(None) == 30 and is_whole(store) and len(store.votes()) == 50


def test_each_visitor_votes_once_on_a_pair(store):
    assert store.add_vote("p", "me", "a", ("x", "y"))
    assert not store.add_vote("p", "me", "b", ("x", "y"))
    assert store.add_vote("p", "other", "same", ("x", "y")) and store.add_vote("q", "me", "bad", ("y", "z"))
    assert sorted((vote.pair, vote.winner, vote.names) for vote in store.votes()) == [
        ("p", "a", ("x", "y")), ("p", "same", ("x", "y")), ("q", "bad", ("y", "z"))
    ]  # fmt: skip
    assert store.voted("me") == {"p", "q"} and store.voted("nobody") == set()


def test_wrong_votes_are_refused(store, monkeypatch):
    with pytest.raises(AccelError, match="one of a, b, same, bad"):
        store.add_vote("p", "me", "c", ("x", "y"))
    with pytest.raises(AccelError, match="needs the id"):
        store.add_vote("p", "", "a", ("x", "y"))
    monkeypatch.setattr(module, "MAX_VOTES", 1)
    store.add_vote("p", "me", "a", ("x", "y"))
    with pytest.raises(AccelError, match="no more"):
        store.add_vote("q", "me", "a", ("x", "y"))


def test_the_secret_outlives_a_restart(tmp_path):
    first = Store(tmp_path)
    secret = first.secret()
    first.close()
    assert Store(tmp_path).secret() == secret and len(secret) > 30


def test_a_full_disk_stores_nothing(store, monkeypatch):
    def full(folder, files):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(module, "_fill", full)
    with pytest.raises(OSError):
        store.add("me", REPORT, files())
    assert is_whole(store) and not store.list(None)
