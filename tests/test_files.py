"""Results appear together or not at all, and one process writes into a folder."""

import errno
import os
import signal
import threading

import pytest

from accel.errors import AccelError, amount, explain_os_error, quote
from accel.files import all_or_nothing, atomic_write, only_writer, read_json

KNOWN = ("a.npy", "b.npy", "old.mp4", "run.json")


OLD = {**dict.fromkeys(KNOWN, "old"), "notes.txt": "mine"}
NEW = {"a.npy": "new", "b.npy": "new", "run.json": "new", "notes.txt": "mine"}


@pytest.fixture
def folder(tmp_path):
    """A folder with earlier results and a file of the user's."""
    for name in KNOWN:
        (tmp_path / name).write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    return tmp_path


def write(part, text="new"):
    for name in ("a.npy", "b.npy", "run.json"):
        (part / name).write_text(text)


def contents(folder) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def test_new_results_replace_the_old_ones_and_leave_other_files(folder):
    with all_or_nothing(folder, "run.json", KNOWN) as part:
        write(part)
        assert contents(folder) == OLD
    assert contents(folder) == NEW


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interruption_leaves_the_old_results(error, folder):
    with pytest.raises(error), all_or_nothing(folder, "run.json", KNOWN) as part:
        (part / "a.npy").write_text("new")
        raise error
    assert contents(folder) == OLD


def test_an_interruption_leaves_no_folder_where_there_was_none(tmp_path):
    with pytest.raises(KeyboardInterrupt), all_or_nothing(tmp_path / "x" / "out", "run.json", KNOWN):
        raise KeyboardInterrupt
    assert not (tmp_path / "x" / "out").exists()


def test_ctrl_c_while_files_are_replaced_comes_afterwards(folder, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        signal.raise_signal(signal.SIGINT)
        replace(source, target)

    monkeypatch.setattr("accel.files.os.replace", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C
    with pytest.raises(KeyboardInterrupt), all_or_nothing(folder, "run.json", KNOWN) as part:
        write(part)
    signal.signal(signal.SIGINT, before)
    assert contents(folder) == NEW


def test_a_process_that_is_killed_while_files_are_replaced_leaves_no_complete_results(folder, monkeypatch):
    calls, replace = [], os.replace

    def killed(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise MemoryError  # stands for a kill: nothing is cleaned up after the files that were replaced
        replace(source, target)

    monkeypatch.setattr("accel.files.os.replace", killed)
    with pytest.raises(MemoryError), all_or_nothing(folder, "run.json", KNOWN) as part:
        write(part)
    assert "run.json" not in contents(folder)


def test_a_full_disk_is_one_sentence_and_leaves_the_old_results(folder):
    with pytest.raises(AccelError) as refused, all_or_nothing(folder, "run.json", KNOWN):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/secret")
    assert str(refused.value) == f"{folder} has no new results: the disk is full: free some space and try again"
    assert contents(folder) == OLD


def test_a_second_writer_is_refused_until_the_first_one_ends(folder):
    with only_writer(folder):
        with pytest.raises(AccelError, match="another process writes into .*: wait for its end, or give another"):
            with all_or_nothing(folder, "run.json", KNOWN):
                pass
    with all_or_nothing(folder, "run.json", KNOWN) as part:
        write(part)
    assert contents(folder) == NEW


def test_what_a_killed_process_left_is_removed(folder):
    (folder / ".part").mkdir()
    (folder / ".part" / "a.npy").write_text("half")
    with all_or_nothing(folder, "run.json", KNOWN) as part:
        assert not list(part.iterdir())
        write(part)
    assert contents(folder) == NEW


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(AccelError, match="out is a file, not a folder: give another folder"):
        with only_writer(tmp_path / "out"):
            pass


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff"], ids=["empty", "cut", "list", "bytes"])
def test_a_damaged_file_is_named_with_the_remedy(content, tmp_path):
    file = tmp_path / "job.json"
    file.write_bytes(content)
    with pytest.raises(AccelError, match=r"^[^\n]*job.json is damaged \([^\n]*\); delete it to begin anew$"):
        read_json(file)


def test_many_writers_of_one_file_leave_a_whole_one(tmp_path):
    texts, failed = [str(i) * 20_000 for i in range(8)], []

    def many(text):
        try:
            for _ in range(20):
                with atomic_write(tmp_path / "file.json") as part:
                    part.write_text(text)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=many, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and contents(tmp_path).keys() == {"file.json"} and contents(tmp_path)["file.json"] in texts


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file.json").write_text("old")
    with pytest.raises(KeyError), atomic_write(tmp_path / "file.json") as part:
        part.write_text("new")
        raise KeyError
    assert contents(tmp_path) == {"file.json": "old"}


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "the disk is full: free some space and try again"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "there is no a.txt"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a"),
            "the operating system does not allow to use a",
        ),
        (OSError("100 requested and 20 written"), "a file could not be written completely: the disk may be full"),
        (OSError(errno.EIO, "Input/output error", "a.txt"), "a.txt could not be used: input/output error"),
    ],
)
def test_errors_of_the_system_are_one_sentence(error, sentence):
    assert explain_os_error(error) == sentence


def test_values_are_quoted_shortly_and_numbers_have_their_noun():
    assert quote(10**5000) == "a number of thousands of digits"
    assert len(quote("x" * 10_000)) < 70 and quote("\ud800").isascii() and len(quote([[[[[[[[1] * 99]]]]]]])) < 70
    assert [amount(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [amount(n, "step is", "steps are") for n in (1, 2)] == ["1 step is", "2 steps are"]
