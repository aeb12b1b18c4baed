"""The norm is the formula's, and leaves its input alone."""

from __future__ import annotations

import pytest
import torch

from stagecoach_shard.models.rms_norm import RMSNorm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_it_equals_the_formula_to_one_rounding(dtype: torch.dtype, tolerance: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(5, 3, 64, generator=generator) * scale).to(dtype)
    weight = torch.randn(3, 64, generator=generator).to(dtype)
    kept = x.clone()
    y = RMSNorm(weight, 1e-5)(x)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert y.dtype == dtype
    assert torch.equal(x, kept)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=1e-6)
