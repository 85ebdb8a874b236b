"""A stock pipeline, accelerated in three lines; prints what was skipped."""

from diffusers import WanPipeline

import accel

pipe = WanPipeline.from_pretrained("models/tiny-wan")
with accel.apply(pipe, "stepcache") as trace:
    prompt = "a large red star spins slowly over a cloudy navy background"
    video = pipe(prompt, height=96, width=96, num_frames=17, num_inference_steps=50, guidance_scale=5.0).frames[0]
print(video.shape, trace.summary())
