"""A fresh head says what zero-shot says; with it, the model itself says what it said without."""

from __future__ import annotations

import copy
import math
from contextlib import ExitStack
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from clipfreeze.anatomy.partition import describe
from clipfreeze.errors import ApplyError
from clipfreeze.inject.head import ClassHead, add_head
from clipfreeze.plan.head_sites import place_head
from clipfreeze.plan.sites import HeadSite
from clipfreeze.policy.actions import Head

import tiny

CLASSES = ("cat", "red dog", "cow", "a tree")
TEMPLATES = ("a photo of a {}.", "{}")


def words(texts: list[str]) -> Tensor:
    """Token ids that differ from text to text, in the shape of `tiny.tokens`."""
    ids = torch.zeros(len(texts), tiny.CONTEXT, dtype=torch.long)
    for row, text in enumerate(texts):
        body = [5 + sum(map(ord, word)) % (tiny.VOCABULARY - 8) for word in text.split()]
        line = [tiny.VOCABULARY - 2, *body, tiny.VOCABULARY - 1]
        ids[row, : len(line)] = torch.tensor(line)
    return ids


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    return tiny.FAMILIES[family]().eval()


def site_of(model: nn.Module, **said: Any) -> HeadSite:
    anatomy = describe(model, "tiny")
    vision = {index for index, parameter in enumerate(anatomy.parameters) if parameter.tower == "vision"}
    spec = Head(**{"classes": CLASSES, "templates": TEMPLATES, **said})
    return place_head(anatomy, vision, spec)[0]


def added(model: nn.Module, undo: ExitStack | None = None, fresh: bool = True, **said: Any) -> ClassHead:
    return add_head(site_of(model, **said), model, undo or ExitStack(), words, fresh)


def features(model: Any) -> Tensor:
    encoded: Tensor = model.encode_image(tiny.images(model), normalize=True)
    return encoded


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_fresh_logits_are_the_zero_shot_logits(family: str, kind: str) -> None:
    model = model_of(family)
    classifier = open_clip.build_zero_shot_classifier(model, words, CLASSES, TEMPLATES)
    expected = model.logit_scale.exp() * features(model) @ classifier
    head = added(model, kind=kind)
    torch.testing.assert_close(head(features(model)), expected, rtol=1e-5, atol=1e-5)
    assert model.head is head


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_model_gives_what_it_gave_and_is_as_it_was_afterwards(family: str) -> None:
    model = model_of(family)
    images, tokens = tiny.images(model), tiny.tokens(model)
    state, attributes = dict(model.state_dict(keep_vars=True)), dict(vars(model))
    modules = list(model._modules)
    before = [model.encode_image(images), model.encode_text(tokens)]
    with ExitStack() as undo:
        added(model, undo)
        after = [model.encode_image(images), model.encode_text(tokens)]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        assert {n: t for n, t in model.state_dict(keep_vars=True).items() if not n.startswith("head.")} == state
        assert [n for n, _ in model.named_parameters()][-2:] == ["head.weight", "head.bias"]
    assert vars(model) == attributes
    assert list(model._modules) == modules
    assert dict(model.state_dict(keep_vars=True)) == state


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_logits_are_those_computed_by_hand(kind: str) -> None:
    model = model_of("clip_vit")
    head = added(model, kind=kind, init="random")
    x = torch.nn.functional.normalize(torch.randn(5, tiny.EMBED_DIM), dim=-1)
    with torch.no_grad():
        if head.bias is not None:
            head.bias.normal_()
        for row, vector in enumerate(x):
            for column, w in enumerate(head.weight):
                weight = w / w.norm() if kind == "cosine" else w
                expected = math.exp(model.logit_scale.item()) * float(vector @ weight)
                expected += 0.0 if head.bias is None else float(head.bias[column])
                assert head(x)[row, column].item() == pytest.approx(expected, abs=1e-5)


def test_zeros_are_zeros_and_random_is_the_seed_s() -> None:
    assert not added(model_of("clip_vit"), init="zeros").weight.any()
    drawn = []
    for seed in (1, 1, 2):
        model = model_of("clip_vit")
        torch.manual_seed(seed)
        drawn.append(added(model, init="random").weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_half_weights_the_head_is_fp32(dtype: torch.dtype) -> None:
    model = model_of("clip_vit").to(dtype)
    head = added(model)
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}
    logits = head(torch.nn.functional.normalize(torch.randn(2, tiny.EMBED_DIM), dim=-1).to(dtype))
    assert logits.dtype == torch.float32
    torch.autograd.backward(logits.sum())
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


def test_under_autocast_logits_are_those_of_fp32() -> None:
    model = model_of("clip_vit")
    head = added(model)
    x = features(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(x)
    assert torch.equal(found, head(x))


def test_a_copy_has_its_own_head_and_logit_scale() -> None:
    model = model_of("siglip")
    added(model)
    twin = copy.deepcopy(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        twin.logit_scale.add_(1)
    x = features(model)
    torch.testing.assert_close(twin.head(x), model.head(x) * math.e)
    torch.autograd.backward(twin.head(x).sum())
    assert twin.logit_scale.grad is not None
    assert model.logit_scale.grad is None
    assert model.head.weight.grad is None


def test_a_state_dict_goes_round_and_saved_values_need_no_tokenizer() -> None:
    model, other = model_of("clip_vit"), model_of("clip_vit")
    added(model)
    head = add_head(site_of(other), other, ExitStack(), None, False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(head(features(other)), model.head(features(model)))


def test_a_compiled_head_says_the_same() -> None:
    model = model_of("clip_vit")
    head = added(model)
    x = features(model).detach()
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), head(x))


@pytest.mark.parametrize("family", ["clip_resnet", "hf_text"])
def test_a_model_in_training_gives_rows_of_eval_and_stays_in_its_modes(family: str) -> None:
    expected = added(model_of(family)).weight
    model = model_of(family).train()
    model.visual.eval()
    modes = [module.training for module in model.modules()]
    found = add_head(site_of(model), model, undo := ExitStack(), words, True).weight
    assert torch.equal(found, expected)
    undo.close()
    assert [module.training for module in model.modules()] == modes


def test_without_a_tokenizer_clip_s_own_is_taken_for_clip_s_vocabulary_alone() -> None:
    model = model_of("clip_vit")
    with pytest.raises(ApplyError, match="needs the model's tokenizer") as caught:
        add_head(site_of(model), model, ExitStack(), None, True)
    assert "tokenizer=..." in str(caught.value)
    assert not hasattr(model, "head")
    torch.manual_seed(0)
    clip: Any = tiny.clip_vit(text={"vocab_size": 49408}).eval()
    head = add_head(site_of(clip), clip, ExitStack(), None, True)
    tokenizer = open_clip.SimpleTokenizer(context_length=tiny.CONTEXT)
    expected = open_clip.build_zero_shot_classifier(clip, tokenizer, CLASSES, TEMPLATES).T
    torch.testing.assert_close(head.weight, expected)


def test_another_model_s_tokenizer_is_refused() -> None:
    model = model_of("clip_vit")
    with pytest.raises(ApplyError, match="vocabulary has 64"):
        add_head(site_of(model), model, ExitStack(), open_clip.SimpleTokenizer(context_length=tiny.CONTEXT), True)


def test_the_tokenizer_fixture_tells_the_classes_apart() -> None:
    assert len({tuple(row) for row in words(list(CLASSES)).tolist()}) == len(CLASSES)
