"""A model in, its anatomy out. Reads names, shapes and module types; runs nothing, so meta models do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from clipfreeze.anatomy.layout import Layout, Place, base_in, is_norm, places
from clipfreeze.anatomy.parts import TOWERS, Anatomy, Parameter, Tower
from clipfreeze.anatomy.slots import block_slots, pool_slots
from clipfreeze.anatomy.text import TEXT_LAYOUTS, text_name
from clipfreeze.anatomy.tokens import text_tokens, vision_tokens
from clipfreeze.anatomy.vision import VISION_LAYOUTS, vision_name
from clipfreeze.errors import ModelError

EMBEDDINGS = frozenset(
    (
        *("positional_embedding", "class_embedding", "cls_emb"),  # open_clip
        *("pos_embed", "cls_token", "reg_token", "relative_position_bias_table"),  # timm
        *("latent", "query"),  # attention pools of timm, open_clip
    )
)
"""Bare parameters that are looked up or added, not multiplied: tokens, positions, probes of attention pools."""

FACTORS = ("proj", "text_projection")
"""Bare parameters that open_clip's towers multiply by."""

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""How the only child is called of DataParallel, DistributedDataParallel and AveragedModel, torch.compile, FSDP."""

Layouts = Mapping[type[nn.Module], Callable[[nn.Module], Layout]]


def describe(model: nn.Module, name: str | None = None) -> Anatomy:
    """The anatomy of an open_clip model, real or on the meta device; `name` is what the user calls it.

    Raises ModelError for a wrapped model, one without the two towers, and parameters that are in no part.
    """
    _refuse_wrapped(model)
    found_layouts = layouts(model)
    where = _where(found_layouts)

    aliases = _aliases(model)
    owners = dict(model.named_modules())
    found = {parameter: _place(parameter, where) for parameter, _ in model.named_parameters()}
    _refuse_unplaced([parameter for parameter, place in found.items() if place is None])
    stand_ins = _stand_ins({place.role for place in found.values() if place})
    parameters = tuple(
        _parameter(parameter, tensor, place, owners[parameter.rpartition(".")[0]], stand_ins, aliases[id(tensor)][1:])
        for parameter, tensor in model.named_parameters()
        if (place := found[parameter]) is not None
    )
    return Anatomy(
        model=name or type(model).__name__,
        family=_family(model),
        parameters=parameters,
        towers=tuple(_tower(model, tower, layout) for tower, layout in found_layouts.items()),
        notes=tuple(_notes(parameters)),
    )


def find_tower(model: nn.Module, name: str) -> Tower:
    """One tower alone, "vision" or "text"; unlike `describe` it does not mind what policies added."""
    return _tower(model, name, layouts(model)[name])


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Of both towers, under names in the model; ModelError for another kind of model."""
    children = dict(model.named_children())
    found = {}
    for tower, attribute, known in (("vision", "visual", VISION_LAYOUTS), ("text", "text", TEXT_LAYOUTS)):
        if attribute in children:
            found[tower] = _layout(children[attribute], attribute, known).within(f"{attribute}.")
        elif tower == "text" and isinstance(model, tuple(known)):
            found[tower] = _layout(model, "model", known)
        else:
            raise ModelError(
                f"{type(model).__name__} is no open_clip model: it has no {tower} tower (a child named `{attribute}`)",
                "build it with open_clip.create_model(...), or open_clip.CLIP, CustomTextCLIP or CoCa by hand",
            )
    return found


def _layout(tower: nn.Module, name: str, known: Layouts) -> Layout:
    for kind, layout in known.items():
        if isinstance(tower, kind):
            return layout(tower)
    raise ModelError(
        f"`{name}` is a {type(tower).__module__}.{type(tower).__name__}, whose parts we do not know",
        "use one of open_clip's towers: " + ", ".join(kind.__name__ for kind in known),
    )


def _where(layouts: Mapping[str, Layout]) -> dict[str, Place]:
    """Every place of the model by its name."""
    named = [place for tower, layout in layouts.items() for place in places(layout, tower)]
    named += [Place("logit_scale", "logit_scale"), Place("logit_bias", "logit_bias"), Place("decoder", "text_decoder")]
    where = {place.base: place for place in named}
    assert len(where) == len(named), "a layout puts one name in two parts"
    return where


def _place(name: str, where: Mapping[str, Place]) -> Place | None:
    """The place of the longest name in `where` that is `name` or a module around it, so never more than one."""
    base = base_in(name, where)
    return None if base is None else where[base]


def _parameter(
    name: str, tensor: Tensor, place: Place, owner: nn.Module, stand_ins: frozenset[str], aliases: tuple[str, ...]
) -> Parameter:
    inside = name.removeprefix(place.base).removeprefix(".")
    kind: str | None = None
    slots: tuple[str, ...] = ()
    if place.role.endswith(".blocks"):
        kind, slots = block_slots(inside)
    elif place.role.endswith(".pool") and name.rpartition(".")[2] not in EMBEDDINGS:  # a learned query is no q
        slots = pool_slots(inside)
    elif place.role == "decoder":
        _, slots = block_slots(inside.split(".", 2)[-1])  # resblocks.0.attn... and cross_attn.0.attn...
    tags = set(_tags(name.rpartition(".")[2], tensor, owner, place))
    if kind:
        tags.add(kind)
    if place.role.endswith(".proj") or place.role in stand_ins:
        tags.add("projections")
    return Parameter(
        name=name,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        role=place.role,
        block=place.block,
        stage=place.stage,
        tags=frozenset(tags),
        slots=slots,
        fixed=place.role.endswith(".embed") and _is_fixed(tensor, owner),
        aliases=aliases,
        product=_product(name.rpartition(".")[2], tensor, owner, slots),
    )


