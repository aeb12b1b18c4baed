"""API keys as a user would make and use them, and what the processes' logs say meanwhile."""

from stagecoach_client.settings import API_KEY_VARIABLE
from tests.cluster import free_port
from tests.e2e.processes import run, running

PROMPT = "a prompt that is nobody else's business"
DEBUG = ["--log-level", "debug"]


def test_keys_from_the_command_to_the_answer_and_nothing_of_it_in_a_debug_log(tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    file = str(tmp_path / "keys.toml")
    made = run("stagecoach", "keys", "new", "--name", "ann", "--file", file, "--max-priority", "1")
    assert made.returncode == 0, made.stderr
    key = made.stdout.strip()
    shard_address, target = (f"127.0.0.1:{free_port()}" for _ in range(2))
    model = ["--model", str(tiny_model), "--layers", "0:4", "--dtype", "float32", "--kv-cache-memory", "4M"]
    ask = ["generate", PROMPT, "--target", target, "--max-tokens", "40", "--ignore-eos", "--temperature", "0"]
    with (
        running("stagecoach-shard", *model, "--listen", shard_address, *DEBUG) as shard,
        running(
            "stagecoach-router", "--shards", shard_address, "--listen", target, "--api-keys", file, *DEBUG
        ) as router,
    ):
        router.wait_for("ready")
        refused = run("stagecoach", *ask)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.startswith("error: an API key is needed")
        monkeypatch.setenv(API_KEY_VARIABLE, key)
        answer = run("stagecoach", *ask, "--priority", "1")
        assert answer.returncode == 0, answer.stderr
        assert len(answer.stdout) > 10
        assert "ann may ask for 1 at most" in run("stagecoach", *ask, "--priority", "2").stderr
        assert router.stop() == 0
        assert shard.stop() == 0
    said = "".join(router.lines + shard.lines)
    assert "DEBUG" in said
    for secret in (PROMPT, PROMPT[:12], answer.stdout.strip(), key, key.split("_", 2)[2]):
        assert secret not in said
