"""HunyuanVideo, accelerated in three lines. Its guidance is distilled in: a step is one call."""

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.utils import export_to_video

import accel

pipe = HunyuanVideoPipeline.from_pretrained("hunyuanvideo-community/HunyuanVideo", dtype=torch.bfloat16)
pipe.to("cuda")  # where it does not fit: pipe.enable_model_cpu_offload()
pipe.vae.enable_tiling()  # decoding all of a video at once takes more memory than denoising it
with accel.apply(pipe, "stepcache") as trace:
    video = pipe("a paper boat drifts down a rainy street", num_inference_steps=50).frames[0]
print(trace.summary())
export_to_video(video, "hunyuan_video.mp4", fps=15)
