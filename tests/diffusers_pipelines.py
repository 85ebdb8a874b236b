"""Runs diffusers' own pipeline tests plain and inside `accel.apply`, and says which of them end otherwise.

python tests/diffusers_pipelines.py DIFFUSERS [FAMILY ...]    (a checkout of diffusers; exit code 1 if any test differs)

Three comparisons: no method against the plain pipeline, where all outputs must be equal bit for bit, too; then, with at
least 12 steps in every call, FasterCache against the plain pipeline, by outcome alone. Tests that fetch a tiny
encoder get one of the same kind, made here: no network is needed. Their stored values then fail on both sides.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import wraps
from pathlib import Path
from unittest.mock import patch

FAMILIES = ("wan", "cogvideo", "hunyuan_video", "hunyuan_video1_5", "ltx", "mochi", "skyreels_v2")
MIN_STEPS = 12  # FasterCache acts
SIDES = {"plain": (None, 0), "no method": ([], 0), "plain, 12": (None, MIN_STEPS), "fastercache": ("fastercache", 12)}
REFUSAL = "and accel.apply do not go together"  # of diffusers' own caches, by a method
COMPARED = (("plain", "no method"), ("plain, 12", "fastercache"))


def bytes_tokenizer(*_, **__):
    """A tokenizer that needs no files: its tokens are bytes."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


def t5_config(*_, **__):
    """The size of the T5 that the tests fetch."""
    from transformers import T5Config

    return T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, decoder_start_token_id=0)


def t5_encoder(*_, **__):
    """A random T5 encoder, always the same."""
    import torch
    from transformers import T5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5EncoderModel(t5_config()).eval()


def siglip(*_, **__):
    """A random image encoder, always the same."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SiglipVisionModel(config).eval()


def siglip_processor(*_, **__):
    """The pictures of that encoder."""
    from transformers import SiglipImageProcessor

    return SiglipImageProcessor(size={"height": 30, "width": 30})


STAND_INS = {
    "AutoTokenizer": bytes_tokenizer,
    "CLIPTokenizer": bytes_tokenizer,
    "LlamaTokenizer": bytes_tokenizer,
    "LlamaTokenizerFast": bytes_tokenizer,
    "Qwen2Tokenizer": bytes_tokenizer,
    "AutoConfig": t5_config,
    "T5EncoderModel": t5_encoder,
    "SiglipVisionModel": siglip,
    "SiglipImageProcessor": siglip_processor,
}
FETCHED = ("hf-internal-testing/", "finetrainers/")


@contextlib.contextmanager
def stand_ins():
    """Inside, what the tests would fetch from the Hub is made here."""
    import transformers

    with contextlib.ExitStack() as stack:
        for name, make in STAND_INS.items():
            load = getattr(transformers, name).from_pretrained

            def local(source, *inputs, _load=load, _make=make, **named):
                return _make() if str(source).startswith(FETCHED) else _load(source, *inputs, **named)

            stack.enter_context(patch.object(getattr(transformers, name), "from_pretrained", local))
        yield


class Recorder:
    """A pytest plugin: runs each call of a pipeline inside `accel.apply`, and notes how the tests end."""

    def __init__(self, families: list[str], methods, steps: int):
        """`methods` is what `accel.apply` gets; None: the calls are plain. `steps` is the least number in each call."""
        self.methods, self.steps = methods, steps
        self.tests: dict[str, dict] = {}
        self.test = ""
        self.calls = self.acted = 0
        for family in families:
            module = importlib.import_module(f"diffusers.pipelines.{family}")
            for name in dir(module):
                if name.endswith("Pipeline") and "__call__" in vars(getattr(module, name)):
                    self.wrap(getattr(module, name))

    def wrap(self, pipeline: type) -> None:
        """Put a method between a pipeline's class and its callers."""
        original = pipeline.__call__

        @wraps(original)
        def call(pipe, *inputs, **named):
            return self.run(pipe, original, *inputs, **self.with_more_steps(original, named))

        pipeline.__call__ = call

    def with_more_steps(self, original, named: dict) -> dict:
        if not self.steps or not {"num_inference_steps", "prompt", "prompt_embeds"} & named.keys():
            return named
        strength = inspect.signature(original).parameters.get("strength")
        strength = named.get("strength", strength.default if strength else 1)
        return {**named, "num_inference_steps": math.ceil(self.steps / strength)}

    def run(self, pipe, original, *inputs, **named):
        """One call of a pipeline, whose output is noted."""
        import accel

        if self.methods is None or not is_supported(pipe):
            out = original(pipe, *inputs, **named)
        else:
            self.calls += 1
            with accel.apply(pipe, self.methods) as trace:
                out = original(pipe, *inputs, **named)
            self.acted += any(event.action in ("reuse", "rebuild") for event in trace.events.values())
        self.tests.setdefault(self.test, {}).setdefault("outputs", []).append(digest(out))
        return out

    def pytest_runtest_logstart(self, nodeid: str, location) -> None:
        self.test = nodeid

    def pytest_runtest_logreport(self, report) -> None:
        test = self.tests.setdefault(report.nodeid, {})
        if report.when == "call" or report.outcome != "passed":
            test["outcome"] = report.outcome
            test["reason"] = report.longreprtext.strip().splitlines()[-1] if report.failed else ""


