"""A file as CLIP-LoRA's code writes it (loralib/utils.py, lora.py): features are those of W + alpha / sqrt(r) B A."""

import copy

import pytest
import torch
from by_hand import assert_near
from life import assert_same, features, made, picture, weights

import clipfreeze
from clipfreeze.errors import ApplyError

import tiny

WIDTH = 32
PARAMS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}


def encoded(model):
    with torch.no_grad():
        return features(model.eval())


def saved(count, params="qkv", encoder="both", position="all", r=2, alpha=3):
    """Random factors of so many layers, each a fourth of what a trained weight could be."""
    noise = torch.Generator().manual_seed(7)

    def pair():
        shapes = {"w_lora_A": (r, WIDTH), "w_lora_B": (WIDTH, r)}
        return {name: torch.randn(shape, generator=noise) / 4 for name, shape in shapes.items()}

    layers = {f"layer_{number}": {PARAMS[param]: pair() for param in params} for number in range(count)}
    metadata = {"r": r, "alpha": alpha, "encoder": encoder, "params": list(params), "position": position}
    return {"weights": layers, "metadata": metadata}


def written_by_hand(model, file, blocks):
    """The plain model with each layer of the file, in order, in the attention of each (tower, number of block)."""
    model = copy.deepcopy(model)
    scale = file["metadata"]["alpha"] / file["metadata"]["r"] ** 0.5
    towers = {"text": model.transformer, "vision": model.visual.transformer}
    assert len(blocks) == len(file["weights"])
    with torch.no_grad():
        for (tower, number), layer in zip(blocks, file["weights"].values(), strict=True):
            attention = towers[tower].resblocks[number].attn
            q, k, v = attention.in_proj_weight.chunk(3)
            matrices = {"q_proj": q, "k_proj": k, "v_proj": v, "proj": attention.out_proj.weight}
            for name, pair in layer.items():
                matrices[name] += scale * pair["w_lora_B"] @ pair["w_lora_A"]
    return model


def base(vision=3, text=3):
    torch.manual_seed(0)
    return tiny.lively(tiny.clip_vit({"layers": vision}, {"layers": text})).eval()


@pytest.fixture
def write(tmp_path):
    """Saves a file as CLIP-LoRA does."""

    def to_disk(content):
        torch.save(content, tmp_path / "lora_weights.pt")
        return tmp_path / "lora_weights.pt"

    return to_disk


def assert_equal_by_hand(model, path, file, blocks):
    expected, plain = encoded(written_by_hand(model, file, blocks)), encoded(model)
    applied = clipfreeze.load(path, model)
    for ours, hand in zip(encoded(model), expected, strict=True):
        assert_near(ours, hand, 1e-5)
    assert not all(map(torch.allclose, expected, plain))
    return applied


def both(text, vision):
    return [*(("text", number) for number in text), *(("vision", number) for number in vision)]


@pytest.mark.parametrize("params", ["q", "v", "o", "qkv", "qkvo"])
def test_features_are_those_of_weights_written_by_hand(write, params):
    file = saved(6, params)
    assert_equal_by_hand(base(), write(file), file, both(range(3), range(3)))


@pytest.mark.parametrize(("r", "alpha"), [(1, 1), (4, 1), (4, 2.5), (40, 3)])
def test_the_scale_is_alpha_over_the_root_of_the_rank(write, r, alpha):
    file = saved(6, r=r, alpha=alpha)
    assert_equal_by_hand(base(), write(file), file, both(range(3), range(3)))


@pytest.mark.parametrize(("encoder", "blocks"), [("text", both(range(3), [])), ("vision", both([], range(3)))])
def test_one_tower_is_adapted_and_the_other_stays(write, encoder, blocks):
    model, file = base(), saved(3, encoder=encoder)
    plain = encoded(model)
    assert_equal_by_hand(model, write(file), file, blocks)
    other = 0 if encoder == "text" else 1
    assert torch.equal(encoded(model)[other], plain[other])


TABLE = {
    "bottom": range(4),
    "mid": range(4, 8),
    "up": range(8, 12),
    "half-up": range(6, 12),
    "half-bottom": range(6),
    "top3": range(9, 12),
    "all": range(12),
}


