"""The zip of a pair: what is in it, that it needs nothing else, and what is refused."""

import json
import zipfile
from html.parser import HTMLParser

import imageio.v3 as iio
import numpy as np
import pytest

from accel.cli import app
from accel.evaluation.pair_report import report_page, write_report
from accel.runtime.paths import ROOT
from accel.runtime.presets import load_preset
from accel.runtime.video import write_mp4

RECORDED = ROOT / "examples" / "runs" / "fastercache"
EVIL = '"><script>alert(1)</script><img src=https://example.com/x onerror=x>'


@pytest.fixture
def pair(tmp_path):
    """A folder with a pair of short videos and the report of a recorded one."""
    folder = tmp_path / "pair"
    folder.mkdir()
    for name, value in (("a", 50), ("b", 200)):
        write_mp4(folder / f"{name}.mp4", np.full((5, 64, 64, 3), value, np.uint8), 8)
    (folder / "run.json").write_text((RECORDED / "run.json").read_text())
    return folder


class Links(HTMLParser):
    """Collects the elements of a page, and everything that it refers to."""

    def __init__(self):
        super().__init__()
        self.tags, self.targets = set(), set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.targets |= {value for name, value in attributes if name in ("src", "href")}


def test_the_zip_holds_the_videos_the_settings_and_a_page_that_refers_to_them_alone(pair, tmp_path):
    write_report(pair, tmp_path / "report.zip")
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        names = set(archive.namelist())
        page = archive.read("index.html").decode()
        (tmp_path / "preset.yaml").write_bytes(archive.read("preset.yaml"))
        assert json.loads(archive.read("run.json"))["seed"] == 2
    assert names == {"a.mp4", "b.mp4", "side_by_side.mp4", "run.json", "preset.yaml", "index.html"}
    links = Links()
    links.feed(page)
    assert links.targets == names - {"index.html"} and "script" not in links.tags
    assert "1.61 times as fast" in page and "n = 1" in page and page.count("<rect data-action") == 50 * 8 * 2
    assert load_preset(tmp_path / "preset.yaml").methods["fastercache"]["guidance_interval"] == 4


def test_both_videos_are_side_by_side_under_their_labels(pair, tmp_path):
    write_report(pair, tmp_path / "report.zip")
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        archive.extract("side_by_side.mp4", tmp_path)
    frames = np.stack(list(iio.imiter(tmp_path / "side_by_side.mp4")))
    assert frames.shape == (5, 256 + 32, 2 * 256 + 8, 3)
    assert abs(frames[:, 100, 100].mean() - 50) < 4 and abs(frames[:, 100, 400].mean() - 200) < 4
    assert frames[0, :32, :256].min() < 90 and frames[0, :32, -256:].min() < 90  # the labels


def test_everything_in_a_page_is_escaped():
    report = json.loads((RECORDED / "run.json").read_text())
    report |= {"prompt": EVIL, "device": EVIL, "model": "models/" + EVIL}
    report["trace"]["layers"][0] = EVIL
    report["trace"]["summary"]["messages"] = [EVIL]
    links = Links()
    links.feed(report_page(report))
    assert not links.tags & {"script", "img"}
    assert links.targets == {"a.mp4", "b.mp4", "side_by_side.mp4", "run.json", "preset.yaml"}


def test_the_command_makes_it(pair, capsys):
    app(["report", str(pair)], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["bytes"] == (pair / "report.zip").stat().st_size


def without_video(pair):
    (pair / "b.mp4").unlink()


def with_damaged_video(pair):
    (pair / "a.mp4").write_bytes(b"no video")


def damaged(pair):
    (pair / "run.json").write_text("{")


def of_one_run(pair):
    (pair / "run.json").write_text('{"prompt": "x", "trace": {}}')


def unknown_method(pair):
    report = json.loads((pair / "run.json").read_text())
    (pair / "run.json").write_text(json.dumps({**report, "methods": {"warp": {}}}))


@pytest.mark.parametrize(
    "spoil,reason",
    [(without_video, "b.mp4 is missing"), (with_damaged_video, "a.mp4 cannot be read as a video"),
     (damaged, "not JSON"), (of_one_run, "not the report of a pair"),
     (unknown_method, "unknown method 'warp'")],
)  # fmt: skip
def test_a_folder_without_a_pair_is_refused_and_nothing_is_written(pair, tmp_path, spoil, reason):
    spoil(pair)
    with pytest.raises(ValueError, match=reason):
        write_report(pair, tmp_path / "out" / "report.zip")
    assert not (tmp_path / "out").exists()
