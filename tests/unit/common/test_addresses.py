"""A list of shards is one of different addresses, and not endless."""

import pytest

from stagecoach.errors import InvalidArgument
from stagecoach.rpc.addresses import MAX_ADDRESSES, read_addresses


def test_addresses_come_as_they_are_written():
    assert read_addresses(" b:2,a:1 ,[::1]:3", "shards") == ["b:2", "a:1", "[::1]:3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "HOST:PORT"),
        ("a:1,", "HOST:PORT"),
        ("a:1 b:2", "HOST:PORT"),
        ("a:1,b:99999", "port 99999"),
        ("a:1,b:2, a:1", "a:1 is named twice"),
        ("a:1," * MAX_ADDRESSES + "b:1", "more than 1024"),
    ],
)
def test_what_is_no_list_of_addresses_is_refused(text, message):
    with pytest.raises(InvalidArgument, match=message) as caught:
        read_addresses(text, "shards")
    assert caught.value.field == "shards"
