"""Wan 2.1, accelerated in three lines; WanPipeline loads Wan 2.2 in the same way."""

import torch
from diffusers import WanPipeline

import accel

pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", dtype=torch.bfloat16)
pipe.to("cuda")
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a lighthouse at dusk, waves roll below it", num_inference_steps=50).frames[0]
print(len(video), trace.summary())
