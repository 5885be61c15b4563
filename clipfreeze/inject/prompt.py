"""Prompts: learnable vectors among the tokens of a tower."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from torch import Tensor, nn

from clipfreeze.anatomy.partition import find_tower
from clipfreeze.inject.addition import Addition
from clipfreeze.inject.text_prompt import add_to_text
from clipfreeze.inject.visual_prompt import add_to_vision
from clipfreeze.plan.sites import PromptSite


def add_prompt(
    site: PromptSite, model: nn.Module, undo: ExitStack, tokenizer: Callable[..., Tensor] | None, fresh: bool
) -> Addition:
    """Put the prompt into its tower. Raises ApplyError where words or class names do not fit, or cannot be read."""
    assert site.tower is not None
    tower = find_tower(model, site.tower)
    if site.tower == "vision":
        return add_to_vision(site, tower, model, undo, fresh)
    return add_to_text(site, tower, model, undo, tokenizer, fresh)
