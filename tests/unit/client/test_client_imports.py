"""The SDK must work with nothing but gRPC and protobuf beside it."""

from __future__ import annotations

import subprocess
import sys

import pytest

# grpcio itself depends on typing_extensions.
SCRIPT = """
import sys

OURS = {"stagecoach", "stagecoach_client", "stagecoach_local", "stagecoach_cli"}
ALLOWED = {"grpc", "google", "typing_extensions", *OURS, *sys.stdlib_module_names}

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT + code], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_sdk_needs_only_grpc_and_protobuf() -> None:
    code = "import stagecoach_client, stagecoach_local, stagecoach_cli.load\n"
    code += "stagecoach_client.Client('127.0.0.1:1').close(); print(len(stagecoach_client.__all__))"
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20


def test_the_hook_does_refuse() -> None:
    result = run("import numpy")
    assert result.returncode == 1
    assert "No module named 'numpy'" in result.stderr


def test_the_command_says_what_to_install() -> None:
    result = run("from stagecoach_cli import main; main()")
    assert result.returncode == 1
    assert result.stderr.startswith("error: the stagecoach command needs ")
    assert "install Stagecoach with its [cli] extra" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("program", "arguments", "missing"),
    [
        ("router", [], "pydantic"),
        ("router", ["--shards", "127.0.0.1:1"], "tokenizers"),
        ("shard", [], "pydantic"),
        ("shard", ["--model", "m", "--layers", "0:1"], "torch"),
    ],
)
def test_a_server_without_its_extra_says_what_to_install(program: str, arguments: list[str], missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv[1:] = {arguments!r}\n"
    code += f"from stagecoach_{program}.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    expected = f"error: {missing} is missing: install Stagecoach with its [{program}] extra\n"
    assert result.stderr == f"stagecoach-{program}: {expected}"


def test_the_command_starts_without_what_is_slow_to_import() -> None:
    code = "import sys; from stagecoach_cli import run; run(['--help'])"
    code += "; print(sorted(sys.modules), file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "generate" in result.stdout
    for name in ("torch", "numpy", "transformers", "rich", "stagecoach_shard", "stagecoach_router"):
        assert f"'{name}'" not in result.stderr
