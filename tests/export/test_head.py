"""The layer in the folder says of image features what the model says, by logits that are computed here."""

import json

import pytest
import safetensors
import torch
from life import SGD, planned
from torch.nn import functional

from clipfreeze.changes import apply
from clipfreeze.errors import ApplyError, DataError, ExportError
from clipfreeze.export.head import CONFIG, WEIGHTS, changes_vision, reload_lines, write_head

import tiny

CLASSES = ("cat", "dog", "a far too big cow")


def rule(match, *settings):
    return "\n".join(["[[rule]]", f'match = "{match}"', *settings, ""])


def head(kind="linear", init="random"):
    return rule("@vision", f'head = {{ classes = {list(CLASSES)}, kind = "{kind}", init = "{init}" }}')


PROMPT = rule("@text", "prompt = { length = 2, std = 0.5 }")
VISUAL = rule("@vision", "prompt = { length = 2, std = 0.5 }")
OWN = rule("@text", f"prompt = {{ length = 2, std = 0.5, class_specific = true, classes = {list(CLASSES)} }}")
LORA = rule("@vision.blocks", "lora = { rank = 2 }")


@pytest.fixture
def tuned(build, tmp_path):
    """Builds a model with a policy on it, all that it added being stirred as if trained."""

    def built(rules, family="clip_vit"):
        loaded = build(family)
        applied = apply(planned(loaded.model, tmp_path, rules + SGD), loaded.model, tokenizer=loaded.tokenizer)
        noise = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for _, addition in applied.additions:
                for parameter in addition.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.2)
        loaded.model.eval()
        return applied, loaded

    return built


def image_features(model):
    with torch.no_grad():
        return functional.normalize(model.encode_image(tiny.images(model)), dim=-1)


def said_by_prompt(loaded, classes):
    """Logits of the model itself, for its images and the bare names of the classes."""
    model = loaded.model
    with torch.no_grad():
        rows = functional.normalize(model.encode_text(loaded.tokenizer(list(classes))), dim=-1)
        logits = model.logit_scale.exp() * image_features(model) @ rows.T
    return logits if model.logit_bias is None else logits + model.logit_bias


def layer_in(folder):
    """As the printed lines make it."""
    layer, fill, _ = reload_lines(folder)
    names = {"torch": torch, "safetensors": safetensors}
    exec(f"{layer}\n{fill}", names)
    return names["layer"]


def assert_layer_says(logits, loaded, folder):
    with torch.no_grad():
        found = layer_in(folder)(image_features(loaded.model))
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-4)


FAMILIES = ("clip_vit", "custom_text", "clip_resnet", "siglip", "eva", "coca", "hf_text")


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_head_is_the_layer(tuned, tmp_path, family, kind):
    applied, loaded = tuned(head(kind), family)
    assert write_head(applied, loaded, tmp_path / "out") < 1e-4
    [(_, added)] = applied.additions
    rows = added.weight.detach()
    if kind == "cosine":
        rows = functional.normalize(rows, dim=-1)
    logits = loaded.model.logit_scale.detach().exp() * image_features(loaded.model) @ rows.T
    assert_layer_says(logits if added.bias is None else logits + added.bias.detach(), loaded, tmp_path / "out")


@pytest.mark.parametrize("rules", [PROMPT, PROMPT + VISUAL], ids=["text", "text and vision"])
def test_a_prompt_makes_a_layer_of_the_classes_given(tuned, tmp_path, rules):
    applied, loaded = tuned(rules)
    assert write_head(applied, loaded, tmp_path / "out", CLASSES) < 1e-4
    logits = said_by_prompt(loaded, CLASSES)
    assert_layer_says(logits, loaded, tmp_path / "out")
    with applied.disabled():
        assert not torch.allclose(said_by_prompt(loaded, CLASSES), logits, rtol=0.01)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip_vit"])
def test_a_prompt_of_every_text_tower_makes_a_layer(tuned, tmp_path, family):
    applied, loaded = tuned(PROMPT, family)
    write_head(applied, loaded, tmp_path / "out", CLASSES)
    assert_layer_says(said_by_prompt(loaded, CLASSES), loaded, tmp_path / "out")


def test_a_class_specific_prompt_makes_a_layer_of_its_own_classes(tuned, tmp_path):
    applied, loaded = tuned(OWN)
    write_head(applied, loaded, tmp_path / "out")
    assert_layer_says(said_by_prompt(loaded, CLASSES), loaded, tmp_path / "out")


def test_a_logit_bias_is_in_the_layer_of_a_prompt_and_not_in_that_of_a_head(tuned, tmp_path):
    """A sigmoid's bias is the same for all classes; a head has its own."""
    applied, loaded = tuned(PROMPT, "siglip")
    write_head(applied, loaded, tmp_path / "prompt", CLASSES)
    assert torch.equal(layer_in(tmp_path / "prompt").bias, torch.full((3,), -10.0))
    applied.remove()
    applied = apply(planned(loaded.model, tmp_path, head("cosine") + SGD), loaded.model)
    write_head(applied, loaded, tmp_path / "head")
    assert torch.equal(layer_in(tmp_path / "head").bias, torch.zeros(3))