@pytest.mark.parametrize("position", TABLE)
def test_positions_are_those_of_its_table(write, position):
    file = saved(2 * len(TABLE[position]), position=position)
    assert_equal_by_hand(base(12, 12), write(file), file, both(TABLE[position], TABLE[position]))


@pytest.mark.parametrize(
    ("encoder", "position", "blocks"),
    [
        ("text", "top1", both([11], [])),
        ("text", "top2", both([10, 11], [])),
        ("vision", "top", both([], [11])),
    ],
)
def test_positions_of_one_tower_are_those_of_its_table(write, encoder, position, blocks):
    file = saved(len(blocks), encoder=encoder, position=position)
    assert_equal_by_hand(base(12, 12), write(file), file, blocks)


@pytest.mark.parametrize(
    ("position", "text", "vision"),
    [("all", 12, range(21)), ("all", 12, range(24)), ("up", 4, range(8, 12))],
    ids=["its table", "all there are", "up"],
)
def test_a_vision_tower_of_24_blocks_has_all_or_what_its_table_says(write, position, text, vision):
    """CLIP-LoRA's table for ViT-L/14 leaves the last three out."""
    file = saved(text + len(vision), position=position)
    assert_equal_by_hand(base(24, 12), write(file), file, both(TABLE[position], vision))


def test_the_same_towers_under_other_names_take_it(write):
    path = write(file := saved(6, "qkvo"))
    torch.manual_seed(0)
    custom = tiny.lively(made("custom_text")).eval()
    clip = base()
    clip.visual.load_state_dict(custom.visual.state_dict())
    clip.load_state_dict(custom.text.state_dict(), strict=False)
    assert_equal_by_hand(clip, path, file, both(range(3), range(3)))
    clipfreeze.load(path, custom)
    assert all(map(torch.equal, encoded(custom), encoded(clip)))


def test_what_was_read_can_be_saved_and_loaded_as_ours(write, tmp_path):
    file = saved(6, "qkvo")
    model, again = base(), base()
    assert_equal_by_hand(model, write(file), file, both(range(3), range(3))).save(tmp_path / "ours")
    clipfreeze.load(tmp_path / "ours", again)
    assert all(map(torch.equal, encoded(again), encoded(model)))


def test_the_plan_says_its_rank_and_scale(write):
    plan = clipfreeze.load(write(saved(6)), base()).plan
    assert plan.policy.name == "lora_weights"
    assert {(site.spec.variant, site.spec.rank, site.spec.scaling) for site in plan.sites} == {
        ("rslora", 2, 3 / 2**0.5)
    }
    assert {parameter.origin for parameter in plan.trainable} == {"lora"}


def assert_refused(path, model, said):
    """Errors at the file, and a model as it was."""
    before, state = picture(model), weights(model)
    with pytest.raises(ApplyError, match=said) as refused:
        clipfreeze.load(path, model)
    assert {problem.path for problem in refused.value.problems} == {str(path)}
    assert picture(model) == before
    assert_same(weights(model), state)
    return refused.value.problems


@pytest.mark.parametrize("count", [0, 5, 7])
def test_another_number_of_layers_is_refused(write, count):
    said = f"{count} layers for encoder 'both' and position 'all', the model has 3 vision and 3 text blocks"
    assert_refused(write(saved(count)), base(), said)


def test_a_position_that_the_model_has_no_blocks_for_is_refused(write):
    assert_refused(write(saved(8, position="mid")), base(), "8 layers for encoder 'both' and position 'mid'")


@pytest.mark.parametrize("key", ["r", "alpha", "encoder", "position"])
def test_metadata_without_what_is_needed_are_refused(write, key):
    file = saved(6)
    del file["metadata"][key]
    assert_refused(write(file), base(), f"its metadata are not CLIP-LoRA's: '{key}'")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("r", "2", "rank: Input should be a valid integer"),
        ("r", 0, "rank: Input should be greater than or equal to 1"),
        ("alpha", -1, "alpha: Input should be greater than 0"),
        ("alpha", "much", "could not convert string to float"),
        ("encoder", "audio", "'audio'"),
        ("position", "below", "'below'"),
        ("position", ["up"], "unhashable"),
    ],
)
def test_metadata_that_are_not_its_own_are_refused(write, key, value, said):
    file = saved(6)
    file["metadata"][key] = value
    assert_refused(write(file), base(), f"its metadata are not CLIP-LoRA's: .*{said}")


