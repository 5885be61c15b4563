"""One thread a process: tiny models gain nothing from more, and tests run side by side. No test fails by being slow.

open_clip's tokenizer reads its 48,894 merges once a process: tests load some hundred models.
"""

from typing import Any

import torch
from hypothesis import settings
from open_clip import SimpleTokenizer

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_read = SimpleTokenizer.__init__
_known: dict[str, dict[str, Any]] = {}


def _remembered(self: SimpleTokenizer, *args: Any, **kwargs: Any) -> None:
    asked = repr((args, kwargs))
    if asked not in _known:
        _read(self, *args, **kwargs)
        _known[asked] = dict(vars(self))
    vars(self).update(_known[asked])


SimpleTokenizer.__init__ = _remembered
