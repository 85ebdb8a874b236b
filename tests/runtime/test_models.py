"""Loading models: what is missing or damaged is named, with the remedy."""

import pytest

from accel.runtime.models import check_files, load_pipeline, read_defaults


def test_a_missing_model_says_which_one_is_shipped():
    with pytest.raises(ValueError, match="no model folder 'models/none'; the shipped model is 'models/tiny-wan'"):
        load_pipeline("models/none")


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
    (tmp_path / "accel.json").write_text('{"height": "tall"}')
    with pytest.raises(ValueError, match="accel.json: height: Input should be a valid integer"):
        read_defaults(str(tmp_path))
