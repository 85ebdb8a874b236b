"""LTX-Video, accelerated in three lines."""

import torch
from diffusers import LTXPipeline
from diffusers.utils import export_to_video

import accel

pipe = LTXPipeline.from_pretrained("Lightricks/LTX-Video", dtype=torch.bfloat16)
pipe.to("cuda")  # where it does not fit: pipe.enable_model_cpu_offload()
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a cyclist crosses a bridge in morning fog", num_inference_steps=50).frames[0]
print(trace.summary())
export_to_video(video, "ltx.mp4", fps=24)
