"""What is no bare open_clip model is refused, with the way out."""

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from clipfreeze.anatomy.partition import describe
from clipfreeze.errors import ModelError

import tiny


def refusal(model):
    with pytest.raises(ModelError) as caught:
        describe(model)
    [problem] = caught.value.problems
    return problem


@pytest.fixture
def model():
    return tiny.clip_vit()


def test_data_parallel_is_refused(model):
    problem = refusal(nn.DataParallel(model))
    assert problem.what == "`model` is wrapped in DataParallel"
    assert "`model.module`" in problem.fix


def test_a_compiled_model_is_refused(model):
    problem = refusal(torch.compile(model))
    assert problem.what == "`model` is wrapped in OptimizedModule"
    assert "`model._orig_mod`" in problem.fix


def test_wrappers_in_wrappers_are_seen_through(model):
    assert "`model._orig_mod.module`" in refusal(torch.compile(nn.DataParallel(model))).fix


def test_a_compiled_tower_is_refused(model):
    model.visual = torch.compile(model.visual)
    assert refusal(model).what == "`model.visual` is wrapped in OptimizedModule"


def test_a_compiled_block_is_refused(model):
    model.transformer.resblocks[1] = torch.compile(model.transformer.resblocks[1])
    assert refusal(model).what == "`model.transformer.resblocks.1` is wrapped in OptimizedModule"


def test_compiling_in_place_is_no_wrapper(model):
    model.compile()
    assert describe(model).family == "CLIP + VisionTransformer"


def test_any_other_module_is_refused():
    problem = refusal(nn.Linear(2, 2))
    assert "Linear is no open_clip model: it has no vision tower" in problem.what
    assert "open_clip.create_model" in problem.fix


def test_clip_of_transformers_is_refused():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config={**sizes, "vocab_size": 9}, vision_config={**sizes, "image_size": 32})
    assert "CLIPModel is no open_clip model" in refusal(CLIPModel(config)).what


def test_a_model_without_text_tower_is_refused():
    model = tiny.custom_text()
    del model.text
    assert "no text tower" in refusal(model).what


def test_a_tower_of_another_library_is_refused(model):
    model.visual = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    problem = refusal(model)
    assert "`visual` is a torch.nn.modules.container.Sequential" in problem.what
    assert "VisionTransformer" in problem.fix


def test_a_timm_trunk_without_blocks_is_refused():
    model = tiny.FAMILIES["clip_convnext"]()
    model.visual.trunk.stages = None
    assert "blocks of timm's ConvNeXt" in refusal(model).what


@pytest.mark.parametrize("where", ["", "visual", "transformer"])
def test_parameters_of_the_users_own_are_named(model, where):
    model.get_submodule(where).extra = nn.Parameter(torch.zeros(3))
    problem = refusal(model)
    assert f"1 parameter(s) in no part of an open_clip model: {f'{where}.extra'.lstrip('.')}" in problem.what
    assert problem.fix


def test_many_parameters_of_the_users_own_are_counted(model):
    model.heads = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    assert refusal(model).what.endswith("heads.2.weight and 3 more")
