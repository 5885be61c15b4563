"""Vectors among the tokens of an image: VPT (arXiv 2203.12119), or a map of the text prompt, MaPLe (2210.03117)."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.anatomy.parts import Tokens, Tower
from clipfreeze.inject.addition import Addition, device_of, register
from clipfreeze.inject.columns import insert_columns, remove_columns, replace_columns, replace_first
from clipfreeze.inject.text_prompt import TextPrompt
from clipfreeze.plan.prompt_sites import partner
from clipfreeze.plan.sites import PromptSite


def add_to_vision(site: PromptSite, tower: Tower, model: nn.Module, undo: ExitStack, fresh: bool) -> VisualPrompt:
    """Put the prompt into every image before the first block, and take it out behind the last."""
    assert isinstance(tower.tokens, Tokens)
    blocks = [model.get_submodule(block) for block in tower.blocks]
    text = model.get_submodule(partner(site)) if site.spec.couple else None
    assert text is None or isinstance(text, TextPrompt)
    prompt = VisualPrompt(site, tower.tokens, text, blocks, device_of(model, tower.blocks[0]))
    if fresh:
        prompt.start()
    register(model, site.path, prompt, undo)
    undo.callback(prompt.set_strength, 0.0)
    prompt.set_strength(1.0)
    for index, block in enumerate(blocks[: site.spec.depth]):
        hook = partial(_put_in, prompt, index)
        undo.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
    undo.callback(blocks[-1].register_forward_hook(partial(_take_out, prompt)).remove)
    return prompt


class VisualPrompt(Addition):
    """vectors: (depth, length, D); where coupled, map.weight (depth, D, D of text) and map.bias (depth, D) instead."""

    strength = 0.0

    def __init__(
        self, site: PromptSite, tokens: Tokens, text: TextPrompt | None, blocks: list[nn.Module], device: torch.device
    ) -> None:
        super().__init__()
        self.spec, self.tokens = site.spec, tokens
        self.coupled = [text]  # in a list, which registers nothing and is copied with the model
        inner = (module for block in blocks for module in block.modules())
        self.rotating: list[Any] = [module for module in inner if "num_prefix_tokens" in vars(module)]
        zeros = [nn.Parameter(torch.zeros(added.shape, device=device)) for added in site.added]
        if text is None:
            [self.vectors] = zeros
        else:
            self.map = _Map(*zeros)

    @property
    def scalable(self) -> bool:
        """Half a prompt has no meaning."""
        return False

    def set_strength(self, value: float) -> None:
        """Rotary attention leaves the first tokens unturned: while the prompt stands among them, so many more."""
        for module in self.rotating:
            module.num_prefix_tokens += ((value > 0) - (self.strength > 0)) * self.spec.length
        self.strength = value

    @torch.no_grad()
    def start(self) -> None:
        """Random vectors, or a random map as torch's Linear draws it."""
        if self.coupled == [None]:
            self.vectors.normal_(std=self.spec.std)
            return
        bound = self.map.weight.shape[-1] ** -0.5
        for parameter in self.map.parameters():
            parameter.uniform_(-bound, bound)

    def vectors_of(self, index: int) -> Tensor:
        """Those of block `index`, (length, D)."""
        [text] = self.coupled
        if text is None:
            return self.vectors[index]
        return functional.linear(text.vectors[index], self.map.weight[index], self.map.bias[index])


class _Map(nn.Module):
    """weight: (depth, D, D of text), bias: (depth, D): a linear map for each block with a prompt."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias


def _put_in(
    prompt: VisualPrompt, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before block `index`: its vectors, from the second on in place of what became of the former ones."""
    if prompt.strength == 0:
        return args, kwargs
    put = insert_columns if index == 0 else replace_columns
    return replace_first(args, kwargs, partial(put, prompt.vectors_of(index), prompt.tokens))


def _take_out(prompt: VisualPrompt, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return out if prompt.strength == 0 else remove_columns(prompt.spec.length, prompt.tokens, out)
