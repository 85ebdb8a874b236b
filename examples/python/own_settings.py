"""A method with parameters of your own instead of a preset; a value outside its range is refused with the reason."""

from diffusers import WanPipeline

import accel

pipe = WanPipeline.from_pretrained("models/tiny-wan")
fastercache = accel.METHODS["fastercache"](attention_interval=3, extrapolation="sigma", guidance_interval=4)
with accel.apply(pipe, [fastercache]) as trace:
    prompt = "a huge cyan ring bounces slowly on a grassy forest background"
    video = pipe(prompt, height=96, width=96, num_frames=17, num_inference_steps=50, guidance_scale=5.0).frames[0]
print(video.shape, trace.summary())
