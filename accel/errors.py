"""The error whose text is meant for the user, and words for its text."""

from __future__ import annotations

import errno
import os
import reprlib
from typing import Any

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
REFUSALS = {
    errno.ENOENT: "there is no {}",
    errno.EEXIST: "{} exists already",
    errno.ENOTDIR: "{} is not a folder",
    errno.EISDIR: "{} is a folder, not a file",
    errno.EACCES: "the operating system does not allow to use {}",
    errno.EPERM: "the operating system does not allow to use {}",
    errno.EROFS: "{} is on a disk that cannot be written to",
    errno.ENAMETOOLONG: "the name {} is too long",
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60


class AccelError(ValueError):
    """An input or a set-up that cannot work. Its text is one sentence: what was wrong, and what is allowed."""


def explain_os_error(error: OSError, name: str | None = None) -> str:
    """One sentence about an error of the operating system. `name`: what to call the file in place of its own path."""
    if error.errno in DISK_FULL:
        return "the disk is full: free some space and try again"
    what = name or (os.fsdecode(error.filename) if error.filename is not None else "a file")
    if error.errno is None:  # raised by a library: numpy's tells that fewer bytes were written
        return f"{what} could not be written completely: the disk may be full"
    reason = (error.strerror or type(error).__name__).lower()
    return REFUSALS.get(error.errno, "{} could not be used: " + reason.replace("{", "").replace("}", "")).format(what)


def quote(value: Any) -> str:
    """A value of any kind and size as short printable text."""
    try:
        return _short.repr(value)
    except ValueError:  # an integer of more digits than Python converts
        return "a number of thousands of digits"


def sentence(text: object) -> str:
    """The text of an error as a sentence, with a capital letter and a full stop."""
    text = str(text)
    return f"{text[:1].upper()}{text[1:]}."


def amount(number: int, one: str, more: str = "") -> str:
    """A number with its words: "1 step", "2 steps"; with `more`, "1 step is" and "2 steps are"."""
    return f"{number} {one if number == 1 else more or one + 's'}"
