"""What PEFT made and saved gives the same features here; what cannot be read leaves the model as it was."""

import copy
import json

import pytest
import torch
from by_hand import assert_near
from life import SGD, assert_same, features, made, picture, planned, train, weights
from safetensors.torch import load_file, save_file

import clipfreeze
from clipfreeze.changes import apply
from clipfreeze.errors import ApplyError

import tiny

peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def encoded(model):
    with torch.no_grad():
        return features(model.eval())


def saved(base, folder, **config):
    """The features of PEFT's own model, its adapter full of noise, and the folder that it saves."""
    said = {"r": 3, "lora_alpha": 5, **config}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**said))
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.2)
    theirs.save_pretrained(folder, save_embedding_layers=False)  # the base has them
    return encoded(theirs.base_model.model)


def assert_all_near(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs, 1e-5)


MLP = {"target_modules": ["c_fc", "c_proj"]}
ATTENTION = {"target_modules": r".*\.attn"}
PATTERNS = {
    "target_modules": ["attn", "c_fc"],
    "rank_pattern": {"c_fc": 4, r"visual\..*\.1\.attn": 6},
    "alpha_pattern": {"visual.transformer.resblocks.0.mlp.c_fc": 1, "^transformer.resblocks.2.attn": 9},
}
READ = {
    "attention": ("clip_vit", ATTENTION),
    "attention of a rank above its width": ("clip_vit", {**ATTENTION, "r": 40}),
    "linear": ("clip_vit", MLP),
    "convolution": ("clip_vit", {"target_modules": ["conv1"]}),
    "convolutions of 1 by 1": ("clip_resnet", {"target_modules": r"visual.*\.conv[13]"}),
    "embedding": ("clip_vit", {"target_modules": ["token_embedding"]}),
    "embedding that scales": ("m2m_100", {"target_modules": ["embed_tokens"]}),
    "dropout, which an embedding has none of": (
        "clip_vit",
        {"target_modules": ["token_embedding", "c_fc"], "lora_dropout": 0.2},
    ),
    "one tower": ("clip_vit", {"target_modules": r"visual\.transformer\..*\.attn"}),
    "patterns": ("clip_vit", PATTERNS),
    "rslora": ("clip_vit", {**ATTENTION, "use_rslora": True}),
    "rslora with patterns": ("clip_vit", {**PATTERNS, "use_rslora": True}),
    "dora": ("clip_vit", {**MLP, "use_dora": True}),
    "dora of a rank above its width": ("clip_vit", {**MLP, "use_dora": True, "r": 40}),
    "dora with rslora": ("clip_vit", {**MLP, "use_dora": True, "use_rslora": True}),
    "dora in convolution and embedding": (
        "clip_vit",
        {"target_modules": ["conv1", "token_embedding"], "use_dora": True},
    ),
    "fused linear": ("siglip", {"target_modules": ["qkv"]}),
    "dora in a fused linear": ("siglip", {"target_modules": ["qkv"], "use_dora": True}),
    "hugging face tower": ("hf_text", {"target_modules": ["query", "value", "dense"]}),
    "gaussian": ("clip_vit", {**MLP, "init_lora_weights": "gaussian"}),
    "orthogonal": ("clip_vit", {**MLP, "init_lora_weights": "orthogonal", "r": 4}),
}


def base_of(family):
    torch.manual_seed(0)
    return tiny.lively(tiny.hf_text(family) if family in tiny.HF_CONFIGS else made(family)).eval()


@pytest.mark.parametrize("case", READ)
def test_the_features_are_those_of_peft(tmp_path, case):
    family, config = READ[case]
    model = base_of(family)
    plain = encoded(model)
    expected = saved(model, tmp_path / "theirs", **config)
    clipfreeze.load(tmp_path / "theirs", model)
    assert_all_near(encoded(model), expected)
    assert not all(map(torch.allclose, expected, plain))


@pytest.mark.parametrize("case", ["attention", "patterns", "dora in a fused linear"])
def test_what_was_read_can_be_saved_and_loaded_as_ours(tmp_path, case):
    family, config = READ[case]
    model = base_of(family)
    again = copy.deepcopy(model)
    expected = saved(model, tmp_path / "theirs", **config)
    clipfreeze.load(tmp_path / "theirs", model).save(tmp_path / "ours")
    clipfreeze.load(tmp_path / "ours", again)
    assert all(map(torch.equal, encoded(again), encoded(model)))
    assert_all_near(encoded(again), expected)


