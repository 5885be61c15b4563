"""Fine-tune open_clip models by policy: which parameters learn, how fast, and what is added.

policy  = clipfreeze.load_policy("last_n", n=4)
plan    = clipfreeze.resolve(policy, model)       # print(plan) is the table
applied = clipfreeze.apply(plan, model)           # the model is still an open_clip model
optimizer = applied.optimizer()
scheduler = applied.scheduler(optimizer, total_steps=1000)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipfreeze.anatomy.partition import describe as describe
    from clipfreeze.changes import Applied as Applied
    from clipfreeze.changes import apply as apply
    from clipfreeze.changes import load as load
    from clipfreeze.errors import ClipfreezeError as ClipfreezeError
    from clipfreeze.plan.build import resolve as resolve
    from clipfreeze.plan.value import Plan as Plan
    from clipfreeze.policy.loading import Policy as Policy
    from clipfreeze.policy.loading import load_policy as load_policy
    from clipfreeze.train.loop import fit as fit

_HOMES = {
    "Applied": "changes",
    "ClipfreezeError": "errors",
    "Plan": "plan.value",
    "Policy": "policy.loading",
    "apply": "changes",
    "describe": "anatomy.partition",
    "fit": "train.loop",
    "load": "changes",
    "load_policy": "policy.loading",
    "resolve": "plan.build",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports on first use: `import clipfreeze` must not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'clipfreeze' has no attribute {name!r}")
    return getattr(import_module(f"clipfreeze.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
