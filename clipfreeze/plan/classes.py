"""The classes that an action speaks of."""

from __future__ import annotations

from clipfreeze.plan.sites import SiteError


def class_names(said: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names themselves; of `imagenet` all thousand of open_clip, in order, two of which stand there twice.

    Raises SiteError for `data`, which a run puts the captions of its data in place of.
    """
    if isinstance(said, tuple):
        return said
    if said == "imagenet":
        import open_clip

        return tuple(open_clip.IMAGENET_CLASSNAMES)
    assert said == "data", "files are read with the policy"
    raise SiteError(
        'classes = "data" are known once there are data: the classes, or distinct captions, that a run trains on',
        "`clipfreeze train` with this policy, or classes = names, a file of one a line, or imagenet",
    )