def test_the_plan_says_where_it_comes_from_and_that_only_lora_trains(tmp_path):
    model = base_of("clip_vit")
    saved(model, tmp_path / "theirs", **MLP)
    plan = clipfreeze.load(tmp_path / "theirs", model).plan
    assert plan.policy.name == "theirs"
    assert plan.policy.sources == (str(tmp_path / "theirs"),)
    assert {parameter.origin for parameter in plan.trainable} == {"lora"}
    assert {(site.spec.rank, site.spec.scaling) for site in plan.sites} == {(3, 5 / 3)}


def test_what_was_read_trains_on_and_comes_off(tmp_path):
    model = base_of("clip_vit")
    before, plain = weights(model), encoded(model)
    expected = saved(model, tmp_path / "theirs", **ATTENTION)
    applied = clipfreeze.load(tmp_path / "theirs", model)
    train(applied)
    assert not any(map(torch.allclose, encoded(model), expected))
    applied.remove()
    assert_same(weights(model), before)
    assert all(map(torch.equal, encoded(model), plain))


def test_q_k_and_v_become_factors_of_their_own(tmp_path):
    model = base_of("clip_vit")
    saved(model, tmp_path / "theirs", target_modules=r"visual\.transformer\.resblocks\.0\.attn")
    sites = [site for site, _ in clipfreeze.load(tmp_path / "theirs", model).additions]
    name = "visual.transformer.resblocks.0.attn"
    expected = [f"{name}.in_proj_weight {slot}" for slot in "qkv"]
    assert sorted(site.of for site in sites) == sorted([*expected, f"{name}.out_proj.weight"])


def test_an_adapter_that_has_not_been_trained_is_read_with_its_start(tmp_path):
    model = base_of("clip_vit")
    plain = encoded(model)
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**MLP)).save_pretrained(tmp_path)
    applied = clipfreeze.load(tmp_path, model)
    start = load_file(tmp_path / WEIGHTS)
    for site, addition in applied.additions:
        module = site.parameter.removesuffix(".weight")
        assert torch.equal(addition.A, start[f"base_model.model.{module}.lora_A.weight"])
        assert not addition.B.any()
    assert all(map(torch.equal, encoded(model), plain))


def test_magnitudes_count_where_the_factors_are_zero(tmp_path):
    model = base_of("siglip")
    saved(model, tmp_path, target_modules=["qkv"], use_dora=True)

    def q_alone(tensors):
        return {
            key: tensor * (torch.arange(len(tensor)) < 16)[:, None] if "lora_B" in key else tensor
            for key, tensor in tensors.items()
        }

    change_weights(tmp_path, q_alone)
    expected = encoded(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).base_model.model)
    clipfreeze.load(tmp_path, model)
    assert_all_near(encoded(model), expected)


def test_the_weights_file_of_old_versions_is_read(tmp_path):
    model = base_of("clip_vit")
    expected = saved(model, tmp_path / "theirs", **MLP)
    torch.save(load_file(tmp_path / "theirs" / WEIGHTS), tmp_path / "theirs" / "adapter_model.bin")
    (tmp_path / "theirs" / WEIGHTS).unlink()
    clipfreeze.load(tmp_path / "theirs", model)
    assert_all_near(encoded(model), expected)


def test_keys_with_the_name_of_the_adapter_are_read(tmp_path):
    """As in a state dict of the training model itself."""
    model = base_of("clip_vit")
    expected = saved(model, tmp_path / "theirs", **MLP)
    change_weights(
        tmp_path / "theirs",
        lambda tensors: {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()},
    )
    clipfreeze.load(tmp_path / "theirs", model)
    assert_all_near(encoded(model), expected)


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps({**config, **changes}), encoding="utf-8")


