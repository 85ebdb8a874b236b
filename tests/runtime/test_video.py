"""Videos as files: the settings inside survive, nothing incomplete is left behind, and failures are one sentence."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from accel.errors import AccelError
from accel.runtime.video import read_mp4, read_settings, warm_encoder, write_mp4

FRAMES = np.zeros((3, 16, 16, 3), np.uint8)


class BrokenWriter:
    """Stands for an ffmpeg that ends while frames are sent to it."""

    def __init__(self, path, **options):
        path.write_bytes(b"half")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def append_data(self, frame):
        raise OSError(32, "Broken pipe")


def test_a_video_that_cannot_be_written_completely_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (2, 0.25))  # a full disk
    with pytest.raises(AccelError, match="^v.mp4 could not be written: the disk is full$"):
        write_mp4(tmp_path / "v.mp4", FRAMES, 8)
    assert not list(tmp_path.iterdir())


def test_an_ffmpeg_that_fails_is_reported_without_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr("imageio.v2.get_writer", BrokenWriter)
    with pytest.raises(AccelError, match="^v.mp4 could not be written: ffmpeg failed, the disk may be full$"):
        write_mp4(tmp_path / "v.mp4", FRAMES, 8)
    assert not list(tmp_path.iterdir())


def test_a_folder_may_have_a_name_that_looks_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "12:30").mkdir()
    write_mp4("12:30/v.mp4", FRAMES, 8, {"seed": 1})
    assert read_settings(Path("12:30/v.mp4")) == {"seed": 1}


def test_a_missing_folder_is_named_as_the_reason(tmp_path):
    with pytest.raises(AccelError, match="^v.mp4 could not be written: its folder does not exist$"):
        write_mp4(tmp_path / "none" / "v.mp4", FRAMES, 8)


def missing():
    raise RuntimeError("No ffmpeg exe could be found. Install ffmpeg on your system, or\nset IMAGEIO_FFMPEG_EXE")


@pytest.mark.parametrize("exe", [missing, lambda: "/nowhere/ffmpeg"], ids=["missing", "misnamed"])
def test_a_missing_ffmpeg_is_one_sentence_everywhere(exe, tmp_path, monkeypatch):
    write_mp4(tmp_path / "v.mp4", FRAMES, 8)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", exe)
    sentence = "^ffmpeg was not found: `pip install imageio-ffmpeg` brings one$"
    for use in (
        lambda: write_mp4(tmp_path / "w.mp4", FRAMES, 8),
        lambda: read_settings(tmp_path / "v.mp4"),
        lambda: warm_encoder.__wrapped__(),
    ):
        with pytest.raises(AccelError, match=sentence):
            use()


def test_a_full_folder_of_temporary_files_is_one_sentence(monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/tmp/accel-123")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(AccelError, match="^temporary files cannot be written: the disk is full: free some space"):
        warm_encoder.__wrapped__()


def test_writers_of_one_video_do_not_collide(tmp_path):
    failed = []

    def write():
        try:
            write_mp4(tmp_path / "v.mp4", FRAMES, 8, {"prompt": "a"})
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and os.listdir(tmp_path) == ["v.mp4"] and read_settings(tmp_path / "v.mp4") == {"prompt": "a"}


def test_an_enlarged_video_is_read_in_the_size_it_had(tmp_path):
    frames = np.zeros((3, 96, 96, 3), np.uint8)
    frames[:, :48] = 200
    write_mp4(tmp_path / "a.mp4", frames, 8)
    found = read_mp4(tmp_path / "a.mp4", 96)
    assert found.shape == frames.shape and found.dtype == np.uint8 and np.abs(found - frames.astype(int)).mean() < 2
    assert read_mp4(tmp_path / "a.mp4", 60).shape == (3, 64, 64, 3)  # the file has 192 columns
    assert read_mp4(tmp_path / "a.mp4", 100).shape == (3, 192, 192, 3)


def test_settings_survive_the_video_file_with_every_character(tmp_path):
    settings = {"prompt": 'a "red"; star = #1 \\ ring\nnew line, ünïcode'}
    write_mp4(tmp_path / "v.mp4", FRAMES, 8, settings)
    assert read_settings(tmp_path / "v.mp4") == settings


def test_a_video_without_settings_is_refused(tmp_path):
    write_mp4(tmp_path / "v.mp4", FRAMES, 8)
    with pytest.raises(ValueError, match="holds no settings; only videos made by `python -m accel` do"):
        read_settings(tmp_path / "v.mp4")
