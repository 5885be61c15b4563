"""PEFT itself puts the folder on a fresh base and says the same; what it cannot hold is named before any change."""

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import open_clip
import pytest
import torch
from by_hand import assert_near, stir
from life import SGD, assert_same, features, picture, planned, train, weights

import clipfreeze
from clipfreeze import models
from clipfreeze.changes import apply
from clipfreeze.errors import ApplyError, DataError, ExportError
from clipfreeze.export.peft import peft_notes, reload_line, write_peft

import tiny

peft = pytest.importorskip("peft")


def rule(match, *settings):
    return "\n".join(["[[rule]]", f"match = {match!r}", *settings, ""])


def lora(said, match="@blocks"):
    return rule(match, f"lora = {{ {said} }}")


@pytest.fixture
def adapted(build, tmp_path):
    """Builds a model with LoRA at work as if trained, and a copy of its base."""

    def built(rules, family="clip_vit"):
        loaded = build(family)
        base = copy.deepcopy(loaded.model)
        return stir(apply(planned(loaded.model, tmp_path, rules + SGD), loaded.model)), loaded, base

    return built


def encoded(model):
    with torch.no_grad():
        return features(model.eval())


def put_on(base, folder):
    """The features of a model that PEFT has put the folder on."""
    peft.PeftModel.from_pretrained(base, folder)
    return encoded(base)


def assert_all_near(found, expected):
    for theirs, ours in zip(found, expected, strict=True):
        assert_near(theirs, ours, 1e-5)


def assert_peft_says_the_same(applied, loaded, base, out):
    expected, plain = encoded(loaded.model), encoded(base)
    assert write_peft(applied, loaded, out) < 1e-4
    assert_all_near(put_on(base, out), expected)
    assert not all(map(partial(torch.allclose, rtol=0.01), expected, plain))


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


RANK = "rank = 2, alpha = 3.0"
ALL = f'{RANK}, targets = "q,k,v,out,fc1,fc2"'
DORA = f'{RANK}, variant = "dora"'
HELD = {
    "q": ("clip_vit", lora(f'{RANK}, targets = "q"')),
    "v": ("clip_vit", lora(f'{RANK}, targets = "v"')),
    "out": ("clip_vit", lora(f'{RANK}, targets = "out"')),
    "q, k, v and out": ("clip_vit", lora(f'{RANK}, targets = "q,k,v,out"')),
    "mlp": ("clip_vit", lora(f'{RANK}, targets = "fc1,fc2"')),
    "convolution and embedding": ("clip_vit", lora(RANK, "{visual.conv1,token_embedding}.weight")),
    "alpha that is no whole number": ("clip_vit", lora("rank = 3, alpha = 0.7")),
    "ranks and alphas of both towers": (
        "clip_vit",
        lora("rank = 2, alpha = 3.0", "@vision.blocks") + lora("rank = 4, alpha = 1.0", "@text.blocks"),
    ),
    "ranks and alphas in one attention": (
        "clip_vit",
        lora("rank = 1, alpha = 3.0", "@blocks.attn.q")
        + lora("rank = 3, alpha = 2.0", "@blocks.attn.v")
        + lora("rank = 2, alpha = 1.0", "@blocks.attn.out"),
    ),
    "rslora": ("clip_vit", lora(f'{ALL}, variant = "rslora"')),
    "gaussian": ("clip_vit", lora(f'{ALL}, init = "gaussian"')),
    "orthogonal": ("clip_vit", lora(f'{ALL}, init = "orthogonal"')),
    "pissa": ("clip_vit", lora(f'{ALL}, init = "pissa"')),
    "rslora pissa": ("clip_vit", lora(f'{ALL}, variant = "rslora", init = "pissa"')),
    "dora": ("clip_vit", lora(f'{DORA}, targets = "fc1,fc2"')),
    "dora in rows of a fused linear": ("siglip", lora(f'{DORA}, targets = "q,fc1"', "@vision.blocks")),
    "dora of one rank beside lora of another": (
        "siglip",
        lora(f'{DORA}, targets = "v"', "@vision.blocks") + lora("rank = 4, alpha = 1.0", "@text.blocks.mlp.fc1"),
    ),
    "dora in convolution and embedding": ("clip_vit", lora(DORA, "{visual.conv1,token_embedding}.weight")),
    "dora of an hf tower": ("hf_text", lora(DORA, "@text.blocks")),
    **{
        f"all of {family}": (family, lora(ALL)) for family in ("custom_text", "clip_resnet", "clip_convnext", "fastvit")
    },
    **{f"all of {family}": (family, lora(ALL)) for family in ("eva", "siglip", "coca", "hf_text")},
}


