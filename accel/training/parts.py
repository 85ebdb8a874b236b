"""`python -m accel train PART`: trains the autoencoder, the base model or a student, and records how."""

from __future__ import annotations

import json
import shutil
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from ..errors import AccelError, amount
from ..files import only_writer, read_json, write_json
from ..runtime.models import TINY, read_config
from ..runtime.paths import ROOT
from .loop import any_process, fit, trainable
from .optimizer import OptimConfig
from .settings import OPTIM_CONFIGS, PARTS, SETTINGS, STUDENTS, ModelSetting, check_part
from .stages import remaining

DONE = "part.json"  # in the folder of a finished run: its record
PARENT = "parent.json"  # in the folder of a run: the record of the run that it starts from
RUN = "run.json"  # in the folder of a run: its settings
MADE_FROM = {"base": STUDENTS, "meanflow": ("predictor",)}  # part: those that are worthless once it is a new one


def train_parts(what: str, minutes: float | None, resume: bool, out: Path, setting: str | None = None, **job) -> dict:
    """Train a part, or all of them in order, into the shipped model; returns the record of how each was made.

    After Ctrl-C it has "stopped" too.

    A part that is stopped before its last step stays in `out`, for `resume` (of GPD, students of finished stages are in
    the model); where nothing is there to resume, the autoencoder, the base and GPD go on from the weights of the model.
    `minutes` limits all parts together. The default setting is small on a CPU, large on a GPU. `job` holds fields of
    `DistillJob`, for students only; such a job is not recorded in the shipped model. Raises AccelError for an unknown
    part or setting, one that has no optimizer settings for the part, if a run of other settings is to be resumed, or if
    another process trains in `out`.
    """
    # without `cpu`, torchrun's processes on a CPU stay apart; they wait while the first one encodes the clips
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    if job := _job_fields(what, job):
        if setting:
            raise AccelError("--setting is for the shipped model: leave it out with --model or --ablation")
        folder = out / job.get("ablation", what) / Path(job.get("model", "")).name
        with _alone_in(folder):
            done = train_student(what, minutes, resume, folder, None, **job)
            stopped = {"stopped": True} if done.pop("stopped", False) else {}
            return {what: done, **stopped}
    with _alone_in(out):
        return _train_shipped(what, minutes, resume, out, setting)


def _alone_in(folder: Path) -> AbstractContextManager[None]:
    """Inside the context, no other training writes into a folder. Raises AccelError if one does."""
    return only_writer(folder) if PartialState().is_main_process else nullcontext()


def _train_shipped(what: str, minutes: float | None, resume: bool, out: Path, setting: str | None) -> dict:
    """Train parts of the shipped model; returns the record of how each was made."""
    state = PartialState()
    device, stopped = str(state.device), False
    setting = _setting_name(setting)
    model, optims = SETTINGS[setting], OPTIM_CONFIGS[setting]
    if what not in (*optims, "all"):
        raise AccelError(f"the setting {setting} has no {what}; it has {', '.join(optims)}")
    file = ROOT / TINY / "training.json"
    record = read_config(file) if file.is_file() else {}
    began = time.monotonic()
    parts = [part for part in PARTS if part in optims] if what == "all" else [what]
    for old in () if resume else (PARENT, DONE, RUN, "state.pt"):
        for part in parts:
            (out / part / old).unlink(missing_ok=True)
    for part in parts:
        left, optim, done_file = remaining(minutes, began), OptimConfig(**optims[part]), out / part / DONE
        if what == "all" and resume and done_file.is_file():
            _check_done(record.get(part), done_file)
            continue
        if part != parts[0] and any_process(left is not None and left <= 0):
            break
        parent = parent_run(record.get(part), out / part) if resume and part in TRAINERS else None
        if part in TRAINERS:
            check_run(out / part, setting, optim)
            done = TRAINERS[part](optim, model, device, left, resume, out / part)
        else:
            done = train_student(part, left, resume, out / part, setting)
        stopped, finished = done.pop("stopped", False), done.get("finished", done["step"] == done["steps"])
        record[part] = {"setting": setting, "device": _device_name(), **done, "optim": optim.model_dump()}
        if parent:
            record[part]["parent_run"] = parent
        if state.is_main_process and finished:
            write_json(file, record)
            write_json(done_file, record[part])
            _clear_finished(part, out)
        if stopped or not finished:  # the next part needs this one
            break
    return {**record, "stopped": True} if stopped else record


