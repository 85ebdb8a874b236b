"""CogVideoX, accelerated in three lines."""

import torch
from diffusers import CogVideoXPipeline
from diffusers.utils import export_to_video

import accel

pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b", dtype=torch.bfloat16)
pipe.to("cuda")  # where it does not fit: pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()  # decoding all of a video at once takes more memory than denoising it
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a red fox runs through fresh snow", num_inference_steps=50).frames[0]
print(trace.summary())
export_to_video(video, "cogvideox.mp4", fps=8)
