"""Random numbers without a state: each is a function of what it is for.

A generator's state would have to be saved, replayed after a failure and rolled back with rejected tokens; and shared
between sequences it would tie their tokens to how they happened to be batched. A hash of (seed, completion, position)
needs none of that: the same request with the same seed draws the same numbers whatever runs beside it.
"""

from __future__ import annotations

from hashlib import blake2b
from struct import Struct

_PURPOSE = b"stagecoach/1"
_COUNTERS = Struct("<QQQQ")
_STEP = 2.0**-53


def uniform(seed: int, completion: int, position: int, stream: int = 0) -> float:
    """A number in [0, 1): one of the 2**53 multiples of 2**-53, each as likely.

    seed: the request's. completion: which of its `n` completions. position: in the sequence, of the token to choose.
    stream: tells apart several numbers for one position; sampling uses 0. Each is from 0 to 2**64 - 1.

    It is the top 53 bits of BLAKE2b over the four as little-endian 64-bit integers (digest of 8 bytes, personalised),
    a hash whose outputs no practical test tells from independent ones (RFC 7693). It is the same on every machine.
    """
    digest = blake2b(_COUNTERS.pack(seed, completion, position, stream), digest_size=8, person=_PURPOSE).digest()
    return (int.from_bytes(digest, "little") >> 11) * _STEP