def _job_fields(what: str, job: dict) -> dict:
    """The fields of a job that were given. Raises AccelError for an unknown part, or a field that is not for it."""
    check_part(what)
    given = {key: value for key, value in job.items() if value is not None}
    if given.get("ablation") == what:  # the method itself
        del given["ablation"]
    if "videos" in given and what != "meanflow":
        raise AccelError("--videos is for meanflow only: the other students learn full trajectories, from noise")
    if given and what not in STUDENTS:
        raise AccelError(f"--{next(iter(given))} is for {', '.join(STUDENTS)} only, not for {what}")
    return given


def _setting_name(setting: str | None) -> str:
    """A setting's name, by default that of the device. Raises AccelError for an unknown one."""
    setting = setting or ("large" if PartialState().device.type == "cuda" else "small")
    if setting not in SETTINGS:
        raise AccelError(f"unknown setting {setting!r}; there are {', '.join(SETTINGS)}")
    return setting


def _device_name() -> str:
    """The training device, for the record."""
    if PartialState().device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu, {amount(torch.get_num_threads(), 'thread')}"


def shutdown_distributed() -> None:
    """Close the connections between training processes: if the interpreter closes them at its end, one can abort."""
    state = PartialState()
    state.wait_for_everyone()
    state.destroy_process_group()


