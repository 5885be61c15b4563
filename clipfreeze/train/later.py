"""A number that a device is still working out."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """Sent on its way at once; `read` waits for it, and for nothing that was launched after it."""

    def __init__(self, value: Tensor) -> None:
        value = value.detach()
        self._arrived: torch.cuda.Event | None = None
        if value.device.type == "cuda":
            self._held = torch.empty_like(value, device="cpu", pin_memory=True)
            self._held.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()
        else:
            self._held = value.clone()

    def read(self) -> float:
        """As a float."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._held)
