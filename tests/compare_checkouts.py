"""Runs every preset on two prompts in two checkouts and says whether the final latents are equal bit for bit.

python tests/compare_checkouts.py OLD NEW    (folders of two checkouts; exit code 1 if any latents differ)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

PROMPTS = (
    "a large red star spins slowly over a cloudy navy background",
    "on a starry white background, a tiny cyan ring bounces fast",
)
GUIDED = (20, 5.0)  # steps, guidance
OWN_STEPS = {"balanced": (20, 5.0), "quick": (10, 5.0), "gpd": (6, 1.0), "turbo": (10, 1.0)}
OWN_STEPS |= dict.fromkeys(("meanflow", "disca"), (20, 1.0))


def record(file: Path) -> None:
    """Save the final latents of every preset of the checkout in the working directory."""
    import accel

    torch.set_num_threads(1)
    pipe = accel.load_pipeline("models/tiny-wan")
    latents = {}
    for preset in sorted(path.stem for path in Path("presets").glob("*.yaml")):
        steps, guidance = OWN_STEPS.get(preset, GUIDED)
        for prompt in PROMPTS:
            with accel.apply(pipe, accel.load_preset(preset)):
                latents[f"{preset}: {prompt}"] = pipe(
                    prompt, height=96, width=96, num_frames=17, num_inference_steps=steps, guidance_scale=guidance,
                    max_sequence_length=32, generator=torch.Generator().manual_seed(1), output_type="latent",
                ).frames  # fmt: skip
    torch.save(latents, file)


def main() -> None:
    """Record in both checkouts and compare."""
    if sys.argv[1] == "--record":
        return record(Path(sys.argv[2]))
    made, script = [], str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as folder:
        for i, checkout in enumerate(sys.argv[1:3]):
            file = Path(folder) / f"{i}.pt"
            command = [sys.executable, script, "--record", str(file)]
            subprocess.run(command, cwd=checkout, check=True, env={"PYTHONPATH": str(Path(checkout).resolve())})
            made.append(torch.load(file))
    old, new = made
    differ = [name for name in old if name not in new or not torch.equal(old[name], new[name])]
    print(f"{len(old) - len(differ)} of {len(old)} runs are equal bit for bit", *differ, sep="\n")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
