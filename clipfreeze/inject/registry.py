"""Where an action meets its effect: one row an action."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from clipfreeze.inject.adapter import add_adapter
from clipfreeze.inject.addition import Addition
from clipfreeze.inject.head import add_head
from clipfreeze.inject.lora import add_lora
from clipfreeze.inject.prompt import add_prompt

Tokenizer = Callable[..., Tensor]
INJECTORS: dict[str, Callable[[Any, nn.Module, ExitStack, Tokenizer | None, bool], Addition]] = {
    "head": add_head,
    "lora": add_lora,
    "adapter": add_adapter,
    "prompt": add_prompt,
}
"""In the order of injection: a head's rows are the model's own features, a prompt's vectors go in
behind what LoRA adds to an embedding."""
