"""What was injected is switched, weighted, combined with other policies, merged and restored."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from by_hand import leaves as factors_of
from by_hand import written
from life import SGD, assert_same, features, made, planned, train, weights
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from clipfreeze import changes
from clipfreeze.changes import Applied, apply
from clipfreeze.errors import ApplyError

import tiny

LORA = '[[rule]]\nmatch = "@blocks"\nlora = { rank = 2, targets = "q,k,v,out,fc1,fc2" }\n' + SGD
OTHER = '[[rule]]\nmatch = "@vision.blocks"\nlora = { rank = 3, targets = "q,out" }\n' + SGD
ADAPTER = '[[rule]]\nmatch = "@blocks"\nadapter = { dim = 4 }\n' + SGD
PROMPT = '[[rule]]\nmatch = "@text"\nprompt = { length = 2 }\n' + SGD


def applied_to(model: nn.Module, folder, text: str = LORA, noise: int = 7) -> Applied:
    applied = apply(planned(model, folder, text), model)
    with torch.no_grad():
        torch.manual_seed(noise)
        for parameter in applied.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return applied


def saved(folder, text: str, noise: int) -> None:
    applied_to(made(), folder, text, noise).save(folder / f"saved-{noise}")


def deltas(model: nn.Module, base: list[torch.Tensor]) -> list[torch.Tensor]:
    return [now - before for now, before in zip(features(model), base, strict=True)]


@pytest.fixture
def pair(tmp_path):
    """A model with LoRA of its own and another policy's beside it, which rests."""
    saved(tmp_path, OTHER, 1)
    model = made().eval()
    applied = applied_to(model, tmp_path)
    applied.add(tmp_path / "saved-1", "other")
    return model, applied


def test_another_policy_rests_until_it_is_activated_and_each_alone_is_as_if_the_other_were_not_there(pair, tmp_path):
    model, applied = pair
    own = features(model)
    applied.activate("other")
    other = features(model)
    fresh = made().eval()
    changes.load(tmp_path / "saved-1", fresh)
    assert all(map(torch.equal, other, features(fresh)))
    applied.activate("mine")
    assert all(map(torch.equal, own, features(model)))
    assert not torch.equal(own[0], other[0])


def test_policies_that_are_active_together_add_up_in_every_product(pair, tmp_path):
    model, applied = pair
    weight = model.visual.transformer.resblocks[0].mlp.c_fc
    applied.activate("mine", other=0.5)
    x = torch.randn(3, 32)
    together = model.visual.transformer.resblocks[0].attn
    query = torch.randn(2, 5, 32)
    both = together(query, query, query)[0]
    applied.activate("mine")
    first = together(query, query, query)[0]
    applied.activate()
    none, plain = together(query, query, query)[0], weight(x)
    assert not torch.allclose(both, first)
    assert not torch.allclose(first, none)
    with applied.disabled():
        assert torch.equal(together(query, query, query)[0], none)
        assert torch.equal(weight(x), plain)


@pytest.mark.parametrize("scale", [0.0, 0.25, 1.0])
def test_a_scale_is_that_share_of_every_change_of_a_weight(scale, tmp_path):
    model = made().eval()
    plain = copy.deepcopy(model)
    applied = applied_to(model, tmp_path)
    applied.set_scale(scale)
    own, changed = dict(plain.named_parameters()), written(plain, applied, factors_of(applied))
    mixed = {name: own[name] + scale * (changed[name] - own[name]) for name in own}
    given = tiny.images(model), tiny.tokens(model)
    for ours, by_hand in zip(model(*given), functional_call(plain, mixed, given), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)


def test_after_disabled_the_scale_is_what_it_was_also_when_the_block_fails(tmp_path):
    model = made().eval()
    applied = applied_to(model, tmp_path)
    applied.set_scale(0.5)
    half = features(model)
    with pytest.raises(ZeroDivisionError), applied.disabled():
        1 / 0  # noqa: B018
    assert all(map(torch.equal, half, features(model)))


WRONG = [
    (lambda applied, folder: applied.set_scale(1.5), "a scale of 1.5"),
    (lambda applied, folder: applied.activate("nobody"), "nothing named 'nobody'"),
    (lambda applied, folder: applied.activate(mine=2.0), "a weight of 2"),
    (lambda applied, folder: applied.add(folder / "saved-1", "other"), "'other' is taken"),
    (lambda applied, folder: applied.add(folder / "saved-1", "my other"), "'my other' is no name"),
    (lambda applied, folder: applied.add(folder / "nowhere", "second"), "cannot read"),
    (lambda applied, folder: applied.merge(), "several policies are at work: mine, other"),
    (lambda applied, folder: applied.unmerge(), "nothing is merged"),
]


@pytest.mark.parametrize(("act", "what"), WRONG, ids=[what for _, what in WRONG])
def test_what_cannot_be_is_told_and_changes_nothing(act, what, pair, tmp_path):
    model, applied = pair
    before = features(model)
    with pytest.raises(ApplyError, match=what):
        act(applied, tmp_path)
    assert all(map(torch.equal, before, features(model)))


