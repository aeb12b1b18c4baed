"""How many K/V blocks fit is decided before they are allocated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stagecoach.errors import ConfigError, InvalidArgument
from stagecoach_shard.memory import free_bytes, free_in_cgroups, num_kv_blocks

MIB = 1 << 20


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [("10M", 10), ("10.5M", 10), ("1M", 1), ("100MiB", 100), (str(3 * MIB - 1), 2), (str(3 * MIB), 3)],
)
def test_a_budget_holds_so_many_whole_blocks(budget: str, blocks: int) -> None:
    assert num_kv_blocks(budget, 0.01, bytes_per_block=MIB, free=100 * MIB) == blocks


@pytest.mark.parametrize(("fraction", "blocks"), [(0.5, 50), (0.3, 30), (0.019, 1), (0.95, 95)])
def test_without_a_budget_it_is_a_fraction_of_what_is_free(fraction: float, blocks: int) -> None:
    assert num_kv_blocks(None, fraction, bytes_per_block=MIB, free=100 * MIB) == blocks


def test_more_than_is_free_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        num_kv_blocks("101M", 0.3, bytes_per_block=MIB, free=100 * MIB)
    error = caught.value
    assert (error.field, error.limit, error.value) == ("kv-cache-memory", str(100 * MIB), str(101 * MIB))


@pytest.mark.parametrize(
    ("budget", "fraction", "field"), [("1023K", 0.9, "kv-cache-memory"), (None, 0.009, "kv-cache-fraction")]
)
def test_less_than_one_block_is_refused_under_the_setting_that_says_so(
    budget: str | None, fraction: float, field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        num_kv_blocks(budget, fraction, bytes_per_block=MIB, free=100 * MIB)
    assert (caught.value.field, caught.value.limit) == (field, str(MIB))
    assert 0 < int(caught.value.value) < MIB


def test_a_budget_that_is_no_size_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        num_kv_blocks("plenty", 0.3, bytes_per_block=MIB, free=100 * MIB)
    assert (caught.value.field, caught.value.value) == ("kv-cache-memory", "plenty")


def test_a_cpu_has_free_memory() -> None:
    assert free_bytes(torch.device("cpu")) > MIB


def limit_memory(folder: Path, limit: str, *, used: int, of_it_files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - of_it_files}\ninactive_file {of_it_files}\nactive_file 0\n")


def test_a_container_has_what_its_limits_leave_and_no_more(tmp_path: Path) -> None:
    memberships, root = tmp_path / "cgroup", tmp_path / "root"
    assert free_in_cgroups(memberships, root) is None
    memberships.write_text("12:cpu:/else\n0::/pods/ours\n")
    assert free_in_cgroups(memberships, root) is None
    limit_memory(root / "pods" / "ours", "max", used=5 * MIB, of_it_files=0)
    assert free_in_cgroups(memberships, root) is None
    limit_memory(root / "pods" / "ours", str(100 * MIB), used=40 * MIB, of_it_files=30 * MIB)
    assert free_in_cgroups(memberships, root) == 90 * MIB
    limit_memory(root / "pods", str(50 * MIB), used=48 * MIB, of_it_files=0)
    assert free_in_cgroups(memberships, root) == 2 * MIB


def test_what_a_container_has_left_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecoach_shard.memory.free_in_cgroups", lambda: 7 * MIB)
    assert free_bytes(torch.device("cpu")) == 7 * MIB