@pytest.mark.parametrize("case", HELD)
def test_peft_gives_the_same_features_from_the_folder(adapted, tmp_path, case):
    family, rules = HELD[case]
    assert_peft_says_the_same(*adapted(rules, family), tmp_path / "out")


@pytest.mark.parametrize("case", [case for case in HELD if not case.startswith("all of")])
def test_clipfreeze_reads_its_own_folder(adapted, tmp_path, case):
    family, rules = HELD[case]
    applied, loaded, base = adapted(rules, family)
    expected = encoded(loaded.model)
    write_peft(applied, loaded, tmp_path / "out")
    clipfreeze.load(tmp_path / "out", base)
    assert_all_near(encoded(base), expected)


@pytest.mark.parametrize("case", ["q, k, v and out", "pissa", "dora", "dora in rows of a fused linear"])
def test_half_the_strength_is_in_the_folder(adapted, tmp_path, case):
    family, rules = HELD[case]
    applied, loaded, base = adapted(rules, family)
    applied.set_scale(0.5)
    assert_peft_says_the_same(applied, loaded, base, tmp_path / "out")


def test_what_training_left_is_in_the_folder(build, tmp_path):
    loaded = build()
    base = copy.deepcopy(loaded.model)
    applied = apply(planned(loaded.model, tmp_path, lora(ALL) + SGD.replace("0.01", "1.0")), loaded.model)
    train(applied)
    assert_peft_says_the_same(applied, loaded, base, tmp_path / "out")


@pytest.mark.parametrize("said", [RANK, DORA])
def test_an_embedding_that_scales_what_it_looks_up_is_held(build, tmp_path, said):
    loaded = build("hf_text")
    model = tiny.hf_text("m2m_100")
    assert model.text.transformer.embed_tokens.embed_scale != 1
    loaded, base = replace(loaded, model=model, tokenizer=lambda _: tiny.tokens(model, 3)), copy.deepcopy(model)
    applied = stir(apply(planned(model, tmp_path, lora(said, "@text.embed") + SGD), model))
    assert_peft_says_the_same(applied, loaded, base, tmp_path / "out")


def test_every_module_has_its_own_rank_and_scale_though_names_end_alike(adapted, tmp_path):
    """PEFT's patterns match the end of a name, and a text block's is the end of a vision block's."""
    rules = lora("rank = 2, alpha = 3.0", "@vision.blocks.mlp") + lora("rank = 4, alpha = 1.0", "@text.blocks.mlp")
    applied, loaded, base = adapted(rules)
    write_peft(applied, loaded, tmp_path / "out")
    peft.PeftModel.from_pretrained(base, tmp_path / "out")
    for name, module in base.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            expected = (2, 1.5) if name.startswith("visual.") else (4, 0.25)
            assert (module.r["default"], module.scaling["default"]) == expected, name


