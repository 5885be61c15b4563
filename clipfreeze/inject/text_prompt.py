"""Vectors among the tokens of a text: CoOp (arXiv 2109.01134); deep, as the text half of MaPLe (2210.03117).

Placeholders, which are negative ids, are put into the text before the tower sees it, and the vectors where the tower
looks them up. Masks, positions and pooling are the tower's own, over the longer text.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clipfreeze.anatomy.parts import Tokens, Tower
from clipfreeze.anatomy.tokens import text_ends
from clipfreeze.errors import ApplyError, DataError
from clipfreeze.inject.addition import Addition, register
from clipfreeze.inject.columns import replace_columns, replace_first
from clipfreeze.inject.factor import Product, add_effect, parameter_of
from clipfreeze.inject.tokenizers import fitting_tokenizer
from clipfreeze.plan.sites import PromptSite

NO_ID = -1
"""Fills the rows of class names behind their ends."""

LONGEST_NAME = 77
"""Tokens that are kept of a class name where the context is longer or has no bound."""


def add_to_text(
    site: PromptSite,
    tower: Tower,
    model: nn.Module,
    undo: ExitStack,
    tokenizer: Callable[..., Tensor] | None,
    fresh: bool,
) -> TextPrompt:
    """Put the prompt into every text that the model encodes."""
    assert isinstance(tower.tokens, Tokens)
    table = parameter_of(model, tower.tokens.table)
    prompt = TextPrompt(site, tower.tokens, table.device)
    if fresh:
        prompt.start(table, model, tokenizer)
    register(model, site.path, prompt, undo)
    add_effect(model, tower.tokens.table, prompt, undo)
    text: Any = dict(model.named_children()).get("text", model)
    if text is model:  # the class CLIP, whose text tower is no module
        _rewrite_argument(text, "encode_text", 0, prompt, undo)
        _rewrite_argument(text, "forward_intermediates", 1, prompt, undo)
    else:
        undo.callback(text.register_forward_pre_hook(partial(_rewrite_input, prompt), with_kwargs=True).remove)
        if hasattr(type(text), "forward_intermediates"):  # which goes past hooks
            _rewrite_argument(text, "forward_intermediates", 0, prompt, undo)
    for index, block in enumerate(tower.blocks[1 : site.spec.depth], start=1):
        hook = partial(_refresh, prompt, index)
        undo.callback(model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True).remove)
    return prompt


class TextPrompt(Addition):
    """vectors: (depth, length, D); of a class-specific prompt (classes, length, D), and names: (classes, L) token ids.

    It takes part in the product with the token table, where placeholder -1 - i stands for vector i of block 0, or of
    all classes in a row.
    """

    vectors: nn.Parameter
    names: Tensor

    def __init__(self, site: PromptSite, tokens: Tokens, device: torch.device) -> None:
        super().__init__()
        self.spec, self.tokens, self.classes = site.spec, tokens, site.classes
        self.warned = False
        self.vectors = nn.Parameter(torch.zeros(site.added[0].shape, device=device))
        if self.classes:
            longest = min(tokens.context or LONGEST_NAME, LONGEST_NAME)
            names = torch.full((len(self.classes), longest), NO_ID, dtype=torch.long, device=device)
            self.register_buffer("names", names)

    @property
    def scalable(self) -> bool:
        """Half a prompt has no meaning."""
        return False

    @torch.no_grad()
    def start(self, table: Tensor, model: nn.Module, tokenizer: Callable[..., Tensor] | None) -> None:
        """Random vectors, of block 0 (or each class) the last ones the embeddings of words; class names as tokens."""
        self.vectors.normal_(std=self.spec.std)
        if self.spec.init != "random":
            tokenize = fitting_tokenizer(model, tokenizer, f"the prompt init {self.spec.init!r}")
            ids = tokenize([self.spec.init]).to(table.device)
            [end] = text_ends(self.tokens, ids).tolist()
            words = ids[0, self.tokens.first : end]
            self._check_words(len(words))
            blocks = self.vectors if self.classes else self.vectors[:1]
            blocks[:, self.spec.length - len(words) :] = table[words].to(self.vectors.dtype)
        if self.classes:
            tokenize = fitting_tokenizer(model, tokenizer, "a class-specific prompt")
            ids = tokenize(list(self.classes)).to(table.device)
            ends = text_ends(self.tokens, ids)
            self.names.copy_(self._comparable(ids, ends))
            self._check_names(ends.tolist())

    def before(self, given: Tensor) -> Tensor:
        """ids -> ids that the table has."""
        return given if self.strength == 0 else given.clamp(min=0)

    @classmethod
    def after(cls, effects: Sequence[TextPrompt], product: Product, out: Tensor) -> Tensor:
        """out: (B, L, D) -> the same with the vectors in place of placeholders."""
        for prompt in effects:
            out = out if prompt.strength == 0 else prompt._put_in(product, out)
        return out

    def _put_in(self, product: Product, out: Tensor) -> Tensor:
        number = -1 - product.given
        table = self.vectors.flatten(0, 1) if self.classes else self.vectors[0]
        chosen = functional.embedding(number.clamp(min=0), table).to(out.dtype)
        return torch.where((number >= 0).unsqueeze(-1), chosen, out)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # whole numbers, and questions about them
    def rewritten(self, ids: Tensor) -> Tensor:
        """ids: (B, L) -> (B, L'), with placeholders; L' is L where that is the context, else as much more as fits.

        Words that no longer fit are cut off before the end. Raises DataError for these where `truncate` is false, and
        for a text that is none of the classes of a class-specific prompt.
        """
        if self.strength == 0 or bool((ids < 0).any()):  # off, or placeholders stand there already
            return ids
        first, length = self.tokens.first, self.spec.length
        end = text_ends(self.tokens, ids).unsqueeze(1)
        total = ids.shape[1] + length
        if self.tokens.context is not None:
            total = max(ids.shape[1], min(total, self.tokens.context))
        words = end - first
        kept = words.clamp(max=max(total - first - length - 1, 0))
        self._tell_cut(int((kept < words).sum()), len(ids))

        head = {"front": length, "middle": length // 2, "end": 0}[self.spec.position]
        column = torch.arange(total, device=ids.device).unsqueeze(0)
        in_head = (column >= first) & (column < first + head)
        in_tail = (column >= first + head + kept) & (column < first + length + kept)
        source = torch.where(column < first, column, column - head)
        source = torch.where(column >= first + length + kept, column - first - length - kept + end, source)
        moved = ids.gather(1, source.clamp(0, ids.shape[1] - 1))
        number = column - first - torch.where(in_tail, kept, 0)
        if self.classes:
            number = number + self._class_of(ids, end.squeeze(1)).unsqueeze(1) * length
        return torch.where(in_head | in_tail, -1 - number, moved)

    def _tell_cut(self, cut: int, texts: int) -> None:
        if not cut:
            return
        what = f"{cut} of {texts} texts too long for a prompt of {self.spec.length} in {self.tokens.context} tokens"
        if not self.spec.truncate:
            raise DataError(what, "a shorter prompt, shorter texts, or truncate = true")
        if not self.warned:
            warnings.warn(f"{what}: their last words are cut off; said once", stacklevel=2)
            self.warned = True

    def _comparable(self, ids: Tensor, end: Tensor) -> Tensor:
        """ids: (B, L), end: (B,) -> (B, L of names), without what pads them."""
        place = torch.arange(ids.shape[1], device=ids.device)
        plain = torch.where(place <= end.unsqueeze(1), ids, NO_ID)
        return functional.pad(plain, (0, self.names.shape[1] - ids.shape[1]), value=NO_ID)

    def _class_of(self, ids: Tensor, end: Tensor) -> Tensor:
        """ids: (B, L) -> (B,), the number of the class whose name each text is."""
        same = (self._comparable(ids, end).unsqueeze(1) == self.names).all(-1)
        same &= (end < self.names.shape[1]).unsqueeze(1)
        unknown = torch.nonzero(~same.any(1)).flatten().tolist()
        if unknown:
            rows = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            what = f"{len(unknown)} of {len(ids)} texts are none of the {len(self.classes)} classes (rows {rows})"
            raise DataError(what, "a class-specific prompt takes the bare names of its classes, in no template")
        return same.int().argmax(1)

    def _check_words(self, count: int) -> None:
        if not count:
            raise ApplyError(f"the prompt init {self.spec.init!r} has no words", 'init = "random"')
        if count > self.spec.length:
            what = f"the prompt init {self.spec.init!r} has {count} tokens, the prompt length is {self.spec.length}"
            raise ApplyError(what, f'length = {count}, or init = "random"')

    def _check_names(self, ends: list[int]) -> None:
        """Names that are cut, or alike in tokens, would not tell their class."""
        seen: dict[tuple[int, ...], str] = {}
        for name, row, end in zip(self.classes, self.names.tolist(), ends, strict=True):
            if end >= len(row):
                raise ApplyError(f"the class {name!r} has more than {len(row)} tokens", "give it a shorter name")
            other = seen.setdefault(tuple(row), name)
            if other is not name:
                raise ApplyError(f"the classes {other!r} and {name!r} have the same tokens", "leave one out")


def _rewrite_input(
    prompt: TextPrompt, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return replace_first(args, kwargs, prompt.rewritten)


def _refresh(
    prompt: TextPrompt, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before block `index`: its own vectors in place of what became of the former ones."""
    if prompt.strength == 0:
        return args, kwargs
    put = partial(replace_columns, prompt.vectors[index], prompt.tokens)
    return replace_first(args, kwargs, put)


def _rewrite_argument(owner: nn.Module, method: str, at: int, prompt: TextPrompt, undo: ExitStack) -> None:
    """Let a method get its texts, argument number `at`, with placeholders."""
    former = vars(owner).get(method)
    vars(owner)[method] = partial(_rewriting, prompt, owner, method, at, former)
    if former is None:
        undo.callback(vars(owner).pop, method)
    else:
        undo.callback(vars(owner).__setitem__, method, former)


def _rewriting(
    prompt: TextPrompt, owner: nn.Module, method: str, at: int, former: Any, *args: Any, **kwargs: Any
) -> Any:
    if len(args) > at:
        args = (*args[:at], prompt.rewritten(args[at]), *args[at + 1 :])
    elif kwargs.get("text") is not None:
        kwargs["text"] = prompt.rewritten(kwargs["text"])
    return former(*args, **kwargs) if former is not None else getattr(type(owner), method)(owner, *args, **kwargs)