def _product(
    leaf: str, tensor: Tensor, owner: nn.Module, slots: tuple[str, ...]
) -> Literal["linear", "conv", "factor", "embedding"] | None:
    """How the model multiplies by the tensor. A convolution that works its weight over first is none of these."""
    if tensor.ndim < 2:
        return None
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, nn.modules.conv._ConvNd):
        plain = type(owner).forward is nn.Conv2d.forward and owner.padding_mode == "zeros"
        return "conv" if plain else None
    if isinstance(owner, nn.Linear) or slots:
        return "linear"
    return "factor" if leaf in FACTORS else None


def _tags(leaf: str, tensor: Tensor, owner: nn.Module, place: Place) -> Iterator[str]:
    """What the tensor is by itself, of norms, biases, embeddings and scales. The root scalars are none of these."""
    if place.role in ("logit_scale", "logit_bias"):
        return
    norm = is_norm(owner)
    bias = leaf == "bias" or leaf.endswith("_bias")
    embedding = isinstance(owner, nn.Embedding) or leaf in EMBEDDINGS
    if norm:
        yield "norms"
    if bias:
        yield "biases"
    if embedding:
        yield "embeddings"
    vector = sum(length > 1 for length in tensor.shape) <= 1
    product = isinstance(owner, (nn.Linear, nn.modules.conv._ConvNd))
    if vector and not (norm or bias or embedding or product) and not place.role.endswith(".proj"):
        yield "scales"


def _is_fixed(tensor: Tensor, owner: nn.Module) -> bool:
    """Is it a sin-cos position embedding, which the model never trains, and not merely locked by the user?

    Sines and cosines come in pairs, so the squares of a row add up to half its length (the class token's row is zero);
    resizing to another grid changes that little. A tensor without data is judged by whether its neighbours train.
    """
    if tensor.requires_grad or tensor.ndim < 2:
        return False
    if tensor.is_meta:
        return any(parameter.requires_grad for parameter in owner.parameters())
    energy = tensor.detach().flatten(0, -2).float().square().sum(-1) * 2 / tensor.shape[-1]
    return bool((((energy - 1).abs() < 0.1) | (energy == 0)).all()) and bool(energy.any())


def _stand_ins(roles: set[str]) -> frozenset[str]:
    """The pools of towers without projection, which are projections instead."""
    return frozenset(f"{tower}.pool" for tower in TOWERS if f"{tower}.proj" not in roles) & roles


def _aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of each tensor, by its id; the first is the one that `named_parameters()` gives."""
    names: defaultdict[int, tuple[str, ...]] = defaultdict(tuple)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names[id(tensor)] += (name,)
    return names


def _tower(model: nn.Module, name: str, layout: Layout) -> Tower:
    stages = tuple(block.stage for block in layout.blocks if block.stage is not None)
    tokens = text_tokens(model) if name == "text" else vision_tokens(model.get_submodule("visual"))
    return Tower(name, tuple(block.name for block in layout.blocks), stages, tokens)


def _family(model: nn.Module) -> str:
    children = dict(model.named_children())
    names = [type(model).__name__, vision_name(children["visual"]), text_name(children.get("text", model))]
    return " + ".join(filter(None, names))


def _notes(parameters: Iterable[Parameter]) -> Iterator[str]:
    roles = {parameter.role for parameter in parameters}
    for tower in TOWERS:
        if f"{tower}.proj" not in roles:
            pool = f"{tower}.pool" in roles
            stand_in = "its pool stands in for it" if pool else "nothing stands in for it"
            yield f"{tower} has no projection: {stand_in} in @projections"
    if "decoder" in roles:
        yield "the contrastive loss does not reach the decoder"
    for parameter in parameters:
        if parameter.fixed:
            yield f"{parameter.name} is a fixed sin-cos embedding: no policy trains it"
        if parameter.aliases:
            yield f"{parameter.name} is tied: the same tensor as {', '.join(parameter.aliases)}"


def _refuse_wrapped(model: nn.Module) -> None:
    """Names inside a wrapper are not those of the bare model, so no pattern would fit."""
    for path, module in model.named_modules(prefix="model"):
        bare, inner = path, module
        while (names := [name for name, _ in inner.named_children()]) and names[0] in WRAPPERS and len(names) == 1:
            bare, inner = f"{bare}.{names[0]}", inner.get_submodule(names[0])
        if inner is not module:
            raise ModelError(
                f"`{path}` is wrapped in {type(module).__name__}",
                f"apply the policy to the bare model first (here `{bare}`), then wrap it",
            )


def _refuse_unplaced(names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ModelError(
            f"{len(names)} parameter(s) in no part of an open_clip model: {shown}",
            "apply the policy before adding modules of your own, and train those with your own param group",
        )
