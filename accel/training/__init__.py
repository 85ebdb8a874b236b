"""How the shipped weights are made: `python -m accel train ...`. Nothing but the command line imports this."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from accelerate import PartialState

from ..files import whole
from ..models import ROOT, TINY
from .distil import remaining
from .fit import Recipe, fit, trained

# The small setting is for CPUs, the large one for a GPU; same code, same layout. The medium one is for CPUs as well,
# on the living world: it begins with the weights in `start` and makes the model in `target`.
SETTINGS = {
    "small": {"size": 64, "frames": 17, "fps": 8, "clips": 12_000},
    "medium": {
        "size": 96,
        "frames": 17,
        "fps": 8,
        "clips": 2000,
        "living": True,
        "start": TINY,
        "target": f"{TINY}-96",
        "save_every": 900,  # seconds: a contact sheet takes a while
    },
    "large": {"size": 96, "frames": 33, "fps": 12, "clips": 40_000},
}
_STUDENT = {"warmup": 10, "decay_from": 0.0, "weight_decay": 0.0, "ema": 0.0}  # no average: a stage is short
RECIPES = {
    "small": {
        "vae": {"steps": 4100, "lr": 2e-3, "matrix_lr": 8e-3, "decay_from": 0.25},
        "base": {"steps": 4600, "lr": 1.4e-3, "matrix_lr": 5e-3, "decay_from": 0.5, "betas": (0.9, 0.98), "seed": 3},
        "gpd": {"steps": 38, "lr": 3e-4, "matrix_lr": 1e-3} | _STUDENT,
        "meanflow": {"steps": 450, "lr": 3e-4, "matrix_lr": 1e-3} | _STUDENT | {"ema": 0.98},
        "predictor": {"steps": 450, "lr": 1e-3, "matrix_lr": 3e-3} | _STUDENT | {"ema": 0.98},
    },
    "medium": {
        "vae": {"steps": 520, "lr": 6e-4, "matrix_lr": 3e-3, "warmup": 40, "decay_from": 0.4, "seed": 1},
        "base": {
            "steps": 6000,
            "lr": 1e-3,
            "matrix_lr": 3e-3,
            "warmup": 40,
            "decay_from": 0.7,
            "betas": (0.9, 0.98),
            "seed": 5,
        },
    },
    "large": {
        "vae": {"steps": 12_000, "lr": 2e-3, "matrix_lr": 8e-3, "decay_from": 0.25},
        "base": {"steps": 30_000, "lr": 1e-3, "matrix_lr": 4e-3, "betas": (0.9, 0.98)},
        "gpd": {"steps": 150, "lr": 3e-4, "matrix_lr": 1e-3} | _STUDENT,
        "meanflow": {"steps": 1000, "lr": 3e-4, "matrix_lr": 1e-3} | _STUDENT | {"ema": 0.98},
        "predictor": {"steps": 1000, "lr": 1e-3, "matrix_lr": 3e-3} | _STUDENT | {"ema": 0.98},
    },
    "others": {
        "gpd": {"steps": 75, "lr": 5e-5} | _STUDENT,
        "meanflow": {"steps": 1000, "lr": 5e-5} | _STUDENT | {"ema": 0.98},
        "predictor": {"steps": 1000, "lr": 1e-4} | _STUDENT | {"ema": 0.98},
    },
}
STUDENTS = ("gpd", "meanflow", "predictor")  # what is made of a model that is there
PARTS = ("vae", "base", *STUDENTS)


def train_parts(what: str, minutes: float | None, resume: bool, out: Path, setting: str | None = None, **order) -> dict:
    """Train a part, or all of them in order, and write them into the setting's model with a record of how.

    What was stopped before its last step stays in `out`, for `resume`. `minutes` are for all parts together. Without
    a `setting` it is small on a CPU and large on a GPU. Raises ValueError for an unknown setting.
    `order`, for students alone: the fields of `orders.Order`. Only what belongs to the shipped model is recorded.
    """
    if order := _given(what, order):
        folder = out / order.get("arm", what) / Path(order.get("model", "")).name
        return {what: train_students(what, minutes, resume, folder, **order)}
    state = PartialState()
    device = str(state.device)
    setting = setting or ("large" if state.device.type == "cuda" else "small")
    if setting not in SETTINGS:
        raise ValueError(f"unknown setting {setting!r}; there are {', '.join(SETTINGS)}")
    shape = SETTINGS[setting]
    file, out = _target(shape) / "training.json", out / Path(shape.get("target", "")).name
    record = json.loads(file.read_text()) if file.is_file() else {}
    name = f"cpu, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    began = time.monotonic()
    for part in [p for p in PARTS if p in RECIPES[setting]] if what == "all" else (what,):
        left = remaining(minutes, began)
        recipe = Recipe(**RECIPES[setting][part])
        after = earlier(record.get(part), out / part) if resume and part in TRAINERS else None
        if part in TRAINERS:
            done = TRAINERS[part](recipe, shape, device, left, resume, out / part)
        else:
            done = train_students(part, left, resume, out / part)
        stopped, finished = done.pop("stopped", False), done.get("finished", done["step"] == done["steps"])
        record[part] = {"setting": setting, "device": name, **done, "recipe": recipe.model_dump()}
        if after:
            record[part]["after"] = after
        if state.is_main_process and finished:
            _write_record(file, record)
        if stopped or not finished:  # the next part is made from a whole one
            break
    return record


def _target(shape: dict) -> Path:
    """The folder of the model that a setting makes."""
    return ROOT / shape.get("target", TINY)


def _given(what: str, order: dict) -> dict:
    """What is given of an order. Raises ValueError for a part that there is not, or what is not for it."""
    if what not in (*PARTS, "all"):
        raise ValueError(f"unknown part {what!r}; there are {', '.join(PARTS)} and all")
    given = {key: value for key, value in order.items() if value is not None}
    if given.get("arm") == what:  # no rival, the method itself
        del given["arm"]
    if "videos" in given and what != "meanflow":
        raise ValueError("--videos is for meanflow alone: the others go whole ways, from noise")
    if given and what not in STUDENTS:
        raise ValueError(f"--{next(iter(given))} is for {', '.join(STUDENTS)} alone, not for {what}")
    return given


def part_ways() -> None:
    """End the connection of the processes that trained together: left to the interpreter's end it can abort one."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def earlier(record: dict | None, folder: Path) -> dict | None:
    """The record of the finished run whose weights this one begins with, if it does."""
    chunk = (folder / "state.pt").is_file()  # of this run: it keeps the beginning it had
    return (record or {}).get("after") if chunk else record