def test_more_classes_than_are_encoded_together_stay_in_order(tuned, tmp_path):
    applied, loaded = tuned(PROMPT)
    classes = [f"{colour} {thing}" for colour in ("red", "blue", "old") for thing in map(str, range(30))]
    write_head(applied, loaded, tmp_path / "out", classes)
    assert_layer_says(said_by_prompt(loaded, classes), loaded, tmp_path / "out")


def test_a_head_beside_lora_takes_the_features_of_the_tuned_tower(tuned, tmp_path):
    applied, loaded = tuned(head() + LORA)
    write_head(applied, loaded, tmp_path / "out")
    [added] = [addition for site, addition in applied.additions if site.kind == "head"]
    with torch.no_grad():
        assert_layer_says(added(image_features(loaded.model)), loaded, tmp_path / "out")


@pytest.mark.parametrize("rules", [head(), PROMPT], ids=["head", "prompt"])
def test_the_folder_says_which_model_and_which_classes_and_has_no_pickle(tuned, tmp_path, rules):
    applied, loaded = tuned(rules)
    given = CLASSES if rules is PROMPT else None
    write_head(applied, loaded, tmp_path / "out", given)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, WEIGHTS}
    said = json.loads((tmp_path / "out" / CONFIG).read_text(encoding="utf-8"))
    assert said == {"model": loaded.name, "pretrained": None, "classes": list(CLASSES)}


def test_the_printed_lines_are_for_normalised_features(tuned, tmp_path):
    applied, loaded = tuned(head())
    write_head(applied, loaded, tmp_path / "out")
    names = {"layer": layer_in(tmp_path / "out"), "model": loaded.model, "images": tiny.images(loaded.model)}
    with torch.no_grad():
        found = eval(reload_lines(tmp_path / "out")[2], names)
        torch.testing.assert_close(found, applied.additions[0][1](image_features(loaded.model)), rtol=1e-5, atol=1e-4)


def test_the_model_keeps_its_policy_and_modes(tuned, tmp_path):
    applied, loaded = tuned(PROMPT)
    loaded.model.train()
    loaded.model.visual.eval()
    modes = [module.training for module in loaded.model.modules()]
    write_head(applied, loaded, tmp_path / "out", CLASSES)
    assert [module.training for module in loaded.model.modules()] == modes
    assert applied.trainable()


REFUSED = {
    "neither head nor prompt": (LORA, None, "no head and no text prompt"),
    "a prompt for images alone": (VISUAL, None, "no head and no text prompt"),
    "classes without head or prompt": (LORA, CLASSES, "no head and no text prompt"),
    "no classes": (PROMPT, None, "which ones the classifier shall tell apart"),
    "an empty list of classes": (PROMPT, (), "which ones the classifier shall tell apart"),
    "classes for a head": (head(), CLASSES, "knows its own 3 classes"),
    "classes for a class-specific prompt": (OWN, CLASSES, "knows its own 3 classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_classifier_is_refused_and_nothing_is_written(tuned, tmp_path, case):
    rules, classes, said = REFUSED[case]
    applied, loaded = tuned(rules)
    with pytest.raises(ExportError, match=said) as refused:
        write_head(applied, loaded, tmp_path / "out", classes)
    assert refused.value.problems[0].fix
    assert {path.name for path in tmp_path.iterdir()} == {"base", "mine.toml"}


def test_a_class_name_too_long_for_a_prompt_that_does_not_cut_is_refused(tuned, tmp_path):
    applied, loaded = tuned(rule("@text", "prompt = { length = 2, truncate = false }"))
    with pytest.raises(DataError, match="too long for a prompt"):
        write_head(applied, loaded, tmp_path / "out", ("cat", "dog " * 20))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rules", [head(), OWN], ids=["head", "prompt"])
def test_a_policy_that_was_removed_is_refused(tuned, tmp_path, rules):
    applied, loaded = tuned(rules)
    applied.remove()
    with pytest.raises(ApplyError, match="was removed"):
        write_head(applied, loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_refused(tuned, tmp_path):
    applied, loaded = tuned(head())
    with pytest.raises(DataError, match="base is not empty"):
        write_head(applied, loaded, tmp_path / "base")


@pytest.mark.parametrize(
    ("rules", "changes"),
    [
        (head(), False),
        (PROMPT, False),
        (PROMPT + rule("@text.proj", "train = true"), False),
        (PROMPT + VISUAL, True),
        (head() + LORA, True),
        (head() + rule("@vision.proj", "train = true"), True),
        (head() + rule("@vision.proj", 'init = "zeros"'), True),
    ],
    ids=["head", "prompt", "text projection", "visual prompt", "lora", "trained projection", "set projection"],
)
def test_whether_features_are_those_of_the_base_is_known(tuned, rules, changes):
    assert changes_vision(tuned(rules)[0]) is changes
