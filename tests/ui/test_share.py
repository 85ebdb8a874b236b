"""Links and preset files from outside: what they restore, and what is refused."""

import base64
import json
import random
import tracemalloc
import zlib
from urllib.parse import parse_qsl

import pytest

from accel.errors import AccelError
from accel.runtime.models import TINY, read_defaults
from accel.runtime.presets import build_methods, load_preset, preset_names
from accel.runtime.repeat import preset_yaml
from accel.runtime.run import MAX_PROMPT_LENGTH, build_run
from ui.share import MAX_LINK, MAX_TEXT, link_parameter, link_query, read_link, read_preset

MODELS = {TINY: ""}


def report(methods: dict, **settings) -> dict:
    run = build_run(
        read_defaults(TINY), **{"model": TINY, "prompt": "a red star", "seed": 7, "methods": methods, **settings}
    )
    return {**run.model_dump(), "steps_a": 50, "guidance_a": 5.0}


def complete(methods: dict) -> dict:
    return {name: method.model_dump() for name, method in zip(methods, build_methods(methods))}


def pack(values) -> str:
    """A `p` with any content."""
    data = values if isinstance(values, bytes) else json.dumps(values).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return base64.urlsafe_b64encode(packer.compress(data) + packer.flush()).decode().rstrip("=")


def refusal(query: dict) -> str:
    with pytest.raises(AccelError) as error:
        read_link(query, MODELS)
    text = str(error.value)
    assert "\n" not in text and len(text) <= 300
    return text


@pytest.mark.parametrize("name", preset_names())
def test_a_link_restores_the_settings_of_every_preset(name):
    pair = report(load_preset(name).methods, prompt="ünï \"'<b>& ?#%", seed=2**63 - 1)
    p = link_parameter(pair)
    assert len(p) < 600 and p.replace("-", "").replace("_", "").isalnum()
    shared = read_link({"p": p, "__theme": "dark", "owner": "key"}, MODELS)
    assert complete(shared.preset.methods) == complete(pair["methods"]) and shared.model == TINY
    assert {key: shared.run[key] for key in ("prompt", "seed", "steps", "guidance")} == {
        key: pair[key] for key in ("prompt", "seed", "steps", "guidance")
    }
    assert shared.run["reference"] == {"steps": 50, "guidance": 5.0, "methods": {}}


def test_a_link_restores_an_accelerated_reference():
    pair = report({"gpd": {"steps": 6}})
    pair["reference"] = {"steps": 30, "guidance": 3.0, "methods": {"fastercache": {"attention_interval": 3}}}
    assert read_link({"p": link_parameter(pair)}, MODELS).run["reference"] == pair["reference"]


def test_a_link_is_readable_where_names_and_numbers_say_all():
    pair = report(load_preset("fastercache").methods, prompt="a & b = c")
    query = dict(parse_qsl(link_query(pair)))
    assert query["preset"] == "fastercache" and query["seed"] == "7" and query["prompt"] == "a & b = c"
    shared = read_link(query, MODELS)
    assert shared.model == TINY  # also on a page whose first model is another one
    assert shared.preset == load_preset("fastercache") and shared.run["seed"] == 7 and shared.run["steps"] == 50


@pytest.mark.parametrize(
    "changes",
    [{"methods": {"fastercache": {"attention_interval": 6}}}, {"steps_a": 30}, {"model": "a/b"},
     {"reference": {"steps": 50, "guidance": 4.0, "methods": {"gpd": {}}}}],
    ids=str,
)  # fmt: skip
def test_a_link_is_packed_where_it_must_hold_more(changes):
    pair = {**report(load_preset("fastercache").methods), **changes}
    query = dict(parse_qsl(link_query(pair)))
    shared = read_link(query, {TINY: "", "a/b": ""})
    assert list(query) == ["p"] and shared.model == pair["model"]
    assert complete(shared.preset.methods) == complete(pair["methods"])


