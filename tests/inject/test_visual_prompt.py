"""Vectors among the patches, against the same put in by hand into a forward pass of the plain model."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipfreeze.anatomy.partition import describe
from clipfreeze.inject.factor import Factor
from clipfreeze.inject.prompt import add_prompt
from clipfreeze.inject.visual_prompt import VisualPrompt
from clipfreeze.plan.prompt_sites import place_prompts
from clipfreeze.policy.actions import Prompt

import tiny

OPEN_CLIP = {
    "clip_vit": tiny.clip_vit,
    "custom_text": tiny.custom_text,
    "coca": tiny.coca,
    "hf_text": tiny.hf_text,
    "averaged": partial(tiny.clip_vit, {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}),
    "other attention": partial(tiny.clip_vit, {"qk_norm": True, "scale_attn": True}),
}
TIMM = {name: tiny.FAMILIES[name] for name in ("siglip", "eva", "pe", "vitamin", "mci")}
MODELS = {**OPEN_CLIP, **TIMM}
PREFIX = {**dict.fromkeys(MODELS, 1), "siglip": 0, "vitamin": 0}
ROTARY = ("eva", "pe")


def built(name: str) -> Any:
    torch.manual_seed(0)
    model: Any = MODELS[name]()
    return model.eval()


def put(model: Any, *towers: str, undo: ExitStack | None = None, fresh: bool = True, **said: Any) -> list[Any]:
    """A prompt of three vectors in each of the towers."""
    anatomy = describe(model)
    matched = {index for index, parameter in enumerate(anatomy.parameters) if parameter.tower in towers}
    sites = place_prompts(anatomy, matched, Prompt(**{"length": 3, "std": 1.0, **said}))
    undo = ExitStack() if undo is None else undo
    prompts: list[Any] = [
        add_prompt(site, model, undo, None, fresh) for site in sorted(sites, key=lambda site: str(site.tower))
    ]
    names = [name for name, _ in model.named_parameters() if name.startswith("prompt.")]
    assert sorted(names) == sorted(name for site in sites for name in site.names)
    return prompts


def image_feature(model: Any, images: Tensor) -> Tensor:
    feature: Tensor = model.encode_image(images)
    return feature


def joined(x: Tensor, vectors: Tensor, first: int, over: int) -> Tensor:
    """x with the vectors in place of `over` tokens behind the first."""
    return torch.stack([torch.cat([row[:first], vectors, row[first + over :]]) for row in x])


def by_hand(name: str, model: Any, images: Tensor, vectors: list[Tensor]) -> Tensor:
    """The feature of the plain model with vectors[i] before block i."""
    tower, first, length = model.visual, PREFIX[name], len(vectors[0])
    rope: dict[str, Any] = {}
    if name in OPEN_CLIP:
        x, blocks = tower._embeds(images), tower.transformer.resblocks
    else:
        trunk = tower.trunk
        x, blocks = trunk._pos_embed(trunk.patch_embed(images)), trunk.blocks
        if name in ROTARY:
            x, rope["rope"] = x
        x = trunk.norm_pre(x)
    for index, block in enumerate(blocks):
        if name in ROTARY:
            block.attn.num_prefix_tokens = 1 + length
        if index < len(vectors):
            x = joined(x, vectors[index], first, length if index else 0)
        x = block(x, **rope)
    x = torch.cat([x[:, :first], x[:, first + length :]], 1)
    if name in OPEN_CLIP:
        pooled: Tensor = tower._pool(x)[0] @ tower.proj
        return nn.functional.normalize(pooled, dim=-1) if name == "coca" else pooled
    found: Tensor = tower.head(trunk.forward_head(trunk.norm(x)))
    return found


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_visual_prompt_is_vectors_among_the_patches(name, depth):
    model = built(name)
    plain, images = copy.deepcopy(model), tiny.images(model)
    [prompt] = put(model, "vision", depth=depth)
    assert prompt.vectors.shape[:2] == (depth, 3)
    found = image_feature(model, images)
    torch.testing.assert_close(found, by_hand(name, plain, images, list(prompt.vectors)), rtol=1e-5, atol=1e-5)
    assert (found - image_feature(built(name), images)).abs().max() > 1e-3


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_coupled_prompts_are_a_map_of_the_text_s_and_teach_it(name, depth):
    model = built(name)
    plain, images = copy.deepcopy(model), tiny.images(model)
    text, vision = put(model, "vision", "text", couple=True, depth=depth)
    assert {site: tuple(value.shape) for site, value in vision.named_parameters()} == {
        "map.weight": (depth, model_width(name), text.vectors.shape[-1]),
        "map.bias": (depth, model_width(name)),
    }
    mapped = [
        text.vectors[index] @ vision.map.weight[index].T + vision.map.bias[index] for index in range(depth)
    ]  # fmt: skip
    found = image_feature(model, images)
    torch.testing.assert_close(found, by_hand(name, plain, images, mapped), rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum() * (found**3).sum(), [text.vectors, *vision.parameters()])
    for gradient in gradients:
        assert gradient.flatten(1).abs().amax(1).min() > 0


def model_width(name: str) -> int:
    return 16 if name == "siglip" else 32


def test_the_map_starts_as_torch_s_linear_does():
    torch.manual_seed(0)
    _, vision = put(tiny.clip_vit(), "vision", "text", couple=True, depth=3)
    bound = 32**-0.5
    assert 0.9 * bound < vision.map.weight.abs().max() <= bound
    assert 0.5 * bound < vision.map.bias.abs().max() <= bound


def test_vectors_start_at_random_or_as_what_is_saved():
    torch.manual_seed(0)
    [prompt] = put(tiny.clip_vit(), "vision", length=9, depth=3, std=0.02)
    assert 0.015 < prompt.vectors.std() < 0.025
    [saved] = put(tiny.clip_vit(), "vision", fresh=False)
    assert not saved.vectors.any()


@pytest.mark.parametrize("couple", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_switched_off_or_taken_out_it_is_as_if_it_had_never_been(name, couple):
    model = built(name)
    images, before = tiny.images(model), state_of(model)
    expected = image_feature(model, images)
    undo = ExitStack()
    prompts = put(model, "vision", *(["text"] if couple else []), undo=undo, couple=couple, depth=2)
    assert not torch.equal(image_feature(model, images), expected)
    assert list(model.state_dict())[: len(before["state"])] == before["state"]
    on = image_feature(model, images)
    for prompt in prompts:
        assert not prompt.scalable
        prompt.set_strength(0.0)
    assert torch.equal(image_feature(model, images), expected)
    for prompt in prompts:
        prompt.set_strength(0.0)
        prompt.set_strength(1.0)
        prompt.set_strength(1.0)
    assert torch.equal(image_feature(model, images), on)
    undo.close()
    assert torch.equal(image_feature(model, images), expected)
    assert state_of(model) == before


def state_of(model: Any) -> dict[str, Any]:
    """Names, attributes, counts of first tokens and hooks of all modules."""
    kept = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return {
        "state": list(model.state_dict()),
        "modules": [name for name, _ in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "first tokens": [vars(module).get("num_prefix_tokens") for module in model.modules()],
        "hooks": [len(vars(module)[name]) for module in model.modules() for name in kept],
        "stand-ins": [value for module in model.modules() for value in vars(module).values() if type(value) is Factor],
    }


@pytest.mark.parametrize("couple", [False, True])
@pytest.mark.parametrize("name", ["clip_vit", "eva", "pe", "siglip"])
@torch.no_grad()
def test_a_copy_has_a_prompt_of_its_own(name, couple):
    model, undo = built(name), ExitStack()
    images = tiny.images(model)
    put(model, "vision", *(["text"] if couple else []), undo=undo, couple=couple)
    on = image_feature(model, images)
    other = copy.deepcopy(model)
    undo.close()
    off = image_feature(model, images)
    assert torch.equal(image_feature(other, images), on)
    [prompt] = [module for module in other.modules() if isinstance(module, VisualPrompt)]
    vectors = other.prompt.text.vectors if couple else prompt.vectors
    vectors += 1
    assert not torch.equal(image_feature(other, images), on)
    prompt.set_strength(0.0)
    assert torch.equal(image_feature(other, images), off)


@pytest.mark.parametrize("name", ["clip_vit", "eva"])
@torch.no_grad()
def test_of_two_prompts_the_one_that_is_on_counts(name):
    model = built(name)
    images = tiny.images(model)
    [first] = put(model, "vision")
    alone = image_feature(model, images)
    model.prompt_second = model._modules.pop("prompt")  # as a second policy's is named
    anatomy = describe(built(name))
    matched = {index for index, parameter in enumerate(anatomy.parameters) if parameter.tower == "vision"}
    [site] = place_prompts(anatomy, matched, Prompt(length=2, std=1.0))
    undo = ExitStack()
    second = add_prompt(site, model, undo, None, True)
    first.set_strength(0.0)
    assert not torch.equal(image_feature(model, images), alone)
    second.set_strength(0.0)
    first.set_strength(1.0)
    assert torch.equal(image_feature(model, images), alone)
    undo.close()
    assert torch.equal(image_feature(model, images), alone)


@pytest.mark.parametrize("name", ["clip_vit", "coca", *TIMM])
def test_checkpointing_changes_no_gradient(name):
    model = built(name)
    images, weights = tiny.images(model), torch.randn(4, tiny.EMBED_DIM)
    text, vision = put(model, "vision", "text", couple=True, depth=2)
    trained = [text.vectors, *vision.parameters()]
    gradients = []
    for on in (False, True):
        model.set_grad_checkpointing(on)
        gradients.append(torch.autograd.grad((image_feature(model, images) * weights).sum(), trained))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["clip_vit", "eva"])
def test_it_compiles_to_one_graph(name):
    model = built(name)
    images, weights = tiny.images(model), torch.randn(4, tiny.EMBED_DIM)
    [prompt] = put(model, "vision", depth=2)
    compiled = torch.compile(model.visual, backend="aot_eager", fullgraph=True)
    gradients = [
        torch.autograd.grad((encode(images) * weights).sum(), [prompt.vectors])[0]
        for encode in (model.visual, compiled)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("how", ["bf16 autocast", "bf16 weights", "fp16 weights"])
@pytest.mark.parametrize("name", ["clip_vit", "siglip", "eva", "coca"])
def test_twenty_steps_in_half_precision_stay_finite(name, how):
    model = built(name)
    images = tiny.images(model)
    if "weights" in how:
        dtype = torch.float16 if "fp16" in how else torch.bfloat16
        model.to(dtype)
        images = images.to(dtype)
    text, vision = put(model, "vision", "text", couple=True, depth=2, std=0.02)
    trained = [text.vectors, *vision.parameters()]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    target = nn.functional.normalize(torch.randn(4, tiny.EMBED_DIM), dim=-1)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in how):
            features = model.encode_image(images, normalize=True)
        loss = -(features.float() * target).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.isfinite(parameter).all() for parameter in trained)
    assert losses[-1] < losses[0] - 0.05
