"""What the host must know of a model family: `Family` says it as most diffusers models do it.

A family corrects what is different there, in one file; nobody else knows a model.
Letters: b batch, c channels, f frames, h w grid rows and columns, n tokens, t text tokens, d width of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import AccelError

Grid = tuple[int, int, int]


class Family:
    """Where things are in the pipelines and transformers of one family."""

    pipelines: ClassVar[tuple[str, ...]] = ()  # beginnings of their class names
    blocks: ClassVar[tuple[str, ...]] = ()  # attributes of a transformer that hold its blocks, in the order of use
    attention: ClassVar[str] = ""  # attribute of a block that holds its video self-attention
    latent_format: ClassVar[str] = "BCFHW"  # as diffusers writes it: b batch, c channels, f frames
    is_joint: ClassVar[bool] = False  # blocks take and return text beside the video, attention is over both
    batches_guidance: ClassVar[bool] = False  # one call computes both branches, as a batch [uncond, cond]
    embeds_guidance: ClassVar[bool] = False  # guidance is an input of the one branch
    compiles_attention: ClassVar[bool] = False  # the attention can be intercepted inside a compiled block
    trains_students: ClassVar[bool] = False  # students and predictors can be trained for it
    fps: ClassVar[int] = 16  # frames per second of its videos, as in the examples of diffusers
    remarks: ClassVar[dict[str, str]] = {}  # by method, where it does not simply run

    def denoisers(self, pipe) -> list[nn.Module]:
        """The pipeline's transformers in the order of use. Raises AccelError if it has none."""
        if getattr(pipe, "transformer", None) is None:
            raise AccelError(f"this {type(pipe).__name__} has no transformer: there is nothing to accelerate")
        return [pipe.transformer]

    def denoiser(self, pipe) -> nn.Module:
        """The first of them, whose sizes are those of all."""
        return self.denoisers(pipe)[0]

    def block_lists(self, model: nn.Module) -> dict[str, nn.ModuleList]:
        """The lists of blocks by the attribute that holds them, in the order of use."""
        return {name: getattr(model, name) for name in self.blocks if len(getattr(model, name, ()))}

    def block_names(self, model: nn.Module) -> list[str]:
        """The names of all blocks as modules, in the order of use."""
        return [f"{name}.{i}" for name, blocks in self.block_lists(model).items() for i in range(len(blocks))]

    def is_stack(self, model: nn.Module) -> bool:
        """Whether the model does nothing between two blocks."""
        return True

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """Each block's video self-attention by the name of its layer."""
        lists = self.block_lists(model).items()
        return {
            f"{name}.{i}.{self.attention}": getattr(block, self.attention)
            for name, blocks in lists
            for i, block in enumerate(blocks.children())  # the host may iterate over them in another way
        }

    def in_channels(self, model: nn.Module) -> int:
        """Latent channels of a video that is made from text alone."""
        return model.config.in_channels

    def out_channels(self, model: nn.Module) -> int | None:
        """Latent channels of the video; behind them an input may have those of a given image."""
        return getattr(model.config, "out_channels", None)

    def patch(self, model: nn.Module) -> Grid:
        """Latent frames, rows and columns of a token."""
        patch = model.config.patch_size
        if not isinstance(patch, int):
            return tuple(patch)
        return getattr(model.config, "patch_size_t", None) or 1, patch, patch

    def grid(self, model: nn.Module, x: Tensor, inputs: Mapping[str, Any]) -> Grid:
        """Token grid (f, h, w), in raster order, of the latents x that a call gets, with its other inputs."""
        shape = self.to_video(x, (0, 0, 0)).shape[2:]
        return tuple(-(-n // p) for n, p in zip(shape, self.patch(model)))

    def compression(self, pipe) -> tuple[int, int]:
        """Pixels of a latent row, and frames of a latent frame after the first."""
        found = [
            next(getattr(pipe, name) for name in names if hasattr(pipe, name))
            for names in (
                ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor"),
                ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor"),
            )
        ]
        return found[0], found[1]

    def call_inputs(self, model: nn.Module, text_length: int) -> dict[str, Tensor] | None:
        """Inputs on the meta device of a call for one prompt, beside the latents; None where they are not known."""
        return None

    def text_tokens(self, inputs: Mapping[str, Any]) -> int:
        """How many tokens joint attention has beside the video's, of one sample, in a call with these inputs."""
        return inputs["encoder_hidden_states"].shape[1] if self.is_joint else 0

    def to_video(self, y: Tensor, grid: Grid) -> Tensor:
        """A velocity as a view (b, c, f, h, w)."""
        return y

    def from_video(self, y: Tensor) -> Tensor:
        """The velocity in the family's own layout."""
        return y

    def hidden_size(self, model: nn.Module) -> int:
        """Width d of a token inside the blocks."""
        return model.config.num_attention_heads * model.config.attention_head_dim

    def num_heads(self, model: nn.Module) -> int:
        """Heads k of a self-attention."""
        return model.config.num_attention_heads

    def is_guided(self, pipe, call: Mapping[str, Any]) -> bool:
        """Whether an unconditional branch runs. `call` has the local variables of the pipeline's running call."""
        return bool(pipe.do_classifier_free_guidance)

    def is_run_guided(self, pipe, call: Mapping[str, Any]) -> bool:
        """Whether an unconditional branch runs in any step, asked in the first one."""
        return self.is_guided(pipe, call)

    def video_tokens(self, sequence: int, video: int) -> slice:
        """Which tokens of an attention's sequence are the video's."""
        return slice(0, video)

    def run_attention(
        self, attn: nn.Module, original: Callable, core: Callable, video: int, *inputs, **named
    ) -> Tensor | tuple[Tensor, ...]:
        """What an attention's processor returns, with `core(qkv, softmax)` in place of its softmax.

        `core` gets the queries, keys and values of the `video` tokens alone.
        """
        from ..core.joint_attention import with_softmax

        tokens = lambda sequence: self.video_tokens(sequence, video) if sequence >= video else None
        return with_softmax(core, tokens, original, attn, *inputs, **named)

    def new_block(self, model: nn.Module) -> nn.Module:
        """A block of the model's kind with fresh random weights, for DisCa's predictor."""
        raise AccelError(f"disca has no learned predictor for {type(model).__name__}: choose reuse or taylor-1")
