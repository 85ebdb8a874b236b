"""A distilled student: 6 calls in place of 48 guided steps. Guidance is distilled in; set guidance_scale=1."""

from diffusers import WanPipeline

import accel

pipe = WanPipeline.from_pretrained("models/tiny-wan")
with accel.apply(pipe, accel.load_preset("gpd")) as trace:
    prompt = "a large red star spins slowly over a cloudy navy background"
    video = pipe(prompt, height=96, width=96, num_frames=17, num_inference_steps=6, guidance_scale=1.0).frames[0]
print(video.shape, trace.summary())
