"""Keys and the file of what is kept of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagecoach.errors import ConfigError
from stagecoach.security.api_keys import (
    Grant,
    KeyEntry,
    key_id,
    key_sha256,
    new_entry,
    new_key,
    read_entries,
    write_entry,
)

SHA256 = "ab" * 32
ENTRY = f'[[keys]]\nname = "a"\nid = "00000000000000aa"\nsha256 = "{SHA256}"\n'


def test_a_new_key_is_recognised_by_its_entry_alone():
    key = new_key()
    entry = new_entry(key, "billing", Grant())
    assert (entry.id, entry.sha256) == (key_id(key), key_sha256(key))
    secret = key.split("_", 2)[2]
    assert len(secret) == 43  # 256 bits in base64
    assert secret not in write_entry(entry)
    assert entry.sha256 not in repr(entry)


def test_no_two_keys_are_alike():
    assert len({new_key() for _ in range(100)}) == 100


NO_KEYS = {
    "nothing": "",
    "prefix": "sc_",
    "short": "sc_12_34",
    "something before": "x" + new_key(),
    "something after": new_key() + "x",
    "capitals": new_key().upper(),
}


@pytest.mark.parametrize("text", NO_KEYS.values(), ids=NO_KEYS.keys())
def test_what_is_no_key_has_no_id(text):
    assert key_id(text) is None


grants = st.builds(
    Grant,
    requests_per_minute=st.none() | st.integers(1, 10**9),
    tokens_per_minute=st.none() | st.integers(1, 10**9),
    max_concurrent=st.none() | st.integers(1, 10**6),
    models=st.none() | st.lists(st.text().filter(str.isprintable), max_size=3).map(tuple),
    max_priority=st.none() | st.integers(-(2**31), 2**31 - 1),
    shares_cache=st.booleans(),
)


@given(st.lists(grants, max_size=3))
def test_a_file_of_written_entries_is_read_back(all_grants):
    entries = tuple(new_entry(new_key(), f"name-{index}", grant) for index, grant in enumerate(all_grants))
    assert read_entries("\n".join(map(write_entry, entries))) == entries


def test_an_entry_may_have_no_limits_and_a_file_no_entries():
    assert read_entries(ENTRY) == (KeyEntry("a", "00000000000000aa", SHA256, Grant()),)
    assert read_entries("") == ()


def test_one_name_may_have_several_keys_with_the_same_limits():
    second = ENTRY.replace("00aa", "00bb")
    assert [entry.name for entry in read_entries(ENTRY + second)] == ["a", "a"]
    with pytest.raises(ConfigError, match=r"keys\[1\]: the limits differ"):
        read_entries(ENTRY + second + "max_concurrent = 1\n")


def test_an_id_is_there_once():
    with pytest.raises(ConfigError, match=r"keys\[1\].id: 00000000000000aa is there twice"):
        read_entries(ENTRY + ENTRY)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("keys = 1", "keys"),
        ("keys = [1]", "keys[0]"),
        ("other = 1\n" + ENTRY, "keys"),
        ("this is not toml", "keys"),
        ("keys = " + "[" * 100_000, "keys"),
        (ENTRY.replace('"a"', '""'), "keys[0].name"),
        (ENTRY.replace('"a"', '"a b"'), "keys[0].name"),
        (ENTRY.replace('"a"', "7"), "keys[0].name"),
        (ENTRY.replace('name = "a"\n', ""), "keys[0].name"),
        (ENTRY.replace("00000000000000aa", "aa"), "keys[0].id"),
        (ENTRY.replace(SHA256, "ab"), "keys[0].sha256"),
        (ENTRY + "requests_per_minute = 0", "keys[0].requests_per_minute"),
        (ENTRY + "tokens_per_minute = 1.5", "keys[0].tokens_per_minute"),
        (ENTRY + "max_concurrent = true", "keys[0].max_concurrent"),
        (ENTRY + "max_priority = 3000000000", "keys[0].max_priority"),
        (ENTRY + 'models = "m"', "keys[0].models"),
        (ENTRY + "models = [1]", "keys[0].models"),
        (ENTRY + "shares_cache = 1", "keys[0].shares_cache"),
        (ENTRY + "max_tokens = 1", "keys[0]"),
    ],
)
def test_a_mistake_in_the_file_is_named(text, field):
    with pytest.raises(ConfigError) as caught:
        read_entries(text)
    assert caught.value.field == field


def test_a_key_that_was_written_where_its_digest_belongs_is_not_quoted():
    key = new_key()
    for text in (ENTRY.replace(SHA256, key), ENTRY.replace('"a"', f'"{key}_"'), ENTRY + f'{key} = "x"', key):
        with pytest.raises(ConfigError) as caught:
            read_entries(text)
        assert key not in f"{caught.value} {caught.value.value} {caught.value.limit}"
