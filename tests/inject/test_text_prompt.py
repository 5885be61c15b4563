"""A text prompt is words with embeddings of their own: compared with such words in the texts of the plain model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from clipfreeze.anatomy.partition import describe, find_tower
from clipfreeze.errors import ApplyError, DataError
from clipfreeze.inject.factor import Factor
from clipfreeze.inject.prompt import add_prompt
from clipfreeze.inject.text_prompt import TextPrompt
from clipfreeze.plan.prompt_sites import place_prompts
from clipfreeze.policy.actions import Prompt

import tiny

SPARE = (3, 4, 61)
"""Ids in no text of ours, below the largest and no model's pad or end."""

WORDS = ([5, 9, 7, 20], [30], [12, 11], [6, 7, 8, 9, 10, 40])


class Made(NamedTuple):
    """A text tower, and how its tokenizer writes: start, words, end, padding, in a context of so many."""

    build: Callable[[], Any]
    start: tuple[int, ...] = (62,)
    end: int = 63
    pad: int = 0
    context: int = tiny.CONTEXT

    def row(self, words: list[int], length: int = 0) -> list[int]:
        row = [*self.start, *words, self.end]
        return row + [self.pad] * ((length or tiny.CONTEXT) - len(row))


PLAIN = {"no_causal_mask": True}
MODELS = {
    **{name: Made(build) for name, build in tiny.FAMILIES.items() if name not in ("siglip", "hf_text")},
    "mobileclip": Made(partial(tiny.clip_vit, text=PLAIN)),
    "xlm_v": Made(partial(tiny.custom_text, text={"pool_type": "eos", "eos_id": 2}), (0,), 2, 1),
    "xlm_v_top": Made(partial(tiny.clip_vit, text={"pool_type": "eos", "eos_id": 2}), (0,), 2, 1),
    "mt5_eos": Made(partial(tiny.custom_text, text={"pool_type": "eos", "eos_id": 1}), (), 1, 0),
    "siglip": Made(tiny.siglip, (), 1, 1),
    "siglip2": Made(tiny.siglip, (), 1, 0),
    "clipa": Made(partial(tiny.clip_vit, text={**PLAIN, "pool_type": "last"}), (62,), 0, 0),
    "first": Made(partial(tiny.custom_text, text={**PLAIN, "pool_type": "first"})),
    "roberta": Made(tiny.hf_text, (0,), 2, 1),
    "xlm_roberta": Made(partial(tiny.hf_text, "xlm_roberta"), (0,), 2, 1),
    "bert": Made(partial(tiny.hf_text, "bert", "cls_last_hidden_state_pooler"), (62,), 63, 0, 18),
    "mt5": Made(partial(tiny.hf_text, "mt5"), (), 1, 0, 19),
    "nllb": Made(partial(tiny.hf_text, "m2m_100", "cls_pooler", "linear"), (60,), 2, 1, 18),
}
KINDS = tuple(name for name in MODELS if name not in tiny.FAMILIES or name in ("clip_vit", "custom_text", "coca"))
"""Those whose texts go another way."""

FEW = ("clip_vit", "custom_text", "siglip", "coca", "roberta", "mt5")


