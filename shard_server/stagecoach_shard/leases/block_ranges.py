"""How a shard's K/V blocks are divided among leases: each lease has one contiguous range of them."""

from __future__ import annotations

from stagecoach.errors import KVCacheFull


class BlockRanges:
    """Hands out contiguous ranges of a shard's blocks, first fit."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._used: dict[int, int] = {}  # first block -> number of blocks

    @property
    def num_free(self) -> int:
        """The most blocks that a lease can have now: the largest range that is free."""
        return self.num_free_without(None)

    def num_free_without(self, former: int | None) -> int:
        """What `num_free` would be if the range that begins at `former` were given back; None: as it is now."""
        used = sorted((first, num) for first, num in self._used.items() if first != former)
        starts = [0, *(first + num for first, num in used)]
        ends = [*(first for first, _ in used), self._num_blocks]
        return max(end - start for start, end in zip(starts, ends, strict=True))

    def allocate(self, num_blocks: int) -> int:
        """The first block of a range of `num_blocks`. Raises KVCacheFull."""
        first = 0
        for used_first in sorted(self._used):
            if used_first - first >= num_blocks:
                break
            first = used_first + self._used[used_first]
        if num_blocks < 1 or first + num_blocks > self._num_blocks:
            raise KVCacheFull.of_blocks(needed=num_blocks, free=self.num_free)
        self._used[first] = num_blocks
        return first

    def free(self, first: int) -> None:
        """Gives back the range that begins at `first`."""
        del self._used[first]
