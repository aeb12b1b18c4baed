"""Seconds of the soak in each run, and a minute of it each night, when `make nightly` also has ten of them."""

import pytest

from tests.soak import __main__ as program


@pytest.mark.quiet
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("minutes", "seed"),
    [
        # The first two faults of this seed are the death of a shard and that of the router.
        pytest.param(0.2, 314, id="seconds"),
        pytest.param(1, 3, id="a minute", marks=pytest.mark.nightly),
    ],
)
def test_faults_under_load_lose_nothing(capsys, minutes, seed):
    status = program.main(["--minutes", str(minutes), "--seed", str(seed)])
    said = capsys.readouterr()
    assert status == 0, said.err
    for fault in ("shard killed", "router killed"):
        assert fault in said.out


@pytest.mark.parametrize("argument", ["--minutes=0", "--callers=0", "--spares=-1"])
def test_a_soak_of_nothing_is_refused(argument, capsys):
    with pytest.raises(SystemExit):
        program.main([argument])
    assert "must be at least" in capsys.readouterr().err
