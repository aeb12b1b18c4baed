"""Linear maps by the CPU kernels: what torch computes in float32, each row on its own."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from ctypes import CDLL, c_int64, c_void_p

import psutil
import pytest
import torch
from torch.nn import functional

from stagecoach_shard.native.layers import NativeLinear
from tests.unit.shard.native_layers import BUILDS, compiled, kernels

# [rows, columns]: one of each, less than a panel, a panel and one more, several, no multiple of any register.
SHAPES = [(1, 1), (5, 3), (33, 17), (32, 64), (31, 7), (97, 130), (160, 96)]


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch with as many threads as it had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_linear(rows: int, columns: int, bias: bool, build: str) -> tuple[NativeLinear, torch.Tensor, torch.Tensor]:
    """The map, and its weight and bias in float32."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    offsets = torch.randn(rows, generator=generator).bfloat16()
    linear = NativeLinear(weight, offsets if bias else None, kernels(build))
    return linear, weight.float(), offsets.float() * bias


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_equals_torch_in_float32_for_odd_shapes_and_1_to_30_tokens(build: str, bias: bool) -> None:
    for rows, columns in SHAPES:
        linear, weight, offsets = random_linear(rows, columns, bias, build)
        for num_tokens in range(1, 31):
            x = torch.randn(num_tokens, columns, generator=torch.Generator().manual_seed(num_tokens))
            y = linear(x)
            assert y.shape == (num_tokens, rows)
            assert y.dtype == torch.float32
            expected = functional.linear(x.double(), weight.double(), offsets.double()).float()
            torch.testing.assert_close(y, expected, atol=3e-6 * columns**0.5, rtol=1e-6)


@pytest.mark.parametrize("build", BUILDS)
def test_a_rows_result_is_the_same_bit_for_bit_beside_any_others(build: str, threads: None) -> None:
    linear, _, _ = random_linear(97, 130, True, build)
    x = torch.randn(30, 130, generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    alone = torch.cat([linear(row[None]) for row in x])
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for num_tokens in range(2, 31):
            assert torch.equal(linear(x[:num_tokens]), alone[:num_tokens])
            assert torch.equal(linear(x[30 - num_tokens :]), alone[30 - num_tokens :])


def test_takes_what_does_not_lie_together_and_no_rows_at_all() -> None:
    linear, weight, _ = random_linear(33, 17, False, BUILDS[0])
    x = torch.randn(17, 4)
    torch.testing.assert_close(linear(x.T), x.T @ weight.T, atol=1e-5, rtol=1e-5)
    assert linear(x.T[:0]).shape == (0, 33)
    transposed = torch.randn(8, 33).bfloat16().T
    linear = NativeLinear(transposed, None, kernels(BUILDS[0]))
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(x), x @ transposed.float().T, atol=1e-5, rtol=1e-5)


