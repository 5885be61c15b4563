"""The tokenizer that words in a plan are read with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
from torch import Tensor, nn

from clipfreeze.errors import ApplyError

CLIP_VOCABULARY = 49408


def fitting_tokenizer(
    model: nn.Module, given: Callable[..., Tensor] | None, what: str
) -> Callable[[list[str]], Tensor]:
    """`given`, or open_clip's own for CLIP's vocabulary, held to the model; `what` needs it.

    ApplyError where there is none, and, once it is called, for ids that the model does not know.
    """
    text: Any = getattr(model, "text", model)  # CLIP has its text tower spread over the top level
    vocabulary = int(text.vocab_size)
    if given is None:
        if vocabulary != CLIP_VOCABULARY:
            raise ApplyError(f"{what} needs the model's tokenizer", "give apply(..., tokenizer=...)")
        given = open_clip.SimpleTokenizer(context_length=int(text.context_length))
    tokenize = given

    def tokens(texts: list[str]) -> Tensor:
        ids = tokenize(texts)
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ApplyError(
                f"token ids from {int(ids.min())} to {int(ids.max())}, the model's vocabulary has {vocabulary}",
                "take the model's own tokenizer: open_clip.get_tokenizer with the model's name",
            )
        return ids

    return tokens
