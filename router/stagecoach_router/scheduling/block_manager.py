"""Which K/V blocks belong to which sequence, and the prefix cache. Pure: the memory itself is on the shards.

All stages of a pipeline use the same block ids, so one table decides for all of them. A block is in one of three
states: held by one or more sequences, idle (nobody's, but its content is known and can be shared again), or unused.

Layers that need different blocks (sliding-window layers beside global ones, or none at all): one pool and one table
per group of layers. Held, idle and unused then are per pool; a prefix counts as found up to where every group still
has what it needs of it (a window group: its last `window` positions); the digests here are of tokens, so all groups
share them. Only this file and the scheduler's block_table_updates would have to know.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from hashlib import blake2b

from stagecoach_router.scheduling.sequence import Sequence

DIGEST_BYTES = 32


class BlockManager:
    """Block tables and prefix cache over block ids 0 .. num_blocks - 1 of `block_size` positions each.

    A full block is known by the digest of its tokens and all tokens before it. Digests are 256 bits of BLAKE2b, so
    that equal digests mean equal tokens even where someone looks for collisions. A block that is in the prefix cache
    is never written again. Eviction takes the idle block that was let go longest ago, and of a chain the last block
    first: no block outlives one that it can only be found through. Every operation costs as much as the blocks it adds
    or lets go.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1, num_blocks
        assert block_size >= 1, block_size
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Rises whenever blocks come free: until it has risen, an allocation that failed fails again.
        self.num_releases = 0
        self._forget_everything()

    def _forget_everything(self) -> None:
        # These know the blocks up to the highest that was ever taken. So many blocks as there are cost nothing: how
        # many that is, a shard says.
        self._num_holders: list[int] = []
        self._digest_of: list[bytes | None] = []
        self._block_of: dict[bytes, int] = {}
        self._unused: list[int] = []  # those that came back without content; the last one is taken first
        self._idle: OrderedDict[int, None] = OrderedDict()  # the first one is evicted first

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds: those never taken, unused ones, and idle ones that can be evicted."""
        return self.num_blocks - len(self._num_holders) + len(self._unused) + len(self._idle)

    @property
    def capacity_tokens(self) -> int:
        """Positions that all blocks together hold."""
        return self.num_blocks * self.block_size

    def allocate(self, sequence: Sequence, reserve: int = 0) -> bool:
        """Gives an empty table blocks for the whole token log, the leading ones from the prefix cache if it has them.

        Afterwards the first `num_committed * block_size` positions need not be computed. That is never the whole
        log: the last token's logits are wanted, and shared blocks are not written. False, and nothing is changed,
        if that would leave fewer than `reserve` blocks free.
        """
        assert not sequence.block_ids, sequence
        hits = self._find_prefix(sequence)
        num_new = self._num_blocks_for(sequence.num_tokens) - len(hits)
        num_idle_hits = sum(not self._num_holders[block] for block in hits)
        if num_new + num_idle_hits + reserve > self.num_free:
            return False
        for block in hits:
            if not self._num_holders[block]:
                del self._idle[block]
            self._num_holders[block] += 1
        # Only now that the hits are held: taking new blocks may evict idle ones.
        sequence.block_ids = hits + [self._take() for _ in range(num_new)]
        sequence.num_committed = len(hits)
        return True

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """Leading positions of an empty table's log that the prefix cache has now."""
        return len(self._find_prefix(sequence)) * self.block_size

    def extend(self, sequence: Sequence, num_positions: int) -> bool:
        """Grows a table until it covers `num_positions`. False, and nothing is changed, if there are too few blocks."""
        if num_positions <= len(sequence.block_ids) * self.block_size:
            return True
        num_new = self._num_blocks_for(num_positions) - len(sequence.block_ids)
        if num_new > self.num_free:
            return False
        for _ in range(num_new):
            sequence.block_ids.append(self._take())
        return True

    def commit(self, sequence: Sequence, num_positions: int) -> None:
        """Puts the full blocks among the first `num_positions` into the prefix cache.

        Those positions have to be on their way to the shards, and must never be written again.
        """
        for index in range(sequence.num_committed, num_positions // self.block_size):
            block, digest = sequence.block_ids[index], self._digest(sequence, index)
            twin = self._block_of.get(digest)
            if twin is None:
                self._enter(block, digest)
            elif twin in self._idle:
                # Computed anew, as the last block of a prompt is. The one that is held stays, since what will be
                # found through it is held as well.
                del self._idle[twin]
                self._digest_of[twin] = None
                self._unused.append(twin)
                self._enter(block, digest)
            # Else two sequences compute the same tokens at the same time: the later block stays out of the cache.
            sequence.num_committed = index + 1

    def release(self, sequence: Sequence) -> None:
        """Lets go of a table. Blocks in the prefix cache that nobody else holds become idle, the others unused."""
        # Last block first: a block can be found only through those before it, so the last one is worth the least.
        for index in range(len(sequence.block_ids) - 1, -1, -1):
            block = sequence.block_ids[index]
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            if self._digest_of[block] is None and index < sequence.num_committed:
                self._let_go_of_twin(block, sequence.digests[index])
            elif self._digest_of[block] is None:
                self._unused.append(block)
            else:
                self._idle[block] = None
        sequence.block_ids = []
        sequence.num_committed = 0
        self.num_releases += 1

    def reset(self, num_blocks: int | None = None) -> None:
        """The shards' memory is gone: forgets what all blocks hold. No sequence may hold any.

        `num_blocks`: how many there are from now on; None: as many as before.
        """
        assert self.num_free == self.num_blocks, f"{self.num_blocks - self.num_free} blocks are held"
        self.num_blocks = self.num_blocks if num_blocks is None else num_blocks
        self._forget_everything()
        self.num_releases += 1

    def _num_blocks_for(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        hits: list[int] = []
        for index in range((sequence.num_tokens - 1) // self.block_size):
            block = self._block_of.get(self._digest(sequence, index))
            if block is None:
                break
            hits.append(block)
        return hits

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        """The digest of the log up to the end of block `index`, which must be full. Kept: each block is hashed once."""
        digests = sequence.digests
        while len(digests) <= index:
            start = len(digests) * self.block_size
            parent = digests[-1] if digests else _salt_digest(sequence.cache_salt)
            tokens = array("I", sequence.tokens(start, start + self.block_size))
            digests.append(blake2b(parent + tokens.tobytes(), digest_size=DIGEST_BYTES).digest())
        return digests[index]

    def _enter(self, block: int, digest: bytes) -> None:
        self._block_of[digest] = block
        self._digest_of[block] = digest

    def _let_go_of_twin(self, block: int, digest: bytes) -> None:
        """Lets go of a block that holds the same as one in the cache did when it was committed."""
        twin = self._block_of.get(digest)
        if twin is None:  # evicted meanwhile, unlike what comes after it here
            self._enter(block, digest)
            self._idle[block] = None
            return
        self._unused.append(block)
        if twin in self._idle:
            self._idle.move_to_end(twin)

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        elif len(self._num_holders) < self.num_blocks:
            block = len(self._num_holders)
            self._num_holders.append(0)
            self._digest_of.append(None)
        else:
            block, _ = self._idle.popitem(last=False)
            digest = self._digest_of[block]
            assert digest is not None, block
            del self._block_of[digest]
            self._digest_of[block] = None
        self._num_holders[block] = 1
        return block


def _salt_digest(salt: bytes) -> bytes:
    # Personalised, so that no salt, whatever its bytes, stands for some other sequence's tokens.
    return blake2b(salt, digest_size=DIGEST_BYTES, person=b"salt").digest()
