"""The SDK and the commands send the key they were given, and show it to nobody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import stagecoach_client as sdk
from stagecoach_cli import run
from stagecoach_client import Client
from tests.integration.either_client import KINDS, Kind
from tests.integration.fake_router import FakeRouter, serving

KEY = "sc_0123456789abcdef_a-secret"


@pytest.fixture(autouse=True)
def _no_key_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECOACH_API_KEY", raising=False)


@pytest.fixture
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture
def target(router: FakeRouter) -> Iterator[str]:
    with serving(router) as address:
        yield address


def sent(router: FakeRouter) -> set[str | None]:
    return {metadata.get("authorization") for metadata in router.metadata}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_every_call_carries_the_key(router: FakeRouter, target: str, kind: Kind) -> None:
    async with kind.connect(target, api_key=KEY) as client:
        await client.generate("x")
        async for _ in await client.generate("x", stream=True):
            pass
        await client.tokenize("x")
        await client.models()
        await client.status()
    assert len(router.metadata) == 5
    assert sent(router) == {f"Bearer {KEY}"}


def test_the_key_comes_from_the_environment_unless_it_is_given(
    router: FakeRouter, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGECOACH_API_KEY", "of-the-environment\n")
    for api_key in (None, KEY, ""):
        with Client(target, api_key=api_key) as client:
            client.models()
    assert [metadata.get("authorization") for metadata in router.metadata] == [
        "Bearer of-the-environment",
        f"Bearer {KEY}",
        None,
    ]


def test_without_a_key_none_is_sent(router: FakeRouter, target: str) -> None:
    with Client(target) as client:
        client.models()
    assert sent(router) == {None}


@pytest.mark.parametrize("api_key", ["two words", "new\nline", "schlüssel", 7])
def test_what_cannot_be_a_key_is_refused_and_not_quoted(api_key: str) -> None:
    with pytest.raises(sdk.InvalidArgument) as caught:
        Client(api_key=api_key)
    assert caught.value.field == "api_key"
    assert str(api_key) not in f"{caught.value} {caught.value.value}"


def test_the_key_is_in_no_repr(target: str) -> None:
    with Client(target, api_key=KEY) as client:
        assert KEY not in repr(client) + repr(client._settings) + repr(vars(client))


@pytest.mark.parametrize("kind", [sdk.Unauthenticated, sdk.PermissionDenied])
def test_a_refusal_is_a_typed_error_and_not_tried_again(
    router: FakeRouter, target: str, kind: type[sdk.StagecoachError]
) -> None:
    router.failures.append(kind("no", field="api_key"))
    with Client(target) as client, pytest.raises(kind) as caught:
        client.generate("x")
    assert caught.value.field == "api_key"
    assert len(router.requests) == 1


def test_a_rate_limit_that_is_soon_over_is_waited_for(router: FakeRouter, target: str) -> None:
    router.failures.append(sdk.RateLimited("no", retry_after_s=0.01))
    with Client(target) as client:
        assert client.generate("x").text == "Hello, world"
    assert len(router.requests) == 2


def test_a_rate_limit_that_is_long_is_told(router: FakeRouter, target: str) -> None:
    router.failures.append(sdk.RateLimited("no", retry_after_s=40.0))
    with Client(target) as client, pytest.raises(sdk.RateLimited) as caught:
        client.generate("x")
    assert caught.value.retry_after_s == 40.0


def test_the_cache_salt_is_sent(router: FakeRouter, target: str) -> None:
    with Client(target) as client:
        client.generate("x", cache_salt="mine")
        with pytest.raises(sdk.InvalidArgument, match="cache_salt"):
            client.generate("x", cache_salt="x" * 129)
    assert [request.cache_salt for request in router.requests] == ["mine"]


def test_the_commands_send_the_key_and_do_not_print_it(
    router: FakeRouter, target: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    options = ["--target", target, "--api-key", KEY]
    for command in (["generate", "x", "--cache-salt", "mine"], ["status"], ["chat"]):
        assert run([*command, *options]) == 0
    bench = ["--concurrency", "1", "--prompt-tokens", "4", "--output-tokens", "2", "--no-warmup"]
    assert run(["bench", *bench, *options]) in (0, 1)  # the answers here are not of the length that it asks for
    monkeypatch.setenv("STAGECOACH_API_KEY", KEY)
    assert run(["status", "--target", target]) == 0
    assert len(router.metadata) > 4
    assert sent(router) == {f"Bearer {KEY}"}
    assert router.requests[0].cache_salt == "mine"
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err


def test_errors_about_a_prompt_do_not_quote_it() -> None:
    secret = "the-secret-prompt"
    with Client("127.0.0.1:1") as client:
        for options in (
            {"messages": [{"role": "user", "content": secret, "name": secret}]},
            {"messages": {"role": "user", "content": secret}},
            {"messages": secret},
            {"token_ids": secret},
            {"prompt": "x", "stop": [{"text": secret}]},
        ):
            with pytest.raises(sdk.InvalidArgument) as caught:
                client.generate(**options)
            assert secret not in f"{caught.value} {caught.value.value} {caught.value.limit}", options