def test_inputs_of_another_width_or_dtype_are_never_read() -> None:
    linear, _, _ = random_linear(33, 17, False, BUILDS[0])
    for x in (torch.zeros(2, 16), torch.zeros(17), torch.zeros(2, 17, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError):
            linear(x)
    with pytest.raises(AssertionError):
        NativeLinear(torch.zeros(4, 4), None, kernels(BUILDS[0]))


@pytest.mark.parametrize("build", BUILDS)
def test_without_memory_it_says_so_before_it_reads_and_goes_on_afterwards(build: str) -> None:
    linear, weight, _ = random_linear(33, 17, False, build)
    x, y, functions = torch.randn(3, 17), torch.empty(3, 33), kernels(build)
    too_many = 1 << 50  # rows that no address space holds
    pointers = x.data_ptr(), linear.words.data_ptr(), y.data_ptr()
    assert functions.linear(pointers[0], too_many, pointers[1], 33, 17, None, pointers[2], 0, None, 1) != 0
    torch.testing.assert_close(linear(x), x @ weight.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", BUILDS)
def test_what_is_not_a_number_stays_in_its_row(build: str) -> None:
    linear, _, _ = random_linear(33, 17, True, build)
    x = torch.randn(7, 17, generator=torch.Generator().manual_seed(3))
    expected = linear(x)
    for index, bad in ((2, math.nan), (5, math.inf)):
        x[index, 4] = bad
    y = linear(x)
    assert y[2].isnan().all()
    assert not y[5].isfinite().any()
    good = [0, 1, 3, 4, 6]
    assert torch.equal(y[good], expected[good])


def call(build: str, name: str, x: torch.Tensor, y: torch.Tensor, count: int) -> torch.Tensor:
    function = getattr(CDLL(str(compiled(build))), name)
    function.argtypes, function.restype = [c_void_p, c_int64, c_void_p], None
    function(x.data_ptr(), count, y.data_ptr())
    return y


EXTREMES = [-math.inf, -3.4e38, -1e30, -1e4, -104.0, -88.0, -87.5, -1e-30, -1e-45, -0.0]


@pytest.mark.parametrize("build", BUILDS)
def test_powers_of_e_are_within_two_units_and_vanish_where_they_must(build: str) -> None:
    x = torch.cat([torch.linspace(-87.0, 0.0, 65536 - 16), torch.tensor([*EXTREMES, *[math.nan] * 6])])
    y = call(build, "exp_of", x, torch.empty_like(x), len(x))
    exact = x.double().exp()
    normal = x >= -87.0
    assert ((y.double() - exact).abs() / exact)[normal].max() <= 2 * torch.finfo(torch.float32).eps
    assert (y[x < -87.0] == 0).all()
    assert y[-6:].isnan().all()
    assert (y[-9:-6] == 1).all()


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("count", [64, 1], ids=["registers", "remainder"])
def test_silu_is_exact_to_rounding_and_takes_the_largest_and_smallest(build: str, count: int) -> None:
    gates = [*EXTREMES[1:], 0.0, 1e-45, 1e-30, 87.0, 89.0, 1e30, 3.4e38, math.inf, math.nan]
    gates += torch.linspace(-95, 95, 64 - len(gates)).tolist()
    x = torch.tensor([gates, [1.0] * 64])
    y = torch.empty(64)
    if count == 64:
        call(build, "silu_of", x, y, 64)
    else:
        for index in range(64):
            pair = x[:, index].clone()
            y[index] = call(build, "silu_of", pair, torch.empty(1), 1)[0]
    exact = functional.silu(x[0].double()).float()
    torch.testing.assert_close(y, exact, atol=1e-35, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("build", BUILDS)
def test_rounding_to_bfloat16_is_that_of_torch(build: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator)
    ties = bits.bitwise_and(-65536).bitwise_or(0x8000)
    x = torch.cat([bits, ties]).to(torch.int32).view(torch.float32)  # any numbers there are, and all kinds of ties
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, 3.4e38, -3.4e38, 0.0, -0.0, math.nan, 1e-45] * 2)])
    y = call(build, "round_of", x, torch.empty(len(x), dtype=torch.bfloat16), len(x))
    expected = x.bfloat16()
    assert torch.equal(y.isnan(), x.isnan())
    numbers = ~x.isnan()
    assert torch.equal(y[numbers].view(torch.int16), expected[numbers].view(torch.int16))


def test_what_a_thread_computes_in_goes_with_the_thread() -> None:
    """A shard that is given other layers begins a new compute thread, and may do so every minute."""
    linear = NativeLinear(torch.zeros(1, 4096, dtype=torch.bfloat16), None, kernels(BUILDS[0]))
    x = torch.zeros(2048, 4096)  # 32 MiB, which the kernel lays out anew

    def compute() -> None:
        thread = threading.Thread(target=linear, args=(x,))
        thread.start()
        thread.join()

    compute()
    before = psutil.Process().memory_info().rss
    for _ in range(8):
        compute()
    assert psutil.Process().memory_info().rss - before < 64 << 20