def change_weights(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def assert_refused(folder, model, place, said):
    """One error at this file, and a model as it was."""
    before, state = picture(model), weights(model)
    with pytest.raises(ApplyError, match=said) as refused:
        clipfreeze.load(folder, model)
    assert {problem.path for problem in refused.value.problems} == {str(folder / place)}
    assert picture(model) == before
    assert_same(weights(model), state)


NO_JSON = {"text": ("no json", "cannot be read"), "binary": (b"\xff\xfe", "cannot be read"), "empty": ("", "cannot be")}
NO_JSON |= {"a list": ("[]", "peft_type is None"), "an empty table": ("{}", "peft_type is None")}


@pytest.mark.parametrize("case", NO_JSON)
def test_a_config_that_is_none_is_refused(tmp_path, case):
    written, said = NO_JSON[case]
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    (tmp_path / CONFIG).write_bytes(written if isinstance(written, bytes) else written.encode())
    assert_refused(tmp_path, model, CONFIG, said)


BROKEN = {
    "alpha in words": ({"lora_alpha": "much"}, "could not convert string to float: 'much'"),
    "no alpha": ({"lora_alpha": None}, "must be a string or a real number"),
    "alpha of zero": ({"lora_alpha": 0}, "alpha: Input should be greater than 0"),
    "dropout above 1": ({"lora_dropout": 1.5}, "dropout: Input should be less than 1"),
    "an alpha pattern that is none": ({"alpha_pattern": {"(": 1}}, "missing \\)"),
    "an alpha pattern in words": ({"alpha_pattern": {"c_fc": "much"}}, "could not convert string to float: 'much'"),
    "an alpha pattern of zero": ({"alpha_pattern": {"c_fc": 0}}, "alpha: Input should be greater than 0"),
    "alpha patterns in a list": ({"alpha_pattern": ["c_fc"]}, ""),
    "a rank pattern that is none": ({"rank_pattern": {"(": 1}}, "missing \\)"),
    "rank patterns in a list": ({"rank_pattern": ["c_fc"]}, ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config_is_refused(tmp_path, case):
    changes, said = BROKEN[case]
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    change_config(tmp_path, **changes)
    assert_refused(tmp_path, model, CONFIG, f"says no LoRA: .*{said}")


MORE = {
    "modules_to_save": (["ln_post"], "modules_to_save = .*: more than LoRA"),
    "bias": ("all", "bias = 'all': more than LoRA"),
    "lora_bias": (True, "lora_bias = True: more than LoRA"),
    "trainable_token_indices": ([1, 2], "trainable_token_indices = .*: more than LoRA"),
    "target_parameters": (["visual.proj"], "target_parameters = .*: more than LoRA"),
    "layer_replication": ([[0, 2]], "layer_replication = .*: more than LoRA"),
    "use_qalora": (True, "use_qalora = True: more than LoRA"),
    "an_idea_of_next_year": ({"much": 1}, "an_idea_of_next_year = .*: more than LoRA"),
    "init_lora_weights": ("pissa", "init_lora_weights = 'pissa' changed the base weights"),
    "peft_type": ("LOHA", "peft_type is 'LOHA': LORA alone can be read"),
}


@pytest.mark.parametrize("key", MORE)
def test_more_than_lora_is_refused(tmp_path, key):
    value, said = MORE[key]
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    change_config(tmp_path, **{key: value})
    assert_refused(tmp_path, model, CONFIG, said)


def test_all_that_is_more_than_lora_is_said_at_once(tmp_path):
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    change_config(tmp_path, bias="all", lora_bias=True, init_lora_weights="pissa")
    with pytest.raises(ApplyError) as refused:
        clipfreeze.load(tmp_path, model)
    assert len(refused.value.problems) == 3


@pytest.mark.parametrize(
    ("config", "place", "said"),
    [
        ({**MLP, "bias": "all"}, CONFIG, "bias = 'all'"),
        ({**MLP, "lora_bias": True}, CONFIG, "lora_bias = True"),
        ({**MLP, "modules_to_save": ["ln_post"]}, CONFIG, "modules_to_save"),
        ({**MLP, "init_lora_weights": "pissa"}, CONFIG, "changed the base weights"),
        ({**MLP, "init_lora_weights": "olora"}, CONFIG, "changed the base weights"),
    ],
    ids=["bias", "lora_bias", "modules_to_save", "pissa", "olora"],
)
@pytest.mark.filterwarnings("ignore:.* have invalid shape")  # PEFT takes its own biases for shards
def test_what_peft_itself_saves_beyond_lora_is_refused(tmp_path, config, place, said):
    saved(model := base_of("clip_vit"), tmp_path, **config)
    assert_refused(tmp_path, model, place, said)


def test_another_method_of_peft_is_refused(tmp_path):
    model = base_of("clip_vit")
    peft.get_peft_model(copy.deepcopy(model), peft.LoHaConfig(target_modules=["c_fc"])).save_pretrained(tmp_path)
    assert_refused(tmp_path, model, CONFIG, "peft_type is 'LOHA'")


OTHERS = {
    "other modules": (lambda: base_of("siglip"), {"target_modules": ["qkv"]}, "not in this model.*qkv"),
    "more blocks": (
        lambda: tiny.clip_vit(text={"layers": 4}),
        MLP,
        r"not in this model, or .*: transformer.resblocks.3.mlp.c_fc, transformer.resblocks.3.mlp.c_proj",
    ),
    "a wider tower": (
        lambda: tiny.clip_vit(text={"width": 64}),
        ATTENTION,
        r"transformer.resblocks.0.attn: factors of \(3, 64\) and \(192, 3\), .* has \(3, 32\) and \(96, 3\)",
    ),
    "another vocabulary": (
        lambda: tiny.clip_vit(text={"vocab_size": 70}),
        {"target_modules": ["token_embedding"]},
        r"factors of \(3, 70\) and \(32, 3\), token_embedding.weight at rank 3 has \(3, 64\) and \(32, 3\)",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_lora_of_another_model_is_refused(tmp_path, case):
    other, config, said = OTHERS[case]
    saved(other(), tmp_path, **config)
    assert_refused(tmp_path, base_of("clip_vit"), WEIGHTS, said)


def test_a_rank_that_is_not_that_of_the_factors_is_refused(tmp_path):
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    change_config(tmp_path, r=4)
    assert_refused(tmp_path, model, WEIGHTS, "at rank 4 has")


def test_dora_that_its_config_does_not_say_is_refused(tmp_path):
    saved(model := base_of("clip_vit"), tmp_path, **MLP, use_dora=True)
    change_config(tmp_path, use_dora=False)
    assert_refused(tmp_path, model, WEIGHTS, "lora_magnitude_vector")


def halved(tensors):
    return {key: tensor for key, tensor in tensors.items() if "lora_A" in key}


def doubled(tensors):
    return {key.replace(".weight", f".{name}.weight"): tensor + 0 for key, tensor in tensors.items() for name in "ab"}


def with_more(tensors):
    return {**tensors, "base_model.model.visual.ln_post.weight": torch.ones(32)}


def zeros(tensors):
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}


TENSORS = {
    "A alone": (halved, "has lora_A alone"),
    "two adapters": (doubled, "no factors of one LoRA"),
    "a weight of the model": (with_more, "visual.ln_post.weight: no factors of one LoRA"),
    "zeros": (zeros, "all factors are zero"),
    "nothing": (lambda _: {}, "all factors are zero"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_not_those_of_one_lora_are_refused(tmp_path, case):
    change, said = TENSORS[case]
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    change_weights(tmp_path, change)
    assert_refused(tmp_path, model, WEIGHTS, said)


def test_a_missing_weights_file_is_refused(tmp_path):
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    (tmp_path / WEIGHTS).unlink()
    assert_refused(tmp_path, model, WEIGHTS, "cannot be read")


def test_a_broken_weights_file_is_refused(tmp_path):
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-10])
    assert_refused(tmp_path, model, WEIGHTS, "cannot be read")


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


PICKLES = {
    "code": ({"x": Code()}, "cannot be read as plain tensors"),
    "a list": ([torch.ones(2)], "holds more than tensors"),
    "words": ({"x.lora_A.weight": "no tensor"}, "holds more than tensors"),
}


@pytest.mark.parametrize("case", PICKLES)
def test_a_pickle_of_anything_but_tensors_is_refused_and_no_code_of_it_runs(tmp_path, capsys, case):
    content, said = PICKLES[case]
    saved(model := base_of("clip_vit"), tmp_path, **MLP)
    (tmp_path / WEIGHTS).unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    assert_refused(tmp_path, model, "adapter_model.bin", said)
    assert "this ran" not in capsys.readouterr().out


def test_it_cannot_stand_beside_another_policy_before_it_is_saved_as_ours(tmp_path):
    model = base_of("clip_vit")
    saved(model, tmp_path / "theirs", **MLP)
    applied = apply(planned(model, tmp_path, '[[rule]]\nmatch = "@blocks"\nlora = {}\n' + SGD), model)
    with pytest.raises(ApplyError, match=r"is no folder of save\(\)"):
        applied.add(tmp_path / "theirs", "theirs")
