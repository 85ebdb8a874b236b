"""Finished pairs and votes: SQLite beside one folder per pair. A crash at any moment leaves both whole.

    FOLDER/page.sqlite       rows
    FOLDER/runs/ID/          a.mp4 b.mp4 a.jpg b.jpg run.json of one pair
    FOLDER/part-*/           what is being written

A pair's folder is complete before it gets its name, and it gets its name in the transaction that adds its row.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import sqlite3
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from accel.errors import AccelError

FILES = ("a.mp4", "b.mp4", "a.jpg", "b.jpg")  # a pair may lack the pictures
RUN_ID = re.compile(r"[0-9a-f]{32}")
MAX_NAME = 64  # characters of a visitor's id and of a group's
MAX_VOTES = 50_000  # bounds the disk space that made-up visitors can take
Winner = Literal["a", "b", "same", "bad"]  # "same": equally good; "bad": both bad
WINNERS = ("a", "b", "same", "bad")
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, visitor TEXT NOT NULL, created TEXT NOT NULL,
    "group" TEXT NOT NULL, report TEXT NOT NULL, bytes INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS runs_of_visitor ON runs (visitor, number);
CREATE TABLE IF NOT EXISTS votes (
    pair TEXT NOT NULL, voter TEXT NOT NULL, winner TEXT NOT NULL, name_a TEXT NOT NULL, name_b TEXT NOT NULL,
    PRIMARY KEY (pair, voter)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
COLUMNS = 'id, visitor, created, "group", report'


@dataclass(frozen=True)
class Stored:
    """A stored pair. `created` is UTC in ISO format, `group` the sweep it belongs to or ""."""

    id: str
    visitor: str
    created: str
    group: str
    report: dict
    folder: Path


@dataclass(frozen=True)
class Vote:
    """One visitor's verdict on a pair of videos; `names` are what was compared, a and b."""

    pair: str
    winner: Winner
    names: tuple[str, str]


