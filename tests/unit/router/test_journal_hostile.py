"""A journal made so that reading it would take for ever is refused in time."""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path

import pytest

from stagecoach.errors import ConfigError
from stagecoach_router.durability import journal_store
from stagecoach_router.durability.journal_store import JournalStore

PAGE_SIZE = 512
# SQLite follows a tree 20 pages deep at most; so many are 60^10 rows.
NUM_LEVELS = 10
NUM_CHILDREN = 60
INTERIOR, LEAF = 5, 13  # of a table's tree: the format is at https://www.sqlite.org/fileformat2.html


def page_of(data: bytes, number: int) -> bytes:
    return data[(number - 1) * PAGE_SIZE : number * PAGE_SIZE]


def cells_of(page: bytes) -> list[bytes]:
    """Of a leaf whose cells are short and hold no page of another."""
    (num_cells,) = struct.unpack_from(">H", page, 3)
    places = struct.unpack_from(f">{num_cells}H", page, 8)
    return [page[place : place + 2 + page[place]] for place in places]


def make_page(kind: int, cells: list[bytes], last: int | None = None) -> bytes:
    page, content = bytearray(PAGE_SIZE), PAGE_SIZE
    header = struct.pack(">BHH", kind, 0, len(cells))
    places = []
    for cell in cells:
        content -= len(cell)
        page[content : content + len(cell)] = cell
        places.append(content)
    header += struct.pack(">HB", content, 0) + (b"" if last is None else struct.pack(">I", last))
    header += struct.pack(f">{len(places)}H", *places)
    page[: len(header)] = header
    return bytes(page)


def child(number: int) -> bytes:
    return struct.pack(">I", number) + b"\x09"


def whose_branches_meet_again(path: Path) -> None:
    """A journal, and behind the last page of its schema a tree in which all children of a page are the same one."""
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA page_size = {PAGE_SIZE}")
        db.execute("VACUUM")
    db.close()
    JournalStore(path).close()
    data = bytearray(path.read_bytes())
    assert data[100] == INTERIOR
    (last,) = struct.unpack_from(">I", data, 108)
    [row] = [cell for cell in cells_of(page_of(data, last)) if b"sqlite_autoindex" in cell]  # may be there twice
    first = len(data) // PAGE_SIZE + 1
    struct.pack_into(">I", data, 108, first)
    for level in range(NUM_LEVELS):
        following = first + level + 1
        children = [child(following)] * NUM_CHILDREN
        data += make_page(INTERIOR, children if level else [child(last), *children], following)
    data += make_page(LEAF, [row])
    struct.pack_into(">I", data, 28, len(data) // PAGE_SIZE)
    path.write_bytes(data)


def test_a_tree_whose_branches_meet_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.sqlite"
    whose_branches_meet_again(path)
    monkeypatch.setattr(journal_store, "MAX_READ_S", 0.2)
    with pytest.raises(ConfigError, match=r"not read in 0\.2 s") as caught:
        JournalStore(path)
    assert caught.value.field == "journal"
