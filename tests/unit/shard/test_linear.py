"""Linear maps are right, and reordered for the CPU where that pays."""

from __future__ import annotations

import pytest
import torch

from stagecoach_shard.models.linear import Linear

needs_bf16_kernels = pytest.mark.skipif(
    not torch._C._has_mkldnn or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this CPU has no bfloat16 kernels",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
def test_it_computes_the_product(dtype: torch.dtype, with_bias: bool, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 48, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if with_bias else None
    x = torch.randn(num_tokens, 48, generator=generator).to(dtype)
    with torch.inference_mode():
        y = Linear(weight, bias)(x)
    assert y.dtype == dtype
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=0.01)


@needs_bf16_kernels
@pytest.mark.parametrize("with_bias", [False, True])
def test_many_tokens_in_float32_give_what_bfloat16_gives_but_for_the_rounding(with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 48, generator=generator).bfloat16()
    bias = torch.randn(96, generator=generator).bfloat16() if with_bias else None
    x = torch.randn(40, 48, generator=generator).bfloat16()
    with torch.inference_mode():
        wide, narrow = Linear(weight, bias, wide_from=40), Linear(weight, bias, wide_from=41)
        exact = (x.double() @ weight.double().T + (0 if bias is None else bias.double())).bfloat16()
        assert torch.equal(wide(x), exact)  # it took the wide path: rounded once
        torch.testing.assert_close(narrow(x), exact, atol=0.1, rtol=0.02)
        assert torch.equal(wide(x[:39]), narrow(x[:39]))  # and one token fewer does not


@needs_bf16_kernels
def test_a_bfloat16_weight_on_a_cpu_is_packed() -> None:
    assert Linear(torch.zeros(96, 48, dtype=torch.bfloat16)).packed
    assert not Linear(torch.zeros(96, 48)).packed


def test_it_knows_its_size() -> None:
    linear = Linear(torch.zeros(96, 48, dtype=torch.bfloat16), torch.zeros(96, dtype=torch.bfloat16))
    assert linear.num_bytes == 2 * (96 * 48 + 96)
