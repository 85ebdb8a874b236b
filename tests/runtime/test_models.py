"""Loading models: what is missing or damaged is named, with the remedy."""

import shutil
from pathlib import Path

import pytest

from accel.errors import AccelError
from accel.runtime.models import (
    TINY,
    check_files,
    folders_of_results,
    load_pipeline,
    read_defaults,
    record_hashes,
    resolve,
)


def test_a_missing_model_says_which_one_is_shipped():
    with pytest.raises(ValueError, match="no model folder 'models/none'; the shipped model is 'models/tiny-wan'"):
        load_pipeline("models/none")


def test_what_is_found_out_about_a_model_is_not_written_where_one_may_only_read(tmp_path, monkeypatch):
    assert folders_of_results(str(tmp_path), Path("out"), "fittedsolver") == [Path("out"), tmp_path / "fittedsolver"]
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert folders_of_results(str(tmp_path), Path("out")) == [Path("out")]


def test_damaged_weights_are_named_with_the_remedy(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    file = next((tmp_path / "m" / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"vae.*safetensors is damaged .* restore it with"):
        check_files(tmp_path / "m")
    file.unlink()
    with pytest.raises(ValueError, match="vae holds no .safetensors file"):
        check_files(tmp_path / "m")


def test_a_wrong_accel_json_is_refused_in_one_sentence(tmp_path):
    file = tmp_path / "accel.json"
    file.write_text('{"height": "tall"}')
    with pytest.raises(ValueError, match="accel.json is damaged .height: Input should be a valid integer"):
        read_defaults(str(tmp_path))
    for damaged in (b'{"height": 6', b"\xff\xfe\x00", b"", b"[1]"):
        file.write_bytes(damaged)
        with pytest.raises(AccelError, match=r"^[^\n]*accel.json is damaged \([^\n]*\); restore it with") as refused:
            read_defaults(str(tmp_path))
        assert "Errno" not in str(refused.value)


def test_changed_weights_are_refused_where_their_hash_was_recorded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "m")
    record_hashes(tmp_path / "m")
    check_files(tmp_path / "m")
    file = next((tmp_path / "m" / "transformer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(AccelError, match=r"transformer.*safetensors is damaged \(its SHA-256 is not that in .*.sha256"):
        check_files(tmp_path / "m")
    record_hashes(tmp_path / "m")
    check_files(tmp_path / "m")


def test_every_weight_of_the_shipped_model_has_its_hash():
    for part in ("transformer", "text_encoder", "vae"):
        (file,) = (Path(resolve(TINY)) / part).glob("*.safetensors")
        assert file.with_name(file.name + ".sha256").is_file()


@pytest.mark.parametrize("file", ["transformer/config.json", "vae/config.json", "model_index.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\x00", b"[]", b'{"_class_name": 3}'])
def test_a_damaged_configuration_is_one_sentence(file, content, tmp_path):
    shutil.copytree(resolve(TINY), tmp_path / "m", ignore=shutil.ignore_patterns("gpd*", "meanflow", "predictor"))
    (tmp_path / "m" / file).write_bytes(content)
    with pytest.raises(AccelError) as refused:
        load_pipeline(str(tmp_path / "m"))
    sentence = str(refused.value)
    assert "damaged" in sentence and str(tmp_path) in sentence and "\n" not in sentence and "[Errno" not in sentence
