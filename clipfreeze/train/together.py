"""Several processes that encode a set together: each row once, in its place, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from clipfreeze.errors import ClipfreezeError
from clipfreeze.train.distributed import everyones, rank, world_size


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `world` processes of torch.distributed, which all measure the same sets in the same order."""

    rank: int = 0
    world: int = 1

    def rows(self, count: int, size: int) -> list[int]:
        """Rows of this process: whole batches of `size` in turn, so that a batch is what one process alone would see
        and no digit depends on their number.
        """
        return [row for row in range(count) if row // size % self.world == self.rank]

    def together(
        self, count: int, size: int, device: torch.device, encode: Callable[[Sequence[int]], Tensor]
    ) -> Tensor:
        """(count, D): row i is what `encode` gives for it on the process that has it; the same on all processes.

        `encode` takes rows to (rows, D) on `device`, D being 0 where nothing could be encoded. Its error on one process
        is raised on all of them, so that none waits for a lost one.
        """
        own = self.rows(count, size)
        if self.world == 1:
            return encode(own)
        features, failed = torch.zeros(0, 0, device=device), None
        try:
            features = encode(own) if own else features
        except ClipfreezeError as error:
            failed = error
        said = self.told((failed, features.shape[1], features.dtype))
        if errors := [each[0] for each in said if each[0] is not None]:
            raise errors[0]
        _, width, dtype = max(said, key=lambda each: each[1])  # a process without pictures knows no width
        shares = [Shard(number, self.world).rows(count, size) for number in range(self.world)]
        longest = torch.zeros(max(map(len, shares)), width, dtype=dtype, device=device)
        longest[: len(own), : features.shape[1]] = features
        parts = [torch.empty_like(longest) for _ in shares]
        distributed.all_gather(parts, longest)
        whole = longest.new_empty(count, width)
        for rows, part in zip(shares, parts, strict=True):
            whole[rows] = part[: len(rows)]
        return whole

    def told(self, value: Any) -> list[Any]:
        """The value of each process, in their order; anything that pickles."""
        return everyones(value) if self.world > 1 else [value]


def this_shard() -> Shard:
    """Of this process among those of torch.distributed; alone where that is not running."""
    return Shard(rank(), world_size())