def parent_run(record: dict | None, folder: Path) -> dict | None:
    """The record of the finished run from whose weights this run starts, if there is one.

    A new run keeps it beside its checkpoints: at a later resume, `record` may be this run's own.
    """
    file = folder / PARENT
    if not (folder / "state.pt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if record:
            write_json(file, record)
        else:
            file.unlink(missing_ok=True)
    return read_json(file) if file.is_file() else None


def check_run(folder: Path, setting: str, optim: OptimConfig) -> None:
    """Note the settings of a new run beside its checkpoints. Raises AccelError if a run of other ones is there."""
    file, about = folder / RUN, json.loads(json.dumps({"setting": setting, "optim": optim.model_dump()}))
    if not (folder / "state.pt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, about)
    elif file.is_file() and (begun := read_json(file)) != about:
        other = f"--setting {begun['setting']}" if begun["setting"] != setting else "other settings of its optimizer"
        raise AccelError(f"{folder} was begun with {other}: go on with these, or start without --resume")


def _check_done(record: dict | None, done_file: Path) -> None:
    """Raise AccelError if the model holds another run of a part than the one that was finished here: later parts would
    be trained on it."""
    if record != read_json(done_file):
        part = done_file.parent.name
        raise AccelError(
            f"{TINY} holds another {part} than the one that was finished in {done_file.parent}: bring back the weights "
            "that it wrote, or start without --resume"
        )


def _clear_finished(part: str, out: Path) -> None:
    """Remove the checkpoint of a finished part, which must not replace later weights, and what older ones made."""
    for file in ("state.pt", PARENT, RUN) if part in TRAINERS else ():
        (out / part / file).unlink(missing_ok=True)
    for later in MADE_FROM.get(part, ()):
        if (out / later).is_dir():
            print(f"{out / later} belonged to the earlier {part}: it is removed", file=sys.stderr)
            shutil.rmtree(out / later)


def _train_vae(
    optim: OptimConfig, model: ModelSetting, device: str, minutes: float | None, resume: bool, out: Path
) -> dict:
    from .tasks import vae

    target, state = ROOT / TINY / "vae", out / "state.pt"
    bases = (target.with_name("transformer") / "config.json", out.with_name("base") / "state.pt")
    task = vae.VaeTask(optim, model.size, model.frames)
    if resume and state.is_file() and vae.trains_encoder(state):
        task.shape_as(state)
    elif resume and target.is_dir():
        task.start_from(target)
        if any(file.is_file() for file in bases):  # finished, or in training
            task.keep_latents()
    summary = fit(task, out, minutes=minutes, resume=resume)
    if summary["step"] < summary["steps"] or not PartialState().is_main_process:
        return summary
    return {**summary, **vae.finish(task, target)}


def _train_base(
    optim: OptimConfig, model: ModelSetting, device: str, minutes: float | None, resume: bool, out: Path
) -> dict:
    from .tasks import base_model as base

    began = time.monotonic()
    target, task = ROOT / TINY, _base_task(optim, model, device, out)
    with PartialState().main_process_first():  # which encodes the clips that the others load
        _ = task.dataset
    if resume and not (out / "state.pt").is_file() and (target / "transformer").is_dir():
        task.start_from(target)
    left = remaining(minutes, began)  # after the clips have been encoded
    summary = fit(task, out, minutes=left, resume=resume, save_every=model.save_every)
    if summary["step"] < summary["steps"] or not PartialState().is_main_process:
        return summary
    base.finish(task, target)
    _write_defaults(model)
    return summary


TRAINERS = {"vae": _train_vae, "base": _train_base}  # with `resume` they start from the weights that they replace


def _base_task(optim: OptimConfig, model: ModelSetting, device: str, out: Path):
    """The task of the base model, with the model's own autoencoder. Raises AccelError if there is none yet."""
    from diffusers import AutoencoderKLWan

    from .fast_blocks import can_compile
    from .tasks import base_model as base

    target = ROOT / TINY
    if not (target / "vae" / "config.json").is_file():
        raise AccelError("the autoencoder comes first: python -m accel train vae")
    autoencoder = AutoencoderKLWan.from_pretrained(target / "vae")
    return base.BaseTask(
        optim, autoencoder, model.size, model.frames, model.clips, out, device, can_compile(device),
        start=target if (target / "tokenizer").is_dir() else None,
    )  # fmt: skip


def export_base(what: str, setting: str | None, out: Path) -> dict:
    """Write the EMA weights of the base's last checkpoint into the shipped model, finished or not.

    A training that is running is not disturbed. Raises AccelError for another part, or if there is no checkpoint.
    """
    from .tasks import base_model as base

    if what != "base":
        raise AccelError(f"only the base model can be exported, not {what}")
    setting = _setting_name(setting)
    model = SETTINGS[setting]
    folder, target = out / "base", ROOT / TINY
    if not (folder / "state.pt").is_file():
        raise AccelError(f"{folder} holds no checkpoint: python -m accel train base --setting {setting}")
    task = _base_task(OptimConfig(**OPTIM_CONFIGS[setting]["base"]), model, "cpu", folder)
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    with torch.no_grad():
        for parameter, average in zip(trainable(task.module), state["ema"]["shadow_params"], strict=True):
            parameter.copy_(average)
    base.finish(task, target)
    _write_defaults(model)
    done = {"step": state["step"], "steps": task.optim.steps, "seconds": round(state["seconds"], 1)}
    file = target / "training.json"
    record = read_config(file) if file.is_file() else {}
    parent = parent_run(record.get("base"), folder)
    about = {"setting": setting, "device": _device_name()} | ({"parent_run": parent} if parent else {})
    write_json(file, {**record, "base": {**about, **done, "optim": task.optim.model_dump()}})
    return done


def _write_defaults(model: ModelSetting) -> None:
    """Write the model's default settings, `accel.json`."""
    from .tasks.base_model import MAX_TOKENS

    defaults = {"height": model.size, "width": model.size, "frames": model.frames, "fps": model.fps}
    defaults |= {"steps": 50, "guidance": model.guidance, "text_length": MAX_TOKENS, "toy_world": True}
    defaults |= {"metrics": ["adherence", "texture"]}
    write_json(ROOT / TINY / "accel.json", defaults)


def train_student(what: str, minutes: float | None, resume: bool, out: Path, setting: str | None = None, **job) -> dict:
    """Distil a model into students. Raises AccelError if the shipped model does not exist yet."""
    from .gpd_job import GpdJob
    from .jobs import DistillJob, run_job
    from .meanflow_job import MeanFlowJob
    from .predictor_job import PredictorJob

    distill_job, device = DistillJob(**job), str(PartialState().device)
    if distill_job.model == TINY and not (ROOT / TINY / "transformer" / "config.json").is_file():
        raise AccelError("the base model comes first: python -m accel train base")
    kind = _setting_name(setting) if distill_job.is_toy() else "others"
    spec = next(spec for spec in (GpdJob(), MeanFlowJob(), PredictorJob()) if spec.method == what)
    optim, save_every = OptimConfig(**OPTIM_CONFIGS[kind][what]), SETTINGS[kind].save_every if kind in SETTINGS else 400
    return run_job(spec, optim, distill_job, device, minutes, resume, out, save_every)
