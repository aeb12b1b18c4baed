"""Reduces rows of logits to what the router samples exactly from: their largest entries, and the mass of the whole row.

Everything is computed in float32, whatever dtype the logits have.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The vocabulary is looked at in blocks of so many ids. Reducing blocks to their largest logits runs at memory speed and
# leaves a fraction to search. On a CPU, for 40 candidates of 49,152, `topk` over whole rows and then a search for what
# equals the last of them take nearly three times as long.
_BLOCK_SIZE = 64
# Rows whose mass a CPU sums together: what is made of them on the way stays in its cache.
_GROUP_ROWS = 4


def top_candidates(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The largest logits of each row with their token ids, falling, equal logits by rising id.

    The choice is a function of the row alone: where equal logits (in bfloat16 the rule, not the exception) straddle
    the last place, the lowest ids win. A row with a NaN in it has a NaN in its first place. Only what reaches a close
    bound of the last place is sorted.

    logits: [n, vocab], any float dtype. num_candidates: at least 1.
    Returns token ids int32 [n, k] and logits float32 [n, k], k = min(num_candidates, vocab).
    """
    assert num_candidates >= 1
    if logits.shape[0] == 0:
        k = min(num_candidates, logits.shape[1])
        return logits.new_empty((0, k), dtype=torch.int32), logits.new_empty((0, k), dtype=torch.float32)
    if num_candidates == 1:
        return _likeliest(_blocks(logits.float(), _BLOCK_SIZE))
    k = min(num_candidates, logits.shape[1])
    block_size = _BLOCK_SIZE
    while (
        block_size > 1 and logits.shape[1] < 2 * k * block_size
    ):  # the bound below wants more than k blocks to be tight
        block_size //= 2
    return _largest(_blocks(logits.float(), block_size), k)


def log_sum_exp(logits: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of each row's mass, as it is and at the row's temperature.

    logits: [n, vocab], any float dtype. temperatures: float32 [n], at least 0.
    Returns log(sum(exp(row))) and log(sum(exp(row / temperature))), float32 [n] each; at temperature 0, where the
    latter has no value, it is the former.
    """
    scale = torch.where(temperatures == 0, 1.0, temperatures).float()[:, None]  # [n, 1]
    num_rows = _GROUP_ROWS if logits.device.type == "cpu" else max(1, logits.shape[0])
    groups = zip(torch.split(logits, num_rows), torch.split(scale, num_rows), strict=True)
    plain, scaled = zip(*(_log_sum_exp(*group) for group in groups), strict=True)
    return torch.cat(plain), torch.cat(scaled)


def _log_sum_exp(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """[n, vocab] and [n, 1] -> [n] each."""
    logits = logits.float()
    peak = logits.amax(dim=1, keepdim=True)  # [n, 1]
    # Relative to the peak before anything else: dividing first would round to the size of peak / temperature.
    shifted = logits - peak  # [n, vocab]
    plain = shifted.exp().sum(dim=1).log_() + peak[:, 0]
    if bool((scale == 1.0).all()):  # the default temperature: half the work
        return plain, plain
    scaled = shifted.div_(scale).exp_().sum(dim=1).log_() + (peak / scale)[:, 0]
    return plain, scaled


def _blocks(logits: Tensor, block_size: int) -> Tensor:
    """[n, vocab] as [n, num_blocks, block_size]; the last block is filled up with -inf, which never beats a real id."""
    missing = -logits.shape[1] % block_size
    if missing:
        logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
    return logits.reshape(logits.shape[0], -1, block_size)


def _likeliest(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The first largest logit of each row: `max` gives the first of equals, both among blocks and within one."""
    block = blocks.amax(dim=2).max(dim=1).indices  # [n]
    value, offset = blocks[torch.arange(len(block), device=block.device), block].max(dim=1)  # [n]
    token_ids = block * blocks.shape[2] + offset
    return token_ids.to(torch.int32)[:, None], value[:, None]


def _largest(blocks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row of [n, num_blocks, block_size], num_blocks >= k.

    The k-th largest block maximum is a lower bound of the k-th largest logit, and a close one. What reaches it comes
    out in rising order of ids, so that a stable sort leaves equal logits in that order. Comparisons are written as
    `not smaller`, so that a NaN passes them all and the sort puts it first.
    """
    num_rows, _, block_size = blocks.shape
    maxima = blocks.amax(dim=2)  # [n, num_blocks]
    bound = maxima.topk(k, dim=1).values[:, -1]  # [n]
    reach = (maxima < bound[:, None]).logical_not_()  # [n, num_blocks]: blocks worth a look
    if int(reach.sum(dim=1).max()) > 2 * k:
        reach = _without_later_equals(reach, maxima, bound, k)
    row, block = reach.nonzero(as_tuple=True)  # [m] each
    tiles = blocks[row, block]  # [m, block_size]
    tile, offset = (tiles < bound[row, None]).logical_not_().nonzero(as_tuple=True)  # [h] each: logits worth a look
    row, token_id, value = row[tile], block[tile] * block_size + offset, tiles[tile, offset]

    # Rows have different numbers of them: lay them out as a matrix, filled up at the end.
    counts = torch.bincount(row, minlength=num_rows)  # [n], at least k each
    width = int(counts.max())
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    values = blocks.new_full((num_rows, width), -torch.inf)
    token_ids = torch.zeros((num_rows, width), dtype=torch.int32, device=row.device)
    values[row, place] = value
    token_ids[row, place] = token_id.to(torch.int32)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return token_ids.gather(1, order[:, :k]), values[:, :k].contiguous()


def _without_later_equals(reach: Tensor, maxima: Tensor, bound: Tensor, k: int) -> Tensor:
    """`reach` [n, num_blocks] with only the first k of the blocks whose maximum is their row's bound [n].

    The others cannot matter: each of the first ones has an entry that is as large, and of a lower id. Without this a
    row of equal logits, or of NaNs, would be sorted as a whole, in a hundred times the time and the memory.
    """
    is_nan = bound.isnan()[:, None]
    at_bound = torch.where(is_nan, maxima.isnan(), maxima == bound[:, None])
    reach = torch.where(is_nan, at_bound, reach)
    return reach & (~at_bound | (at_bound.cumsum(dim=1, dtype=torch.int32) <= k))