def test_the_folder_holds_a_config_and_safetensors_and_no_pickle(adapted, tmp_path):
    applied, loaded, _ = adapted(lora(RANK))
    write_peft(applied, loaded, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    config = config_in(tmp_path / "out")
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == loaded.name


@pytest.mark.parametrize("training", [False, True])
def test_the_export_takes_the_policy_off_and_nothing_else(build, tmp_path, training):
    loaded = build()
    loaded.model.train(training)
    before, state = picture(loaded.model), weights(loaded.model)
    applied = stir(apply(planned(loaded.model, tmp_path, lora(ALL) + SGD), loaded.model))
    write_peft(applied, loaded, tmp_path / "out")
    assert picture(loaded.model) == before
    assert_same(weights(loaded.model), state)
    with pytest.raises(ApplyError, match="was removed"):
        applied.trainable()


def test_the_printed_line_puts_the_adapter_on_the_embedded_model(tmp_path):
    loaded = models.load("demo")
    applied = stir(apply(planned(loaded.model, tmp_path, lora(ALL) + SGD), loaded.model))
    expected = encoded(loaded.model)
    write_peft(applied, loaded, tmp_path / "out")
    adapted = eval(reload_line(loaded, tmp_path / "out"), {"open_clip": open_clip, "peft": peft})
    assert_all_near(encoded(adapted.base_model.model), expected)


def test_the_printed_line_names_the_weights_of_the_base(build, tmp_path):
    loaded = replace(build(), name="ViT-B-32", pretrained="openai")
    expected = f"peft.PeftModel.from_pretrained(open_clip.create_model('ViT-B-32', pretrained='openai'), '{tmp_path}')"
    assert reload_line(loaded, tmp_path) == expected


BARE = "PEFT adapts modules, and would wrap a whole tower for a bare parameter"
SEPARATE = "PEFT's attention takes no separate weights of q, k and v"
DORA_ATTENTION = "PEFT's attention takes no DoRA, nor anything beside DoRA elsewhere"
CHANGED = "PEFT cannot hold what this policy changes of the model itself"
IDLE = "PEFT's wrappers would not run around"
ADAPTER = rule("@text.blocks", "adapter = { dim = 4 }")
PROMPT = rule("@text", "prompt = { length = 2, truncate = false }")
HEAD = rule("@vision", 'head = { classes = ["a", "b"], init = "random" }')
REFUSED = {
    "projections of CLIP": ("clip_vit", lora(RANK, "@{vision,text}.proj"), [f"{BARE}: text_projection, visual.proj"]),
    "separate q, k and v": ("coca", lora(RANK, "@vision.pool"), [f"{SEPARATE}: visual.attn_pool.attn.q_proj_weight, "]),
    "dora in attention": ("clip_vit", lora(DORA, "visual.*.0.attn.*"), [f"{DORA_ATTENTION}: visual.transformer."]),
    "attention beside dora": (
        "clip_vit",
        lora(DORA, "@vision.blocks.mlp") + lora(RANK, "@text.blocks[0].attn.q"),
        [f"{DORA_ATTENTION}: transformer.resblocks.0.attn.in_proj_weight q"],
    ),
    "depth-wise convolutions": (
        "clip_convnext",
        lora(RANK, "*.0.conv_dw.weight"),
        ["PEFT's LoRA of a grouped convolution is another than ours: visual.trunk.stages.0.blocks.0.conv_dw.weight, "],
    ),
    "a linear that is not called": ("siglip", lora(RANK, "@text.proj"), [f"{IDLE} text.text_projection.weight: "]),
    "linears given to a function": ("clip_resnet", lora(RANK, "@vision.pool"), [f"{IDLE} visual.attnpool.k_proj"]),
    "a prompt": ("clip_vit", PROMPT, ["PEFT cannot hold what this policy adds: prompt"]),
    "an adapter": ("clip_vit", ADAPTER, ["PEFT cannot hold what this policy adds: adapter"]),
    "a head": ("clip_vit", HEAD, ["PEFT cannot hold what this policy adds: head"]),
    "what trains of the model": (
        "clip_vit",
        lora(RANK) + rule("@logit_scale", "train = true"),
        [f"{CHANGED}: logit_scale"],
    ),
    "what the policy set": (
        "clip_vit",
        lora(RANK) + rule("visual.ln_post.weight", 'init = "zeros"'),
        [f"{CHANGED}: visual.ln_post.weight"],
    ),
    "everything at once": (
        "coca",
        lora(RANK, "@{vision,text}")
        + lora(DORA, "text.transformer.resblocks.0.attn.*")
        + rule("@logit_scale", "train = true")
        + ADAPTER
        + PROMPT
        + HEAD,
        [BARE, SEPARATE, DORA_ATTENTION, CHANGED, *(f"policy adds: {kind}" for kind in ("adapter", "prompt", "head"))],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_all_that_peft_cannot_hold_is_named_at_once_and_the_policy_stays(build, tmp_path, case):
    family, rules, expected = REFUSED[case]
    loaded = build(family)
    applied = apply(planned(loaded.model, tmp_path, rules + SGD), loaded.model, tokenizer=loaded.tokenizer)
    applied.activate("mine")  # from now on each addition has a strength of its own to compare
    before, state = picture(loaded.model), weights(loaded.model)
    with pytest.raises(ExportError) as refused:
        write_peft(applied, loaded, tmp_path / "out")
    assert len(refused.value.problems) == len(expected)
    assert all(what in str(refused.value) for what in expected), str(refused.value)
    assert all(problem.fix for problem in refused.value.problems)
    assert picture(loaded.model) == before
    assert_same(weights(loaded.model), state)
    assert applied.trainable()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "mine.toml"}


def test_a_folder_with_something_in_it_is_refused_and_the_policy_stays(adapted, tmp_path):
    applied, loaded, _ = adapted(lora(RANK))
    expected = encoded(loaded.model)
    with pytest.raises(DataError, match="base is not empty"):
        write_peft(applied, loaded, tmp_path / "base")
    assert {path.name for path in (tmp_path / "base").iterdir()} == {"open_clip_config.json"}
    assert all(map(torch.equal, encoded(loaded.model), expected))


@pytest.fixture
def two(build, tmp_path):
    """A model with two policies on it, of which the first is at work."""
    loaded = build()
    base = copy.deepcopy(loaded.model)
    second = copy.deepcopy(base)
    stir(apply(planned(second, tmp_path, lora(RANK) + SGD), second), seed=8).save(tmp_path / "second")
    applied = stir(apply(planned(loaded.model, tmp_path, lora(ALL) + SGD), loaded.model))
    applied.add(tmp_path / "second", "second")
    return applied, loaded, base


def test_several_policies_at_work_are_refused(two, tmp_path):
    applied, loaded, _ = two
    applied.activate("mine", second=0.5)
    with pytest.raises(ExportError, match="several policies are at work"):
        write_peft(applied, loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_policy_beside_it_that_is_off_is_not_in_the_folder(two, tmp_path):
    assert_peft_says_the_same(*two, tmp_path / "out")


@pytest.mark.parametrize(("action", "said"), [("merge", "is merged"), ("remove", "was removed")])
def test_a_policy_that_is_merged_or_removed_is_refused(adapted, tmp_path, action, said):
    applied, loaded, _ = adapted(lora(RANK))
    getattr(applied, action)()
    with pytest.raises(ApplyError, match=said):
        write_peft(applied, loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_peft_the_error_says_how_to_get_it(adapted, tmp_path, monkeypatch):
    applied, loaded, _ = adapted(lora(RANK))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExportError, match=r"proved with PEFT\n  fix: pip install peft"):
        write_peft(applied, loaded, tmp_path / "out")
    assert applied.trainable()


MLP = ", targets = 'fc1'"
NOTES = {
    "nothing to know": (lora(f"{RANK}{MLP}"), False, []),
    "one dropout": (lora(f"{RANK}, dropout = 0.1{MLP}"), False, []),
    "several dropouts": (
        lora(f"{RANK}, dropout = 0.1{MLP}") + lora(f"{RANK}, dropout = 0.3", "visual.conv1.weight"),
        False,
        ["PEFT has one dropout for all modules: 0.3, the largest here"],
    ),
    "an embedding has none": (
        lora(f"{RANK}, dropout = 0.1{MLP}") + lora(RANK, "token_embedding.weight"),
        False,
        [],
    ),
    "dropout in attention": (
        lora(f"{RANK}, dropout = 0.1", "@blocks.attn.v"),
        False,
        ["PEFT's attention applies no dropout: to train on with it is not the same"],
    ),
    "out_proj": (
        lora(RANK, "@blocks.attn.out"),
        False,
        [f"PEFT {peft.__version__} adds the factors of an out_proj 2 times: they are stored smaller"],
    ),
    "random weights": (lora(f"{RANK}{MLP}"), True, ["the base {} has random weights, which the line below draws anew"]),
}


@pytest.mark.parametrize("case", NOTES)
def test_notes_say_what_features_do_not_show(adapted, case):
    rules, random, expected = NOTES[case]
    applied, loaded, _ = adapted(rules)
    notes = list(peft_notes(applied.plan.sites, replace(loaded, random=random)))
    assert len(notes) == len(expected)
    assert all(note.startswith(start.format(loaded.name)) for note, start in zip(notes, expected, strict=True))


def test_the_largest_dropout_is_in_the_folder(adapted, tmp_path):
    rules, _, _ = NOTES["several dropouts"]
    applied, loaded, _ = adapted(rules)
    write_peft(applied, loaded, tmp_path / "out")
    assert config_in(tmp_path / "out")["lora_dropout"] == 0.3
