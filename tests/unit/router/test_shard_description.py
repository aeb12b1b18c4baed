"""What a shard says of itself: every number and every text has its bounds, and a claim costs the router nothing."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from stagecoach.errors import KVCacheFull, ModelMismatch
from stagecoach.v1 import model_pb2, shard_pb2
from stagecoach_router.pipelines.pipeline_manager import MAX_LEASED_BLOCKS, num_blocks_to_lease
from stagecoach_router.pipelines.shard_description import MAX_TEXT_BYTES, ShardDescription, check_description
from stagecoach_router.scheduling.block_manager import BlockManager

ADDRESS = "shard.example:1"


def describe(**changes):
    facts = {
        "layers": model_pb2.LayerRange(start=0, end=2),
        "dtype": model_pb2.DTYPE_FLOAT32,
        "block_size": 16,
        "num_blocks": 4,
        "num_free_blocks": 4,
        "max_batch_tokens": 8,
        "max_queued_steps": 8,
    }
    model = {"num_layers": 2, "hidden_size": 8, "vocab_size": 9, "context_length": 10}
    for name, value in changes.items():
        owner, _, field = name.partition("__")
        if field:
            model[field] = value
        else:
            facts[owner] = value
    return shard_pb2.DescribeResponse(model=model_pb2.ModelDescription(**model), **facts)


def refusal(**changes):
    with pytest.raises(ModelMismatch) as caught:
        check_description(ADDRESS, describe(**changes))
    return caught.value


def test_what_a_shard_says_by_itself_is_taken():
    check_description(ADDRESS, describe())
    check_description(ADDRESS, describe(model__name="Qwen3 – größer", hostname="h" * 255, device="cuda:0"))


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [
        ("num_free_blocks", 5, 4),
        ("num_free_blocks", 2**32 - 1, 4),
        ("max_queued_steps", 2**32 - 1, 1024),
        ("max_batch_tokens", 65_537, 65_536),
        ("block_size", 1025, 1024),
        ("kv_cache_bytes", 2**64 - 1, 1 << 50),
        ("weights_bytes", 2**64 - 1, 1 << 50),
        ("pid", 2**32 - 1, 2**31 - 1),
        ("model__vocab_size", 2**31, 1 << 23),
        ("model__hidden_size", 2**31, 1 << 20),
        ("model__context_length", 2**31 - 1, 1 << 27),
    ],
)
def test_every_number_has_a_limit(field, value, limit):
    error = refusal(**{field: value})
    assert (error.field, error.value, error.limit) == (field.replace("__", "."), str(value), str(limit))
    assert error.addresses == (ADDRESS,)


@pytest.mark.parametrize("field", MAX_TEXT_BYTES)
def test_every_text_has_a_limit_and_can_be_printed(field):
    name, limit = field.replace(".", "__"), MAX_TEXT_BYTES[field]
    check_description(ADDRESS, describe(**{name: "x" * limit}))
    too_long = refusal(**{name: "x" * (limit + 1)})
    assert (too_long.field, too_long.limit, too_long.value) == (field, str(limit), str(limit + 1))
    assert len(refusal(**{name: "x" * (6 << 20)}).message) < 200
    for text in ("a\x1b[31m", "a\n12:00:00 ERROR forged", "a\u202eb", "\x00", "a\x9b2J"):
        error = refusal(**{name: text})
        assert error.field == field
        assert (error.message + error.value).isprintable()


def test_no_field_of_a_description_is_without_a_limit():
    """Whoever adds one says here how large it may be."""
    bounded = {"protocol_version", "model", "layers", "dtype", "assignable"}  # compared, checked by parts, or a bool
    bounded |= {"block_size", "num_blocks", "num_free_blocks", "kv_cache_bytes", "weights_bytes"}
    bounded |= {"max_batch_tokens", "max_queued_steps", "pid"}
    of_model = {"num_layers", "hidden_size", "vocab_size", "context_length"}
    texts = {name for name in MAX_TEXT_BYTES if "." not in name}
    texts_of_model = {name.partition(".")[2] for name in MAX_TEXT_BYTES if "." in name}
    assert {field.name for field in shard_pb2.DescribeResponse.DESCRIPTOR.fields} == bounded | texts
    assert {field.name for field in model_pb2.ModelDescription.DESCRIPTOR.fields} == of_model | texts_of_model


def test_a_claim_of_two_billion_blocks_costs_nothing():
    tracemalloc.start()
    began = time.process_time()
    blocks = BlockManager(1, 16)
    blocks.reset(2**31 - 2)
    assert blocks.num_free == 2**31 - 2
    assert time.process_time() - began < 0.1
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def lease(num_free_blocks, wanted=0):
    shards = [ShardDescription(ADDRESS, describe(num_blocks=2**31 - 1, num_free_blocks=num_free_blocks))]
    return num_blocks_to_lease(wanted, shards)


def test_no_more_blocks_are_leased_than_the_router_has_memory_for():
    assert lease(1000) == 1000
    assert lease(100_000_000) == MAX_LEASED_BLOCKS
    assert lease(1000, wanted=10) == 11


def test_a_shard_with_too_few_blocks_is_waited_for():
    with pytest.raises(KVCacheFull):
        lease(10, wanted=10)
