"""Where prompts go: which towers take them, and how long and deep they may be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from clipfreeze.anatomy.parts import Anatomy, Tokens, Tower
from clipfreeze.plan.classes import class_names
from clipfreeze.plan.sites import AddedParameter, PromptSite, Site, SiteError
from clipfreeze.policy.actions import Prompt


def place_prompts(anatomy: Anatomy, matched: Collection[int], spec: Prompt) -> list[PromptSite]:
    """A site for each tower that has one of the matched parameters.

    Raises SiteError for a tower that takes no prompt, for what only the other tower can have, and for a prompt that is
    longer than the context or deeper than the blocks.
    """
    found = {anatomy.parameters[index].tower for index in matched}
    towers = [tower for tower in anatomy.towers if tower.name in found]
    if not towers:
        first = anatomy.parameters[min(matched)].name
        raise SiteError(f"prompt on {first}, which is in no tower", 'match = "@text", or "@vision"')
    return [_site(anatomy, tower, spec, alone=len(towers) == 1) for tower in towers]


def couple_problems(sites: Sequence[Site]) -> Iterator[tuple[PromptSite, SiteError]]:
    """The vision prompts that are to be a map of a text prompt that is not there, or not alike."""
    prompts = {site.path: site for site in sites if isinstance(site, PromptSite)}
    for site in prompts.values():
        if site.tower != "vision" or not site.spec.couple:
            continue
        text = prompts.get(partner(site))
        if text is None:
            what = "couple = true, but this policy adds no text prompt that the vision prompt could be a map of"
            yield site, SiteError(what, 'add a rule: match = "@text", prompt = { ... } of the same length and depth')
        elif text.spec.class_specific:
            what = "couple = true with a class_specific text prompt: an image's class is not known"
            yield site, SiteError(what, "take one of them out")
        else:
            for name in ("length", "depth"):
                own, other = getattr(site.spec, name), getattr(text.spec, name)
                if own != other:
                    what = f"couple = true: this prompt has {name} {own}, the text prompt {other}"
                    yield site, SiteError(what, f"{name} = {other} here, or {own} there")


def partner(site: PromptSite) -> str:
    """Path of the text prompt that a coupled vision prompt is a map of."""
    return site.path.rpartition(".")[0] + ".text"


def _site(anatomy: Anatomy, tower: Tower, spec: Prompt, *, alone: bool) -> PromptSite:
    if isinstance(tower.tokens, str):
        what = f"prompt on {tower.name}: the {tower.name} tower of {anatomy.model} {tower.tokens}"
        other = "text" if tower.name == "vision" else "vision"
        raise SiteError(what, f'match = "@{other}"')
    if spec.depth > len(tower.blocks):
        what = f"prompt depth {spec.depth}: the {tower.name} tower of {anatomy.model} has {len(tower.blocks)} blocks"
        raise SiteError(what, f"depth = {len(tower.blocks)} or less")
    width = tower.tokens.width
    classes: tuple[str, ...] = ()
    shape = (spec.depth, spec.length, width)
    added = [AddedParameter(name="vectors", shape=shape)]
    if tower.name == "text":
        _check_text(anatomy, tower.tokens, spec, alone)
        if spec.class_specific and spec.classes is not None:
            classes = tuple(dict.fromkeys(class_names(spec.classes)))
            added = [AddedParameter(name="vectors", shape=(len(classes), *shape[1:]))]
    else:
        _check_vision(spec, alone)
        if spec.couple:
            text = anatomy.tower("text").tokens
            assert isinstance(text, Tokens), "a prompt in it is asked for first"
            added = [
                AddedParameter(name="map.weight", shape=(spec.depth, width, text.width)),
                AddedParameter(name="map.bias", shape=(spec.depth, width), bias=True),
            ]
    return PromptSite(
        path=f"prompt.{tower.name}",
        of=f"the {tower.name} tower",
        tower=tower.name,
        added=tuple(added),
        width=width,
        classes=classes,
        spec=spec,
    )


def _check_text(anatomy: Anatomy, tokens: Tokens, spec: Prompt, alone: bool) -> None:
    if spec.couple and alone:
        what = "couple = true on text: it is the vision prompt that is a map of the text prompt"
        raise SiteError(what, 'match = "@vision", beside a rule with match = "@text"')
    if tokens.context is None:
        return
    largest = tokens.context - tokens.first - 2  # one word, and the end of the text
    if spec.length > largest:
        what = f"prompt length {spec.length} does not fit the context of {anatomy.model}, {tokens.context} tokens"
        raise SiteError(what, f"length = {largest} or less")


def _check_vision(spec: Prompt, alone: bool) -> None:
    for setting, plain in (("init", "random"), ("position", "front"), ("class_specific", False)):
        said = getattr(spec, setting)
        if said == plain or (spec.couple and not alone and setting != "class_specific"):
            continue  # said to the text tower, which the same rule matches
        what = f"prompt on vision: {setting} = {str(said).lower() if said is True else repr(said)} is for texts"
        fix = f"take {setting} out" if alone else 'give text and vision a rule each: match = "@text", match = "@vision"'
        raise SiteError(what, fix)
