"""A minute of the soak; `make nightly` runs ten."""

import pytest

from tests.soak import __main__ as program

SEED = 3


@pytest.mark.timeout(400)
def test_a_minute_of_faults_under_load_loses_nothing(capsys):
    status = program.main(["--minutes", "1", "--seed", str(SEED)])
    said = capsys.readouterr()
    assert status == 0, said.err
    for fault in ("shard killed", "router killed"):
        assert fault in said.out


@pytest.mark.parametrize("argument", ["--minutes=0", "--callers=0", "--spares=-1"])
def test_a_soak_of_nothing_is_refused(argument, capsys):
    with pytest.raises(SystemExit):
        program.main([argument])
    assert "must be at least" in capsys.readouterr().err