@pytest.mark.parametrize("first,last", [(0x20, 0x7E), (0x4E00, 0x9FFF), (0x1F300, 0x1F5FF)])
def test_the_longest_prompt_of_any_script_fits_into_a_link(first, last):
    rng = random.Random(1)
    prompt = "".join(chr(rng.randint(first, last)) for _ in range(MAX_PROMPT_LENGTH)).strip()
    query = dict(parse_qsl(link_query(report(load_preset("combined").methods, prompt=prompt))))
    assert list(query) == ["p"] and read_link(query, MODELS).run["prompt"] == prompt


def test_solver_and_shift_of_both_sides_are_in_the_link():
    pair = report({"fastercache": {}}, solver="euler", shift=3.5)
    pair["reference"] = {"steps": 40, "guidance": 4.0, "solver": "dpm++2m", "shift": None, "methods": {}}
    run = read_link({"p": link_parameter(pair)}, MODELS).run
    assert (run["solver"], run["shift"]) == ("euler", 3.5)
    assert run["reference"] == {"steps": 40, "guidance": 4.0, "solver": "dpm++2m", "methods": {}}
    assert read_link({"solver": "dpm++2s", "shift": "3.5"}, MODELS).run == {"solver": "dpm++2s", "shift": 3.5}


def test_only_what_is_given_is_changed():
    assert read_link({}, MODELS) is None and read_link({"__theme": "dark"}, MODELS) is None
    assert read_link({"seed": "42"}, MODELS).run == {"seed": 42}


def test_what_was_added_to_a_link_on_its_way_is_ignored():
    added = {"fbclid": "IwAR0", "utm_source": "letter", "x" * 5000: "1"}
    assert read_link(added, MODELS) is None and read_link({"seed": "42", **added}, MODELS).run == {"seed": 42}
    packed = {"p": link_parameter(report({"gpd": {"steps": 6}}))}
    assert read_link({**packed, **added}, MODELS) == read_link(packed, MODELS)


