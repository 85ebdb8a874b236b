"""Writes files completely or not at all, and keeps a second writer out of a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from .errors import AccelError, explain_os_error

try:
    import fcntl
except ImportError:  # Windows has none: a second writer is not noticed there
    fcntl = None

M = TypeVar("M", bound=BaseModel)
PART = ".part"  # folder of results that are not complete yet


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """A temporary path of its own to write to; without an error it replaces `file` at the end, else it is deleted."""
    part = unique_part(file)
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_json(file: Path, document: dict) -> None:
    """Write a document that people may read too, completely or not at all."""
    with atomic_write(file) as part:
        part.write_text(json.dumps(document, indent=1) + "\n")


def read_json(file: Path, remedy: str = "delete it to begin anew") -> dict:
    """The content of a JSON file that holds an object. Raises AccelError, with the remedy, if it does not."""
    try:
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            return content
        raise ValueError("it is not a JSON object")
    except OSError as error:
        raise AccelError(explain_os_error(error)) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise AccelError(f"{file} is damaged ({error}); {remedy}") from None


def read_model(kind: type[M], file: Path, what: str) -> M:
    """The content of a JSON file that is there, checked. Raises AccelError, as in "a.json is no profile: ..."."""
    try:
        return kind.model_validate_json(file.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        problem = " ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise AccelError(f"{file} is no {what}: {problem}") from None


def read_utf8(file: Path) -> str:
    """The text of a file. Raises AccelError if it is not one in UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise AccelError(f"{file} is not a text in UTF-8") from None


def unique_part(file: Path) -> Path:
    """A path beside a file, with its ending, that no other writer has."""
    return file.with_name(f".{file.stem[:100]}-{uuid.uuid4().hex}.part{file.suffix}")


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Inside the context, no other process writes into a folder, which is made if it is missing; empty, it goes again.

    Raises AccelError if another one does already, or if the folder cannot be used.
    """
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise AccelError(f"{folder} is a file, not a folder: give another folder for the results") from None
    except OSError as error:
        raise AccelError(explain_os_error(error)) from error
    with _locked(folder):
        try:
            yield
        finally:
            if is_new:
                with suppress(OSError):  # it is not empty where something was written
                    folder.rmdir()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Inside the context, this process alone holds a folder's lock, where the system and the file system have locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)  # this releases the lock, as the end of the process does


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise AccelError(f"another process writes into {folder}: wait for its end, or give another folder") from None
    except OSError:
        return  # this file system has no locks


@contextmanager
def all_or_nothing(folder: Path, last: str, known: tuple[str, ...]) -> Iterator[Path]:
    """A temporary folder to write results to; without an error its files replace those of `folder` at the end.

    `last` names the file that says that the results are complete, `known` all files that earlier results may have: they
    go. Other files stay. An interrupted process leaves the old results or the new ones, a killed one at worst results
    without the file `last`. Raises AccelError if another process writes here, or for what the system refuses.
    """
    with only_writer(folder):
        part = folder / PART
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        try:
            part.mkdir()
            yield part
            with deferred_signals():
                _replace(part, folder, last, known)
        except OSError as error:
            raise AccelError(f"{folder} has no new results: {explain_os_error(error, 'a file there')}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _replace(part: Path, folder: Path, last: str, known: tuple[str, ...]) -> None:
    (folder / last).unlink(missing_ok=True)
    new = sorted((file.name for file in part.iterdir()), key=lambda name: name == last)
    for name in set(known) - set(new):
        (folder / name).unlink(missing_ok=True)
    for name in new:
        os.replace(part / name, folder / name)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Ctrl-C and a request to terminate wait until the end of the context."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    pending: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: pending.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in pending:
            signal.raise_signal(number)