def _train_vae(recipe: Recipe, shape: dict, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    from . import vae

    living, target = shape.get("living", False), _target(shape) / "vae"
    task = vae.VaeTask(recipe, shape["size"], shape["frames"], living=living)
    if resume and (out / "state.pt").is_file():
        task.shape_as(out / "state.pt")
    elif resume and target.is_dir():
        task.start_from(target)
    elif "start" in shape:
        task.start_from(ROOT / shape["start"] / "vae")
    summary = fit(task, out, minutes=minutes, resume=resume)
    if summary["step"] < summary["steps"] or not PartialState().is_main_process:
        return summary
    return {**summary, **vae.finish(task, target)}


def _train_base(recipe: Recipe, shape: dict, device: str, minutes: float | None, resume: bool, out: Path) -> dict:
    from . import base

    target = _target(shape)
    task = _base_task(recipe, shape, device, out)
    if resume and not (out / "state.pt").is_file() and (target / "transformer").is_dir():
        task.start_from(target)
    elif "start" in shape:
        task.start_from(ROOT / shape["start"])
    summary = fit(task, out, minutes=minutes, resume=resume, save_every=shape.get("save_every", 400))
    if summary["step"] < summary["steps"] or not PartialState().is_main_process:
        return summary
    base.finish(task, target)
    _write_home(shape)
    return summary


def _base_task(recipe: Recipe, shape: dict, device: str, out: Path):
    """The base's task with the autoencoder of the setting's model. Raises ValueError if there is none yet."""
    from diffusers import AutoencoderKLWan

    from . import base
    from .speed import can_compile

    target, start = _target(shape), shape.get("start")
    if not (target / "vae" / "config.json").is_file():
        raise ValueError("the autoencoder comes first: python -m accel train vae")
    autoencoder = AutoencoderKLWan.from_pretrained(target / "vae")
    with PartialState().main_process_first():  # which encodes the pool that the others load
        return base.BaseTask(
            recipe, autoencoder, shape["size"], shape["frames"], shape["clips"], out, device, can_compile(device),
            shape.get("living", False), start and ROOT / start,
        )  # fmt: skip


def export_base(setting: str, out: Path) -> dict:
    """Write the averaged weights of the base's last checkpoint into the setting's model, finished or not.

    A training that is under way is not disturbed. Raises ValueError if there is no checkpoint.
    """
    from . import base

    shape, folder = SETTINGS[setting], out / Path(SETTINGS[setting].get("target", "")).name / "base"
    if not (folder / "state.pt").is_file():
        raise ValueError(f"{folder} holds no checkpoint: python -m accel train base --setting {setting}")
    task = _base_task(Recipe(**RECIPES[setting]["base"]), shape, "cpu", folder)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for parameter, averaged in zip(trained(task.module), state["ema"]["shadow_params"], strict=True):
            parameter.copy_(averaged)
    base.finish(task, _target(shape))
    _write_home(shape)
    done = {"step": state["step"], "steps": task.recipe.steps, "seconds": round(state["seconds"], 1)}
    file = _target(shape) / "training.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    _write_record(file, {**record, "base": {"setting": setting, **done, "recipe": task.recipe.model_dump()}})
    return done


def _write_record(file: Path, record: dict) -> None:
    """Write the record of how each part of a model was made."""
    with whole(file) as made:
        made.write_text(json.dumps(record, indent=1) + "\n")


def _write_home(shape: dict) -> None:
    """Write what the setting's model is made for beside its weights."""
    from .base import TEXT

    home = {"height": shape["size"], "width": shape["size"], "frames": shape["frames"], "fps": shape["fps"]}
    home |= {"steps": 50, "guidance": 4.0, "text_length": TEXT, "captions": True}
    (_target(shape) / "accel.json").write_text(json.dumps(home, indent=1) + "\n")


TRAINERS = {"vae": _train_vae, "base": _train_base}  # these begin with the weights that they replace


def train_students(what: str, minutes: float | None, resume: bool, out: Path, **order) -> dict:
    """Distil a model; raises ValueError if the shipped one is asked for and is not there."""
    from .orders import Order
    from .teach import train_gpd
    from .teach_meanflow import train_meanflow
    from .teach_predictor import train_predictor

    asked, device = Order(**order), str(PartialState().device)
    if asked.model == TINY and not (ROOT / TINY / "transformer" / "config.json").is_file():
        raise ValueError("the base model comes first: python -m accel train base")
    kind = "others" if not asked.toy() else "large" if device.startswith("cuda") else "small"
    trainer = {"gpd": train_gpd, "meanflow": train_meanflow, "predictor": train_predictor}[what]
    return trainer(Recipe(**RECIPES[kind][what]), asked, device, minutes, resume, out)
