"""Commands of the toy world: render scenes, judge videos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from ..files import all_or_nothing, write_json
from .options import Out, print_json

JUDGED_WIDTH = 96  # columns: in fewer, small shapes cannot be told apart, and more tell the judge nothing


def sample(
    n: Annotated[int, typer.Option(min=1, help="Scenes.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the scenes.")] = 0,
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 96,
    frames: Annotated[int, typer.Option(min=1, help="Frames of each scene.")] = 33,
    held_out: Annotated[bool, typer.Option(help="Only combinations that are held out of training.")] = False,
    out: Out = Path("runs/world"),
) -> None:  # fmt: skip
    """Render captioned scenes: mp4s, captions.json and a contact sheet in --out, in place of earlier ones."""
    import random
    import re

    import imageio.v3 as iio
    import numpy as np

    from ..runtime.video import write_mp4
    from ..world.render import render
    from ..world.scene import caption, sample_scene

    rng, captions, rows = random.Random(seed), {}, []
    before = [file.name for file in out.glob("*.mp4") if re.fullmatch(r"\d{3,}", file.stem)]
    with all_or_nothing(out, "captions.json", (*before, "sheet.png", "captions.json")) as part:
        for i in tqdm(range(n), desc="scenes"):
            scene = sample_scene(rng, held_out)
            text, video = caption(scene, rng), render(scene, frames, size).numpy()
            captions[f"{i:03d}.mp4"] = text
            write_mp4(part / f"{i:03d}.mp4", video, 12, {"caption": text})
            rows.append(np.concatenate(list(video[:: max(1, frames // 8)]), 1))
        iio.imwrite(part / "sheet.png", np.concatenate(rows))
        write_json(part / "captions.json", captions)
    print_json({"n": n, "size": size, "frames": frames, "out": str(out)})


def judge(
    folder: Annotated[Path, typer.Argument(help="Folder of mp4s with captions.json, as `sample` makes it.")],
) -> None:
    """Score the videos of a folder against their captions."""
    from ..world.captions import read_captions

    captions = read_captions(folder)
    import numpy as np

    from ..runtime.video import read_mp4
    from ..world.judge import score

    scores = {name: score(read_mp4(folder / name, JUDGED_WIDTH), text) for name, text in captions.items()}
    for name, values in scores.items():
        attributes = " ".join(f"{a} {v:.0f}" for a, v in values.items() if a != "mean")
        print(name, attributes, f"mean {values.get('mean', 0):.2f}")
    names = sorted({attribute for values in scores.values() for attribute in values})
    means = {a: float(np.mean([values[a] for values in scores.values() if a in values])) for a in names}
    print_json({"n": len(scores), **means})