CONTENTS = {
    "a state dict": lambda: base().state_dict(),
    "no metadata": lambda: {"weights": saved(6)["weights"]},
    "no weights": lambda: {"metadata": saved(6)["metadata"]},
    "metadata in a list": lambda: {**saved(6), "metadata": [2, 3]},
    "a list": lambda: [saved(6)],
}


@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_of_something_else_is_refused(write, case):
    assert_refused(write(CONTENTS[case]()), base(), "is no file of CLIP-LoRA: that has weights and metadata")


def transposed(pair):
    return {name: factor.T for name, factor in pair.items()}


def wider(pair):
    return {name: torch.ones(48, 2) if name == "w_lora_B" else factor for name, factor in pair.items()}


def of_another_rank(pair):
    return {"w_lora_A": torch.ones(3, WIDTH), "w_lora_B": torch.ones(WIDTH, 3)}


def halved(pair):
    return {"w_lora_A": pair["w_lora_A"]}


PAIRS = {
    "transposed": (transposed, r"factors of \(32, 2\) and \(2, 32\), .*\.in_proj_weight has \(2, 32\) and \(32, 2\)"),
    "wider": (wider, r"factors of \(2, 32\) and \(48, 2\), .* has \(2, 32\) and \(32, 2\)"),
    "another rank": (of_another_rank, r"factors of \(3, 32\) and \(32, 3\), .* has \(2, 32\) and \(32, 2\)"),
    "A alone": (halved, "has no w_lora_A and w_lora_B"),
    "no table": (lambda _: torch.ones(2), "has no w_lora_A and w_lora_B"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_factors_that_do_not_fit_are_named(write, case):
    change, said = PAIRS[case]
    file = saved(6)
    layer = file["weights"]["layer_4"]
    layer["v_proj"] = change(layer["v_proj"])
    [problem] = assert_refused(write(file), base(), said)
    assert problem.what.startswith("layer_4.v_proj, vision block 1: ")


def test_all_factors_that_do_not_fit_are_named_at_once(write):
    torch.manual_seed(0)
    wide = tiny.clip_vit(text={"width": 64})
    problems = assert_refused(write(saved(6)), wide, r"layer_0.q_proj, text block 0: .* has \(2, 64\) and \(64, 2\)")
    assert len(problems) == 9


def test_a_product_that_attention_does_not_have_is_named(write):
    file = saved(6)
    file["weights"]["layer_0"]["c_fc"] = file["weights"]["layer_0"].pop("q_proj")
    assert_refused(write(file), base(), "layer_0.c_fc, text block 0: this model has no such product there")


def test_a_layer_under_another_name_is_not_passed_over(write):
    file = saved(6)
    file["weights"]["layer_6"] = file["weights"].pop("layer_2")
    assert_refused(write(file), base(), "layer_2, text block 2: is missing")


def test_a_file_without_factors_is_refused(write):
    assert_refused(write(saved(6, params="")), base(), "no factors in it")


def test_a_tower_without_attention_is_refused(write):
    torch.manual_seed(0)
    said = "layer_3.q_proj, vision block 0: this model has no such product there"
    assert_refused(write(saved(7)), made("clip_resnet"), said)


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_with_code_in_it_is_refused_and_does_not_run(write, capsys):
    path = write({**saved(6), "more": Code()})
    assert_refused(path, base(), "cannot be read as plain tensors: Weights only load failed")
    assert "this ran" not in capsys.readouterr().out


def test_files_of_text_and_files_that_lost_bytes_are_refused(write):
    path, model = write(saved(6)), base()
    whole = path.read_bytes()
    for content in (b"", b"weights", b"\xc3\xa4", whole[:-100], whole[:200], b"\x80\x02.", b"\x80\x02h\x00."):
        path.write_bytes(content)
        assert_refused(path, model, "cannot be read as plain tensors")
