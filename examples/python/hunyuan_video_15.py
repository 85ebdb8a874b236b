"""HunyuanVideo 1.5, accelerated in three lines."""

import torch
from diffusers import HunyuanVideo15Pipeline
from diffusers.utils import export_to_video

import accel

pipe = HunyuanVideo15Pipeline.from_pretrained(
    "hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", dtype=torch.bfloat16
)
pipe.to("cuda")  # where it does not fit: pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()  # decoding all of a video at once takes more memory than denoising it
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a paper boat drifts down a rainy street", num_inference_steps=50).frames[0]
print(trace.summary())
export_to_video(video, "hunyuan_video_15.mp4", fps=24)