def built(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = MODELS[name].build()
    return model.eval()


def texts(name: str, words: Any = WORDS) -> Tensor:
    return torch.tensor([MODELS[name].row(row) for row in words])


def put(model: Any, undo: ExitStack | None = None, tokenizer: Any = None, fresh: bool = True, **said: Any) -> Any:
    """The text prompt of three vectors."""
    anatomy = describe(model)
    matched = {index for index, parameter in enumerate(anatomy.parameters) if parameter.tower == "text"}
    [site] = place_prompts(anatomy, matched, Prompt(**{"length": 3, "std": 1.0, **said}))
    undo = ExitStack() if undo is None else undo
    prompt = add_prompt(site, model, undo, tokenizer, fresh)
    assert tuple(name for name, _ in model.named_parameters() if name.startswith("prompt.")) == site.names
    return prompt


def with_spare_words(model: Any, vectors: Tensor) -> Any:
    """A copy whose words SPARE mean the vectors."""
    written = copy.deepcopy(model)
    tokens: Any = find_tower(model, "text").tokens
    with torch.no_grad():
        written.get_parameter(tokens.table)[list(SPARE)] = vectors
    return written


def inserted(words: list[int], position: str) -> list[int]:
    head = {"front": 3, "middle": 1, "end": 0}[position]
    return [*SPARE[:head], *words, *SPARE[head:]]


def tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    values = list(values.values()) if isinstance(values, dict) else values
    return [tensor for value in values for tensor in tensors(value)]


def close(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(tensors(one), tensors(other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "position"),
    [(name, "front") for name in MODELS] + [(name, position) for name in KINDS for position in ("middle", "end")],
)
@torch.no_grad()
def test_a_prompt_is_words_with_embeddings_of_their_own(name, position):
    model = built(name)
    plain = copy.deepcopy(model)
    prompt = put(model, position=position)
    length = MODELS[name].context
    by_hand = torch.tensor([MODELS[name].row(inserted(words, position), length) for words in WORDS])
    written = with_spare_words(plain, prompt.vectors[0])

    expected = written.encode_text(by_hand)
    given = texts(name)
    close(model.encode_text(given), expected)
    assert (expected[:, None] - expected).abs().amax(-1).fill_diagonal_(1).min() > 1e-3 or name == "coca"
    assert (expected - plain.encode_text(given)).abs().max() > 1e-3

    # the same by every other way in
    images = tiny.images(model, len(WORDS))
    if length == tiny.CONTEXT:
        hand = written(images, by_hand)
        own = model(images, given)
        if name == "coca":  # the labels are the user's own texts
            hand["labels"] = own["labels"]
        close(own, hand)
        if "Hugging" not in describe(plain).family:
            ways = {"text_output_fmt": "NLC"}
            close(model.forward_intermediates(text=given, **ways), written.forward_intermediates(text=by_hand, **ways))
            close(
                model.forward_intermediates(None, given, **ways), written.forward_intermediates(None, by_hand, **ways)
            )


@pytest.mark.parametrize("name", ["clip_vit", "xlm_v_top"])
@torch.no_grad()
def test_a_deep_prompt_replaces_its_vectors_before_each_of_its_blocks(name):
    model = built(name)
    plain = copy.deepcopy(model)
    prompt = put(model, depth=3)
    by_hand = torch.tensor([MODELS[name].row(inserted(words, "front")) for words in WORDS])
    x = with_spare_words(plain, prompt.vectors[0]).token_embedding(by_hand) + plain.positional_embedding
    for index, block in enumerate(plain.transformer.resblocks):
        if index:
            x[:, 1:4] = prompt.vectors[index]
        x = block(x, attn_mask=plain.attn_mask)
    pooled = plain.ln_final(x)[range(4), [len(words) + 4 for words in WORDS]]
    close(model.encode_text(texts(name)), pooled @ plain.text_projection)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_deep_prompt_of_what_the_former_vectors_became_changes_nothing(name):
    model = built(name)
    given = texts(name, WORDS[:1])
    deep = copy.deepcopy(model)
    shallow, fresh = put(model), put(deep, depth=3)
    fresh.vectors[0] = shallow.vectors[0]
    blocks = find_tower(model, "text").blocks
    start = len(MODELS[name].start)

    def seen(index: int, module: nn.Module, args: Any) -> None:
        fresh.vectors[index] = args[0][0, start : start + 3]

    for index in (1, 2):
        model.get_submodule(blocks[index]).register_forward_pre_hook(partial(seen, index))
    assert (deep.encode_text(given) - model.encode_text(given)).abs().max() > 1e-4
    close(deep.encode_text(given), model.encode_text(given))


@pytest.mark.parametrize("name", ["clip_vit", "siglip", "clipa", "mt5_eos", "coca", "roberta", "nllb"])
@torch.no_grad()
def test_words_that_no_longer_fit_are_cut_before_the_end_and_told_once(name):
    of = MODELS[name]
    model = built(name)
    put(model, position="end")
    room = tiny.CONTEXT - len(of.start) - 1
    fits = of.context - len(of.start) - 1 - 3
    words = [[5 + index for index in range(room)], [30]]
    kept = [row[:fits] for row in words]
    with pytest.warns(UserWarning, match=r"1 of 2 texts too long for a prompt of 3 in \d+ tokens: .* cut off"):
        feature = model.encode_text(texts(name, words))
    model.encode_text(texts(name, words))  # warnings are errors
    close(feature, model.encode_text(texts(name, kept)))
    assert (feature[0] - model.encode_text(texts(name, [row[:-1] for row in kept]))[0]).abs().max() > 1e-4


def test_a_text_that_no_longer_fits_is_refused_where_the_prompt_says_so():
    model = built("clip_vit")
    put(model, truncate=False)
    fitting = texts("clip_vit", [list(range(5, 16))])
    model.encode_text(fitting)
    with pytest.raises(DataError, match="1 of 1 texts too long for a prompt of 3 in 16 tokens"):
        model.encode_text(texts("clip_vit", [list(range(5, 17))]))


@settings(max_examples=60)
@given(
    words=st.lists(st.lists(st.integers(5, 60), max_size=14), min_size=1, max_size=4),
    length=st.integers(1, 12),
    position=st.sampled_from(["front", "middle", "end"]),
)
def test_rewritten_texts_have_their_words_start_and_end(words, length, position):
    prompt = put(tiny.clip_vit(), length=length, position=position)
    given = texts("clip_vit", words)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = prompt.rewritten(given)
    placeholders = [-1 - index for index in range(length)]
    head = {"front": length, "middle": length // 2, "end": 0}[position]
    for row, own in zip(found.tolist(), words, strict=True):
        kept = own[: 14 - length]
        expected = [62, *placeholders[:head], *kept, *placeholders[head:], 63]
        assert row == expected + [0] * (16 - len(expected))
    assert torch.equal(prompt.rewritten(found), found)


@pytest.fixture(scope="module")
def clip() -> Any:
    """A tiny CLIP of the real vocabulary."""
    torch.manual_seed(0)
    return tiny.clip_vit(text={"vocab_size": 49408, "context_length": 77}).eval()


@torch.no_grad()
def test_a_prompt_of_words_starts_as_the_words_written_by_hand(clip):
    model, tokenize = copy.deepcopy(clip), open_clip.SimpleTokenizer()
    prompt = put(model, length=4, init="a photo of a")
    names = ["dog", "dogs", "soft-coated wheaten terrier", "a"]
    ids = tokenize(names)
    close(model.encode_text(ids), clip.encode_text(tokenize([f"a photo of a {name}" for name in names])))
    longer = prompt.rewritten(ids)
    assert longer.argmax(1).tolist() == (ids.argmax(1) + 4).tolist()  # what is pooled is the end of the longer text
    assert (longer.gather(1, longer.argmax(1, keepdim=True)) == 49407).all()
    features = model.encode_text(ids)
    assert torch.pdist(features).min() > 1e-3


def test_words_are_the_last_vectors_of_the_first_block(clip):
    model, ids = copy.deepcopy(clip), open_clip.SimpleTokenizer()(["a photo"])[0, 1:3]
    prompt = put(model, length=5, depth=3, std=0.02, init="a photo")
    assert torch.equal(prompt.vectors[0, 3:], clip.token_embedding.weight[ids])
    rest = torch.cat([prompt.vectors[0, :3], *prompt.vectors[1:]])
    assert 0.015 < rest.std() < 0.025


def test_words_of_other_vocabularies_take_the_tokenizer_that_is_given():
    model = built("siglip")
    prompt = put(model, init="x", tokenizer=lambda words: texts("siglip", [[7, 8, 9]]))
    assert torch.equal(prompt.vectors[0], model.state_dict()["text.token_embedding.weight"][[7, 8, 9]])


@pytest.mark.parametrize(
    ("said", "what", "fix"),
    [
        ({"length": 3, "init": "a photo of a"}, "has 4 tokens, the prompt length is 3", "length = 4"),
        ({"init": "  "}, "has no words", "random"),
        (
            {"class_specific": True, "classes": ("Dog", "cat", "dog")},
            "'Dog' and 'dog' have the same tokens",
            "leave one out",
        ),
    ],
)
def test_words_that_do_not_fit_are_told_and_nothing_is_changed(clip, said, what, fix):
    model = copy.deepcopy(clip)
    with pytest.raises(ApplyError, match=what) as error, ExitStack() as undo:
        put(model, undo, **said)
    assert fix in str(error.value)
    assert "prompt" not in dict(model.named_children())


def test_words_need_a_tokenizer_and_saved_vectors_need_none():
    with pytest.raises(ApplyError, match=r"needs the model's tokenizer[\s\S]*tokenizer="):
        put(built("siglip"), init="a photo")
    assert put(built("siglip"), init="a photo", fresh=False).vectors.abs().max() == 0


def test_a_name_longer_than_what_is_kept_of_it_is_refused():
    rows = torch.tensor([[*range(5, 55), *range(5, 45), 1], [7, 1] + [0] * 89])
    with pytest.raises(ApplyError, match="'long' has more than 77 tokens"):
        put(built("mt5"), class_specific=True, classes=("long", "b"), tokenizer=lambda names: rows)


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_each_class_has_vectors_of_its_own(name):
    model = built(name)
    plain = copy.deepcopy(model)
    prompt = put(model, class_specific=True, classes=("a", "b", "c", "d"), tokenizer=lambda names: texts(name))
    order = [2, 0, 3, 1, 0]
    by_hand = [MODELS[name].row(inserted(WORDS[index], "front"), MODELS[name].context) for index in order]
    found = model.encode_text(texts(name)[order])
    for row, index in enumerate(order):
        written = with_spare_words(plain, prompt.vectors[index])
        close(found[row], written.encode_text(torch.tensor(by_hand))[row])

    same = built(name)  # what is saved knows the classes
    fresh = put(same, class_specific=True, classes=("a", "b", "c", "d"), fresh=False)
    fresh.load_state_dict(prompt.state_dict())
    assert torch.equal(same.encode_text(texts(name)), model.encode_text(texts(name)))


def test_a_text_of_no_class_is_told_by_its_row():
    model = built("clip_vit")
    put(model, class_specific=True, classes=("a", "b"), tokenizer=lambda names: texts("clip_vit", WORDS[:2]))
    with pytest.raises(DataError, match=r"2 of 4 texts are none of the 2 classes \(rows 2, 3\)"):
        model.encode_text(texts("clip_vit"))


@pytest.mark.parametrize(
    ("name", "said"), [(name, {"depth": 3}) for name in MODELS] + [(name, {"position": "middle"}) for name in KINDS]
)
def test_switched_off_or_taken_out_it_is_as_if_it_had_never_been(name, said):
    model = built(name)
    given, before = texts(name), state_of(model)
    expected = model.encode_text(given)
    undo = ExitStack()
    prompt = put(model, undo, **said)
    assert not torch.equal(model.encode_text(given), expected)
    assert list(model.state_dict())[: len(before["state"])] == before["state"]
    prompt.set_strength(0.0)
    assert torch.equal(model.encode_text(given), expected)
    assert not prompt.scalable
    undo.close()
    assert torch.equal(model.encode_text(given), expected)
    assert state_of(model) == before


def state_of(model: Any) -> dict[str, Any]:
    """Names, attributes and hooks of all modules."""
    kept = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return {
        "state": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(vars(module)[name]) for module in model.modules() for name in kept],
        "stand-ins": [value for module in model.modules() for value in vars(module).values() if type(value) is Factor],
    }


@pytest.mark.parametrize("name", FEW)
@torch.no_grad()
def test_a_copy_has_a_prompt_of_its_own(name):
    model, undo = built(name), ExitStack()
    put(model, undo, depth=2)
    given = texts(name)
    feature = model.encode_text(given)
    other = copy.deepcopy(model)
    [prompt] = [module for module in other.modules() if isinstance(module, TextPrompt)]
    undo.close()
    assert torch.equal(other.encode_text(given), feature)
    prompt.vectors[1] += 1
    changed = other.encode_text(given)
    assert not torch.equal(changed, feature)
    prompt.vectors[0] += 1
    assert not torch.equal(other.encode_text(given), changed)


@torch.no_grad()
def test_of_two_prompts_the_one_that_is_on_counts():
    model = built("clip_vit")
    given = texts("clip_vit")
    undo, inner = ExitStack(), ExitStack()
    first = put(model, undo)
    alone = model.encode_text(given)
    model.prompt_second = model._modules.pop("prompt")  # as a second policy's is named
    second = put_beside(model, inner)
    first.set_strength(0.0)
    assert not torch.equal(model.encode_text(given), alone)
    first.set_strength(1.0)
    second.set_strength(0.0)
    assert torch.equal(model.encode_text(given), alone)
    inner.close()
    assert torch.equal(model.encode_text(given), alone)


def put_beside(model: Any, undo: ExitStack) -> Any:
    anatomy = describe(tiny.clip_vit())
    matched = {index for index, parameter in enumerate(anatomy.parameters) if parameter.tower == "text"}
    [site] = place_prompts(anatomy, matched, Prompt(length=2, std=1.0))
    return add_prompt(site, model, undo, None, True)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")  # open_clip's word for it
@pytest.mark.parametrize("name", FEW)
def test_checkpointing_changes_no_gradient(name):
    model = built(name).train()  # Hugging Face checkpoints in train mode alone
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0
    prompt = put(model, depth=3)
    gradients = []
    for on in (False, True):
        if on:
            model.set_grad_checkpointing(True)
        [gradient] = torch.autograd.grad(model.encode_text(texts(name)).square().sum(), [prompt.vectors])
        gradients.append(gradient)
    assert gradients[0].flatten(1).abs().amax(1).min() > 0
    close(gradients[0], gradients[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, where a graph begins anew
@pytest.mark.parametrize("name", ["clip_vit", "custom_text"])
def test_it_compiles(name):
    model = built(name)
    prompt = put(model, depth=2)
    given, weights = texts(name), torch.randn(4, tiny.EMBED_DIM)
    _, expected, _ = model(None, given)
    _, found, _ = torch.compile(model, backend="aot_eager")(None, given)
    close(found, expected)
    [gradient] = torch.autograd.grad((found * weights).sum(), [prompt.vectors])
    [by_hand] = torch.autograd.grad((expected * weights).sum(), [prompt.vectors])
    close(gradient, by_hand)


@pytest.mark.parametrize("how", ["bf16 autocast", "bf16 weights", "fp16 weights"])
@pytest.mark.parametrize("name", FEW)
def test_twenty_steps_in_half_precision_stay_finite(name, how):
    model = built(name)
    dtype = torch.float16 if "fp16" in how else torch.bfloat16
    if "weights" in how:
        model.to(dtype)
    prompt = put(model, length=4, depth=2, std=0.02)
    assert prompt.vectors.dtype == torch.float32
    optimizer = torch.optim.Adam([prompt.vectors], lr=1e-2)
    target = torch.nn.functional.normalize(torch.randn(3, tiny.EMBED_DIM), dim=-1)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
            features = model.encode_text(texts(name, WORDS[:3]), normalize=True)
        loss = -(features.float() * target).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert torch.isfinite(prompt.vectors).all()
    assert losses[-1] < losses[0] - 0.05
    assert all(loss == loss for loss in losses)