def is_supported(pipe) -> bool:
    """Whether the pipeline belongs to a family; others (LTX's upsampler, which has no transformer) run plainly."""
    from accel.errors import AccelError
    from accel.families import family_of

    try:
        return bool(family_of(pipe))
    except AccelError:
        return False


def digest(value) -> str:
    """A hash of all tensors, arrays and images in a pipeline's output."""
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return hashlib.sha1(value.detach().float().cpu().numpy().tobytes()).hexdigest()
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, list | tuple):
        return hashlib.sha1("".join(map(digest, value)).encode()).hexdigest()
    return hashlib.sha1(np.asarray(value).tobytes()).hexdigest()


def record(side: str, file: Path, families: list[str]) -> None:
    """Run the tests of the checkout in the working directory on one side, and write down how they ended."""
    import pytest

    recorder = Recorder(families, *SIDES[side])
    with stand_ins():
        options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:xdist"]
        pytest.main([*options, *(f"tests/pipelines/{family}" for family in families)], plugins=[recorder])
    file.write_text(json.dumps({"tests": recorder.tests, "calls": recorder.calls, "acted": recorder.acted}))


def compare(plain: dict, other: dict, outputs: bool) -> dict:
    """The tests that end in another way, or, if `outputs`, whose pipelines gave another output; and how many there are.

    Those that a method refuses, as one of diffusers' caches is on, come apart.
    """
    found = {}
    for name in sorted(plain["tests"].keys() | other["tests"].keys()):
        a, b = plain["tests"].get(name, {}), other["tests"].get(name, {})
        if a.get("outcome") != b.get("outcome"):
            found[name] = f"{a.get('outcome')} -> {b.get('outcome')}: {b.get('reason') or a.get('reason')}"
        elif outputs and a.get("outputs") != b.get("outputs"):
            found[name] = "another output"
    refused = {name: what for name, what in found.items() if REFUSAL in what}
    return {
        "tests": len(plain["tests"]),
        "passed": sum(test.get("outcome") == "passed" for test in plain["tests"].values()),
        "calls": other["calls"],
        "acted": other["acted"],
        "differ": {name: what for name, what in found.items() if name not in refused},
        "refused": refused,
    }


def main() -> None:
    """Run all sides for each family, print a table and one line of JSON."""
    if sys.argv[1] == "--record":
        return record(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
    checkout, families = Path(sys.argv[1]).resolve(), sys.argv[2:] or FAMILIES
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    columns = "family | comparison | tests | passed | calls inside | method acted | differ | refused"
    print(f"| {columns} |\n{8 * '|---'}|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            sides = {}
            for side in SIDES:
                file = Path(folder) / "record.json"
                command = [sys.executable, __file__, "--record", side, str(file), family]
                subprocess.run(command, cwd=checkout, check=True, env=environment, stdout=sys.stderr)
                sides[side] = json.loads(file.read_text())
            for a, b in COMPARED:
                rows.append({"family": family, "comparison": f"{b} / {a}", **compare(sides[a], sides[b], a == "plain")})
                print("|", " | ".join(str(v if isinstance(v, str | int) else len(v)) for v in rows[-1].values()), "|")
    print(json.dumps(rows))
    sys.exit(any(row["differ"] for row in rows))


if __name__ == "__main__":
    main()
