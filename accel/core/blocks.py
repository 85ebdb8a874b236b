"""The stack of a transformer's blocks as one function that can be wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import AccelError

if TYPE_CHECKING:
    from ..families import Family


class BlockStack(nn.ModuleList):
    """A model's own blocks under their own names; while it is wrapped, iterating over it yields other functions.

    The blocks themselves carry no hook, so compiled blocks stay as they were compiled, and a block that is replaced
    here, as in `blocks[0] = torch.compile(blocks[0])`, is replaced in the model's own list.
    """

    def __init__(self, blocks: nn.ModuleList, functions: tuple[Callable, ...], is_wrapped: Callable[[], bool]):
        super().__init__()
        self._modules = blocks._modules
        self._functions, self._is_wrapped = functions, is_wrapped

    def __iter__(self) -> Iterator[Callable]:
        return iter(self._functions) if self._is_wrapped() else super().__iter__()

    def __getitem__(self, index: int | slice) -> nn.Module:
        """A block, or some of them as a plain list, as for offloading in groups."""
        return nn.ModuleList(self._modules.values())[index] if isinstance(index, slice) else super().__getitem__(index)


class StackedBlocks:
    """A place of the host: all blocks of a model, in one list or in several, become one call.

    `run(stack, hidden, *inputs, **named)` gets the function that runs them all and what the model gives its first
    block; it returns hidden states (b, n, d). In a joint model the blocks pass on text beside them; after the last
    block the text is not used. Where `is_wrapped()` is false, the blocks are what they are: others look at them, too.
    """

    def __init__(self, model: nn.Module, family: Family, run: Callable, is_wrapped: Callable[[], bool]):
        self.model, self.family, self.run, self.is_wrapped = model, family, run, is_wrapped
        self.stacks: dict[str, tuple[nn.ModuleList, BlockStack]] = {}  # by attribute: what was there, what is

    def take(self) -> None:
        """Replace the lists. Raises AccelError where the blocks are not one stack, or each device runs other tokens."""
        model, lists = self.model, self.family.block_lists(self.model)
        if getattr(model._parallel_config, "context_parallel_config", None):
            raise AccelError(
                "steps cannot be predicted under context parallelism: the tokens are divided inside the blocks"
            )
        if not self.family.is_stack(model):
            raise AccelError(f"{type(model).__name__} changes hidden states between its blocks: they are not one stack")
        functions = [self._call]  # the first list runs all blocks, the others none
        for name in lists:
            before = getattr(model, name)
            self.stacks[name] = before, BlockStack(before, tuple(functions), self.is_wrapped)
            setattr(model, name, self.stacks[name][1])
            functions = []

    @property
    def is_held(self) -> bool:
        """Whether the model still has these lists."""
        return all(getattr(self.model, name) is stack for name, (_, stack) in self.stacks.items())

    def leave(self) -> None:
        """Put the model's own lists back."""
        for name, (before, stack) in self.stacks.items():
            if getattr(self.model, name) is stack:
                setattr(self.model, name, before)
        self.stacks.clear()

    def _call(self, *inputs, **named) -> Any:
        hidden, *inputs = inputs if inputs else (named.pop("hidden_states"),)
        out = self.run(self._run_blocks, hidden, *inputs, **named)
        return (out, _text(inputs, named)) if self.family.is_joint else out

    def _run_blocks(self, hidden: Tensor, *inputs, **named) -> Tensor:
        for blocks, _ in self.stacks.values():
            for block in blocks:
                out = block(hidden, *inputs, **named)
                if not self.family.is_joint:
                    hidden = out
                    continue
                hidden, text = out
                if TEXT in named:
                    named[TEXT] = text
                else:
                    inputs = text, *inputs[1:]
        return hidden


TEXT = "encoder_hidden_states"


def _text(inputs: tuple, named: dict[str, Any]) -> Tensor:
    """The text that a block gets: by name, or after the hidden states."""
    return named[TEXT] if TEXT in named else inputs[0]
