"""Wan 2.1, accelerated in three lines; WanPipeline loads Wan 2.2 in the same way."""

import torch
from diffusers import WanPipeline
from diffusers.utils import export_to_video

import accel

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype=torch.bfloat16)
pipe.to("cuda")  # where it does not fit: pipe.enable_model_cpu_offload()
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a lighthouse at dusk, waves roll below it", num_inference_steps=50).frames[0]
print(trace.summary())
export_to_video(video, "wan.mp4", fps=16)
