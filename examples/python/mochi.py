"""Mochi 1, accelerated in three lines."""

import torch
from diffusers import MochiPipeline
from diffusers.utils import export_to_video

import accel

pipe = MochiPipeline.from_pretrained("genmo/mochi-1-preview", dtype=torch.bfloat16)
pipe.to("cuda")  # where it does not fit: pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()  # decoding all of a video at once takes more memory than denoising it
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a chameleon slowly turns its eye", num_inference_steps=50).frames[0]
print(trace.summary())
export_to_video(video, "mochi.mp4", fps=30)
