"""SkyReels-V2, accelerated in three lines."""

import torch
from diffusers import SkyReelsV2Pipeline
from diffusers.utils import export_to_video

import accel

pipe = SkyReelsV2Pipeline.from_pretrained("Skywork/SkyReels-V2-T2V-14B-540P-Diffusers", dtype=torch.bfloat16)
pipe.to("cuda")  # where it does not fit: pipe.enable_model_cpu_offload()
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a dancer turns on an empty stage", num_inference_steps=50).frames[0]
print(trace.summary())
export_to_video(video, "skyreels_v2.mp4", fps=24)