class Store:
    """Thread-safe; several processes may share a folder. Beyond the caps, pairs of who has most are deleted."""

    def __init__(self, folder: Path, max_runs: int = 400, max_bytes: int = 256 * 2**20):
        """Open or create the store in a folder; remove what a crash has left if no other process uses it."""
        self.folder, self.max_runs, self.max_bytes = Path(folder), max_runs, max_bytes
        self.runs = self.folder / "runs"
        self.runs.mkdir(parents=True, exist_ok=True)
        self._lock = threading.RLock()
        self._in_use = (self.folder / "in-use").open("a")
        alone = _try_lock(self._in_use)
        self._db = sqlite3.connect(
            self.folder / "page.sqlite", timeout=30, isolation_level=None, check_same_thread=False
        )
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self._write():
            for statement in SCHEMA.split(";"):
                self._db.execute(statement)
        if alone:
            self._sweep()
        fcntl.flock(self._in_use, fcntl.LOCK_SH)

    def close(self) -> None:
        """Close the database; the store cannot be used afterwards."""
        with self._lock:
            self._db.close()
            self._in_use.close()

    def add(self, visitor: str, report: dict, files: dict[str, Path | bytes], group: str = "") -> str:
        """Store a pair and return its id. Files are moved, bytes written; then pairs beyond the caps go.

        The pair just added stays even if it alone is larger than the cap. Raises AccelError for a name that is too
        long or if the database cannot be written, ValueError for a file name that is not in `FILES`, OSError if the
        disk is full; nothing is stored then.
        """
        check_name(visitor, "visitor")
        check_name(group, "group")
        if unknown := [name for name in files if name not in FILES]:
            raise ValueError(f"a pair has no file {unknown[0]!r}, only {', '.join(FILES)}")
        run_id, text = uuid.uuid4().hex, json.dumps(report)
        part = self.folder / f"part-{run_id}"
        target = self.runs / run_id
        try:
            part.mkdir()
            _fill(part, {**files, "run.json": text.encode()})
            size = sum(file.stat().st_size for file in part.iterdir()) + len(text)
            row = (run_id, visitor, datetime.now(UTC).isoformat(timespec="seconds"), group, text, size)
            with self._write():
                os.replace(part, target)
                self._db.execute(f"INSERT INTO runs ({COLUMNS}, bytes) VALUES (?, ?, ?, ?, ?, ?)", row)
                evicted = self._evict()
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            raise
        self._remove_folders(evicted)
        return run_id

    def find(self, run_id: str) -> Stored | None:
        """The pair of an id; None if there is none."""
        if not _is_id(run_id):
            return None
        rows = self._read(f"SELECT {COLUMNS} FROM runs WHERE id = ?", run_id)
        return self._stored(rows[0]) if rows else None

    def list(self, visitor: str | None, limit: int = 60, group: str | None = None) -> list[Stored]:
        """The pairs of a visitor, newest first; None: of all visitors. A limit of -1 is none."""
        if not _may_own(visitor):
            return []
        rows = self._read(
            f'SELECT {COLUMNS} FROM runs WHERE (?1 IS NULL OR visitor = ?1) AND (?2 IS NULL OR "group" = ?2)'
            " ORDER BY number DESC LIMIT ?3", visitor, group, limit,
        )  # fmt: skip
        return [self._stored(row) for row in rows]

    def count(self, visitor: str | None) -> int:
        """The number of pairs of a visitor; None: of all visitors."""
        if not _may_own(visitor):
            return 0
        return self._read("SELECT COUNT(*) FROM runs WHERE ?1 IS NULL OR visitor = ?1", visitor)[0][0]

    def delete(self, run_ids: list[str], visitor: str | None) -> int:
        """Delete pairs of a visitor (None: of any) and return how many; ids of others are left out."""
        if not _may_own(visitor):
            return 0
        with self._write():
            deleted = [i for i in run_ids if _is_id(i) and self._delete_row(i, visitor)]
        self._remove_folders(deleted)
        return len(deleted)

    def delete_all(self, visitor: str | None) -> int:
        """Delete all pairs of a visitor (None: of all) and return how many."""
        return self.delete([stored.id for stored in self.list(visitor, limit=-1)], visitor)

    def add_vote(self, pair: str, voter: str, winner: Winner, names: tuple[str, str]) -> bool:
        """Count a vote; False if this voter has voted on this pair.

        Raises AccelError for a wrong winner or voter, and when `MAX_VOTES` have been counted.
        """
        if winner not in WINNERS:
            raise AccelError(f"a vote is one of {', '.join(WINNERS)}, not {str(winner)[:40]!r}")
        check_name(voter, "visitor")
        if not voter:
            raise AccelError("a vote needs the id of its visitor")
        with self._write():
            if self._read("SELECT COUNT(*) FROM votes")[0][0] >= MAX_VOTES:
                raise AccelError(f"{MAX_VOTES} votes have been counted: no more are")
            row = (pair, voter, winner, *names)
            return self._db.execute("INSERT OR IGNORE INTO votes VALUES (?, ?, ?, ?, ?)", row).rowcount == 1

    def votes(self) -> list[Vote]:
        """All votes."""
        rows = self._read("SELECT pair, winner, name_a, name_b FROM votes")
        return [Vote(pair, winner, (a, b)) for pair, winner, a, b in rows]

    def voted(self, voter: str) -> set[str]:
        """The pairs that a voter has voted on."""
        if not _may_own(voter):
            return set()
        return {row[0] for row in self._read("SELECT pair FROM votes WHERE voter = ?", voter)}

    def secret(self) -> str:
        """A random key that stays the same as long as the folder is kept."""
        with self._write():
            self._db.execute("INSERT OR IGNORE INTO secrets VALUES ('page', ?)", (secrets.token_urlsafe(32),))
        return self._read("SELECT value FROM secrets WHERE name = 'page'")[0][0]

    @contextmanager
    def _write(self) -> Iterator[None]:
        """A transaction that other threads and processes wait for; an exception undoes it.

        Raises AccelError if the database cannot be written, as on a full disk.
        """
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise AccelError(f"results cannot be stored here now ({error})") from error
                raise

    def _read(self, query: str, *values) -> list[tuple]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def _stored(self, row: tuple) -> Stored:
        run_id, visitor, created, group, report = row
        return Stored(run_id, visitor, created, group, json.loads(report), self.runs / run_id)

    def _evict(self) -> list[str]:
        """Delete the rows of pairs beyond the caps, but not the newest; their ids.

        The oldest of the visitor who has most goes first, so that nobody's sweep removes what others have.
        """
        *rows, newest = self._db.execute("SELECT id, bytes, visitor FROM runs ORDER BY number").fetchall()
        evicted = []
        while rows:
            too_many = len(rows) + 1 > self.max_runs
            if not too_many and sum(size for _, size, _ in (*rows, newest)) <= self.max_bytes:
                break
            held = Counter()
            for _, size, visitor in rows:
                held[visitor] += 1 if too_many else size
            rows.remove(oldest := next(row for row in rows if row[2] == held.most_common(1)[0][0]))
            evicted.append(oldest[0])
        self._db.executemany("DELETE FROM runs WHERE id = ?", [(run_id,) for run_id in evicted])
        return evicted

    def _delete_row(self, run_id: str, visitor: str | None) -> bool:
        query = "DELETE FROM runs WHERE id = ?1 AND (?2 IS NULL OR visitor = ?2)"
        return self._db.execute(query, (str(run_id), visitor)).rowcount == 1

    def _remove_folders(self, run_ids: list[str]) -> None:
        for run_id in run_ids:
            shutil.rmtree(self.runs / run_id, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove folders without a row, rows without a folder, and what was being written."""
        with self._write():
            rows = {row[0] for row in self._db.execute("SELECT id FROM runs")}
            folders = {folder.name for folder in self.runs.iterdir()}
            self._db.executemany("DELETE FROM runs WHERE id = ?", [(run_id,) for run_id in rows - folders])
            self._remove_folders([name for name in folders - rows if _is_id(name)])
            for part in self.folder.glob("part-*"):
                shutil.rmtree(part, ignore_errors=True)


def _try_lock(file) -> bool:
    """Whether no other process holds the lock; it is held until it is changed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fill(folder: Path, files: dict[str, Path | bytes]) -> None:
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.move(content, folder / name)


def _may_own(visitor: str | None) -> bool:
    """Whether anything can belong to a visitor: nothing belongs to one without an id."""
    return visitor is None or (visitor != "" and _is_name(visitor))


def _is_id(run_id: str) -> bool:
    return isinstance(run_id, str) and RUN_ID.fullmatch(run_id) is not None


def _is_name(name: str) -> bool:
    return isinstance(name, str) and len(name) <= MAX_NAME and (name == "" or name.isprintable())


def own_or_new(visitor: str) -> str:
    """The id that a program gave itself, or a new one for an empty text. Raises AccelError for one that is too long."""
    check_name(visitor, "visitor")
    return visitor or uuid.uuid4().hex


def check_name(name: str, what: str) -> None:
    """Raise AccelError for the id of a visitor or group that cannot be stored."""
    if not _is_name(name):
        raise AccelError(f"the id of a {what} is a printable text of at most {MAX_NAME} characters")