def test_policies_that_train_the_model_itself_do_not_stand_beside_others(tmp_path):
    saved(tmp_path, '[[rule]]\nmatch = "@logit_scale"\ntrain = true\n' + SGD, 1)
    applied = applied_to(made(), tmp_path)
    with pytest.raises(ApplyError, match=r"changes the model's own parameters: logit_scale"):
        applied.add(tmp_path / "saved-1", "other")


def test_of_two_prompts_for_a_tower_one_is_active_and_neither_by_half(tmp_path):
    saved(tmp_path, PROMPT, 1)
    model = made().eval()
    applied = applied_to(model, tmp_path, PROMPT)
    own = features(model)[1]
    applied.add(tmp_path / "saved-1", "other")
    with pytest.raises(ApplyError, match="two prompts for the text tower"):
        applied.activate("mine", "other")
    with pytest.raises(ApplyError, match="cannot be weighted"):
        applied.activate(other=0.5)
    applied.activate("other")
    assert not torch.equal(features(model)[1], own)
    applied.activate("mine")
    assert torch.equal(features(model)[1], own)


def test_adapters_and_prompts_are_not_merged_and_stay_at_work(tmp_path):
    for text in (ADAPTER, PROMPT):
        model = made().eval()
        applied = applied_to(model, tmp_path, text)
        before = features(model)
        with pytest.raises(ApplyError, match="cannot be merged into weights"):
            applied.merge()
        assert all(map(torch.equal, before, features(model)))


def test_b14_merged_weights_load_strictly_into_a_fresh_model_with_the_same_keys_in_order(tmp_path):
    model = made().eval()
    before = {name: (type(p), p.dtype, p.shape, id(p)) for name, p in model.named_parameters()}
    applied = applied_to(model, tmp_path)
    adapted = features(model)
    applied.merge()
    merged = dict(model.named_parameters())
    assert {name: (type(p), p.dtype, p.shape, id(p)) for name, p in merged.items()} == before
    assert list(merged) == list(before)
    assert all(parameter.is_contiguous() for parameter in merged.values())
    fresh = made(seed=9).eval()
    fresh.load_state_dict(model.state_dict())
    for ours, theirs in zip(adapted, features(fresh), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_while_merged_nothing_else_is_done_and_unmerged_training_goes_on(tmp_path):
    model = made()
    applied = applied_to(model, tmp_path)
    applied.merge()
    for act in (applied.merge, applied.trainable, applied.optimizer, lambda: applied.save(tmp_path / "out")):
        with pytest.raises(ApplyError, match="merged into the weights"):
            act()
    applied.unmerge()
    base = {name: p.clone() for name, p in model.named_parameters() if name not in applied.trainable()}
    train(applied)
    assert_same(base, {name: p for name, p in model.named_parameters() if name in base})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_b17_merging_into_half_precision_says_what_it_changed(dtype, tmp_path):
    model = made().to(dtype).eval()
    applied = applied_to(model, tmp_path)
    assert 0 < applied.merge() < torch.finfo(dtype).eps ** 0.5


def test_b17_a_merge_that_changes_features_too_much_is_undone(tmp_path, monkeypatch):
    model = made().eval()
    applied = applied_to(model, tmp_path)
    before, state = features(model), weights(model)
    monkeypatch.setattr(changes, "_change", lambda *_: 0.5)
    with pytest.raises(ApplyError, match=r"merging changes features by 0\.5 of the largest"):
        applied.merge()
    assert_same(state, weights(model))
    assert all(map(torch.equal, before, features(model)))


def test_removed_it_is_used_no_more(pair):
    model, applied = pair
    plain = made().eval()
    applied.remove()
    assert_same(weights(plain), weights(model))
    assert all(map(torch.equal, features(plain), features(model)))
    for act in (applied.trainable, applied.merge, applied.unmerge, lambda: applied.set_scale(1)):
        with pytest.raises(ApplyError, match="was removed"):
            act()


def learned(folder: Path, part: slice, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, torch.Tensor]:
    """What two steps on a part of the batch teach the factors; the loss is a mean over pairs."""
    model = made()
    applied = applied_to(model, folder)
    optimizer, wrapped = applied.optimizer(), wrap(model)
    images, tokens = tiny.images(model)[part], tiny.tokens(model)[part]
    for _ in range(2):
        found = wrapped(images, tokens)
        (found[0] - found[1].roll(1, 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in applied.trainable().items()}


def _one_rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    found = learned(folder / str(rank), slice(rank, None, 2), DistributedDataParallel)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_learn_the_same_lora_as_one_on_the_whole_batch(tmp_path):
    for rank in "01":
        (tmp_path / rank).mkdir()
    torch.multiprocessing.spawn(_one_rank, (tmp_path,), 2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(first, second)
    for name, alone in learned(tmp_path, slice(None), lambda model: model).items():
        torch.testing.assert_close(first[name], alone, rtol=1e-4, atol=1e-6)
