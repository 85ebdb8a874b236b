"""Videos as files: the settings inside survive, and nothing incomplete is left behind."""

import numpy as np
import pytest

from accel.runtime.video import read_settings, write_mp4

FRAMES = np.zeros((3, 16, 16, 3), np.uint8)


def test_a_video_that_cannot_be_written_completely_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (2, 0.25))  # a full disk
    with pytest.raises(OSError, match="could not be written: the file is incomplete"):
        write_mp4(tmp_path / "v.mp4", FRAMES, 8)
    assert not list(tmp_path.iterdir())


def test_settings_survive_the_video_file_with_every_character(tmp_path):
    settings = {"prompt": 'a "red"; star = #1 \\ ring\nnew line, ünïcode'}
    write_mp4(tmp_path / "v.mp4", FRAMES, 8, settings)
    assert read_settings(tmp_path / "v.mp4") == settings


def test_a_video_without_settings_is_refused(tmp_path):
    write_mp4(tmp_path / "v.mp4", FRAMES, 8)
    with pytest.raises(ValueError, match="holds no settings; only videos made by `python -m accel` do"):
        read_settings(tmp_path / "v.mp4")