@pytest.mark.parametrize(
    "query,reason",
    [
        ({"preset": "../../etc/passwd"}, "no preset '../../etc/passwd'; there are asymrnr"),
        ({"preset": "x.yaml"}, "no preset"), ({"preset": ""}, "no preset"),
        ({"seed": "-1"}, "seed"), ({"seed": "1.5"}, "seed"), ({"seed": "9" * 30}, "seed"),
        ({"steps": "0"}, "steps = 0 is not allowed: a whole number from 1 to 1000"),
        ({"steps": "1e9"}, "steps = '1e9' is not allowed"), ({"solver": "magic"}, "one of default, unipc, euler"),
        ({"shift": "99"}, "a number from 0.1 to 20"),
        ({"guidance": "nan"}, "guidance"), ({"guidance": "inf"}, "guidance"),
        ({"prompt": " "}, "the prompt is empty"), ({"prompt": "x" * 2001}, "at most 2000"),
        ({"model": "/etc"}, "does not offer the model '/etc'"), ({"step": "9"}, "unknown setting 'step'"),
        ({"methods": "{}"}, "only p"), ({"solvers": "euler", "seed": "1"}, "did you mean solver"),
        ({"p": "AAAA", "seed": "1"}, "p alone"), ({"p": ""}, "damaged"), ({"p": "!!!"}, "damaged"),
        ({"p": "A" * (MAX_LINK + 1)}, "at most 12288"), ({"p": pack(b"\xff")}, "damaged"),
        ({"p": pack([1])}, "damaged"), ({"p": pack(b"[" * 9000)}, "damaged"),
        ({"p": pack(b'{"seed": NaN}')}, "damaged"),
        ({"p": pack(b'{"seed": ' + b"1" * 9000 + b"}")}, "damaged"),
        ({"p": pack({"methods": {"warp": {}}})}, "unknown method 'warp'"),
        ({"p": pack({"methods": {"fastercache": {"speed": 1}}})}, "fastercache.speed"),
        ({"p": pack({"methods": {"fastercache": {"attention_interval": 10**9}}})}, "attention_interval"),
        ({"p": pack({"methods": {"fastercache": [1]}})}, "fastercache"), ({"p": pack({"methods": None})}, "methods"),
        ({"p": pack({"methods": {"gpd": {"student": "/etc"}}})}, "gpd.student is for Python"),
        ({"p": pack({"methods": {"disca": {"predictor_dir": "/etc"}}})}, "disca.predictor_dir is for Python"),
        ({"p": pack({"reference": {"methods": {"gpd": {"student": "/etc"}}}})}, "gpd.student is for Python"),
        ({"p": pack({"reference": {"prompt": "x"}})}, "reference"), ({"p": pack({"reference": 1})}, "reference"),
        ({"p": pack({"preset": ["fastercache"]})}, "no preset"), ({"p": pack({"model": {}})}, "does not offer"),
        ({"p": pack({"seed": {}})}, "seed"), ({"p": pack({"seed": True})}, "seed"),
        ({"p": pack({"seed": "1"})}, "seed"),
        ({"p": pack({"prompt": "\ud800"})}, "prompt"), ({"p": pack({"prompt": None})}, "prompt"),
        ({"p": pack({"preset": "gpd", "methods": {}})}, "a preset and methods"),
        ({"p": pack({"__class__": 1})}, "unknown"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_in_one_sentence(query, reason):
    assert reason in refusal(query)


def test_a_small_link_cannot_fill_the_memory():
    bomb = pack(b'{"prompt": "' + b"a" * 9_000_000 + b'"}')
    assert len(bomb) < MAX_LINK
    tracemalloc.start()
    assert "damaged" in refusal({"p": bomb})
    assert tracemalloc.get_traced_memory()[1] < 400_000
    tracemalloc.stop()


def test_random_links_are_read_or_refused_in_a_sentence():
    rng, good = random.Random(0), link_parameter(report(load_preset("combined").methods))
    for _ in range(500):
        text = list(good)
        for _ in range(rng.randint(1, 4)):
            text[rng.randrange(len(text))] = rng.choice("abcXYZ019-_=%\u20ac")
        try:
            read_link({"p": "".join(text)}, MODELS)
        except AccelError as error:
            assert len(str(error)) <= 300 and "\n" not in str(error)


@pytest.mark.parametrize("name", preset_names())
def test_a_downloaded_preset_can_be_uploaded(name):
    pair = report(load_preset(name).methods)
    assert complete(read_preset(preset_yaml(pair)).methods) == complete(pair["methods"])


BOMB = "a: &a [x, x]\n" + "".join(f"{y}: &{y} [*{x}, *{x}]\n" for x, y in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize(
    "text,reason",
    [
        ("x" * (MAX_TEXT + 1), "at most 16384"), (BOMB, "aliases"), ("<<: *x", "aliases"),
        ("[" * 9000, "nested too deeply"),
        ("methods: !!python/object/apply:os.system ['true']", "not valid YAML"), ("a: b: c", "not valid YAML"),
        ("a: " + "1" * 9000, "not valid YAML"), ("- 1", "a preset is a mapping"),
        ("1: 2", "a preset is a mapping"), ("", "a preset is a mapping"),
        (b"\xff\xfe\x00", "UTF-8"), ("\ud800", "UTF-8"), ("a: \x00", "not valid YAML"),
        ("speed: 9", "unknown setting speed; known are title"), ("steps: 0", "steps = 0 is not allowed"),
        ("methods: {gpd: {student: ../x}}", "is for Python"),
        ("methods: {fastercache: {attention_interval: .nan}}", "attention_interval"),
        ("methods: {1: {}}", "methods"), ("methods: [gpd]", "methods"), ("title: [1]", "title"),
    ],
)  # fmt: skip
def test_a_preset_that_is_not_allowed_is_refused_in_one_sentence(text, reason):
    with pytest.raises(AccelError) as error:
        read_preset(text)
    assert reason in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) <= 300
