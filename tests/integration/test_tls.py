"""Who gets in with real certificates and who does not: each refusal is a typed error where something can be done."""

import asyncio
import logging
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import grpc.aio
import pytest

from stagecoach import errors
from stagecoach.process.listener import listen
from stagecoach.rpc import channel
from stagecoach.rpc.channel import MAX_SHARD_MESSAGE_BYTES, channel_options, dial_plainly
from stagecoach.security.tls import ROUTER_NAME, SHARD_NAME, Identity, name_override, shard_dial
from stagecoach_client import AsyncClient, Client, Tls
from stagecoach_local.certificates import ThrowawayCA, issue_cluster
from stagecoach_router.pipelines import shard_client
from tests.cluster import start_router, start_shard, status_becomes, wait_until_ready
from tests.tiny_model import greedy, random_prompts, reference_tokens

TIMEOUT_S = 30.0


@pytest.fixture
def issued(tmp_path):
    return issue_cluster(tmp_path / "issued")


def tls_settings(own, ca):
    return {"tls_cert": own.cert, "tls_key": own.key, "tls_ca": ca}


@asynccontextmanager
async def encrypted_cluster(model, issued, **router_settings):
    """The address of a router, over two shards, that speaks TLS with everybody."""
    shards = [start_shard(model, layers, **tls_settings(issued.shard, issued.ca)) for layers in ("0:2", "2:4")]
    front = start_router(
        [shard.address for shard in shards], **tls_settings(issued.router, issued.ca), **router_settings
    )
    own = {"cert": issued.router.cert, "key": issued.router.key} if "tls_client_ca" in router_settings else {}
    try:
        async with AsyncClient(front.address, max_retries=0, tls=Tls(issued.ca, **own)) as client:
            await wait_until_ready(client, front, *shards)
        yield front.address
    finally:
        for server in (front, *shards):
            await server.close()


@asynccontextmanager
async def one_shard(model, dial, **settings):
    """The address of a shard that has loaded, and answers those who `dial` it so."""
    shard = start_shard(model, "0:4", **settings)
    try:
        await describe(shard.address, dial)
        yield shard.address
    finally:
        await shard.close()


async def describe(address, dial):
    """What the shard says of itself, once it has loaded."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return await shard_client.describe(address, dial)
            except errors.HandshakeFailed:
                raise
            except errors.Unavailable:  # it does not listen yet, or loads
                await asyncio.sleep(0.01)


async def test_tokens_are_the_same_and_every_link_is_encrypted(tiny_model, reference, issued):
    prompts = random_prompts(3, 40)
    async with encrypted_cluster(tiny_model, issued) as address, AsyncClient(address, tls=Tls(issued.ca)) as client:
        answers = await asyncio.gather(*(client.generate(token_ids=prompt, **greedy(12)) for prompt in prompts))
        stages = (await client.status()).pipelines[0].stages
        for stage in stages:  # a listener speaks TLS or does not: what goes to these is encrypted
            with pytest.raises(errors.Unavailable, match="perhaps it speaks TLS"):
                await shard_client.describe(stage.address, dial_plainly)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 12)


def without_certificate(issued):
    def dial(address):
        credentials = grpc.ssl_channel_credentials(issued.ca.read_bytes())
        options = [*channel_options(MAX_SHARD_MESSAGE_BYTES), *name_override(SHARD_NAME)]
        return grpc.aio.secure_channel(address, credentials, options=options)

    return dial


def half_an_hour_ago():
    """The clock of a process that does not know yet that its certificate has ended."""
    return datetime.now(UTC) - timedelta(minutes=30)


async def test_strangers_do_not_get_into_a_shard(tiny_model, issued, tmp_path):
    others = issue_cluster(tmp_path / "others")
    authority = ThrowawayCA(tmp_path / "authority")
    late = authority.issue(ROUTER_NAME, lifetime=timedelta(minutes=-1))
    trusted = tmp_path / "both.pem"
    trusted.write_bytes(issued.ca.read_bytes() + authority.ca.read_bytes())
    settings = tls_settings(issued.shard, trusted)
    we = Identity(*issued.router, issued.ca)
    async with one_shard(tiny_model, shard_dial(we, SHARD_NAME), **settings) as address:
        mistrusted = {
            "CA": shard_dial(Identity(*issued.router, others.ca), SHARD_NAME),
            "another name": shard_dial(we, "shard-of-mine"),
        }
        for reason, dial in mistrusted.items():
            with pytest.raises(errors.HandshakeFailed, match=f"{address}.*{reason}") as caught:
                await shard_client.describe(address, dial)
            assert not caught.value.retryable
        strangers = [
            shard_dial(Identity(*others.router, issued.ca), SHARD_NAME),
            shard_dial(Identity(*late, issued.ca, now=half_an_hour_ago), SHARD_NAME),
            without_certificate(issued),
            dial_plainly,
        ]
        for dial in strangers:  # who listens tells strangers nothing; they see that it hung up
            with pytest.raises(errors.Unavailable, match=f"{address}.*hung up at once.*TLS"):
                await shard_client.describe(address, dial)
        assert await shard_client.describe(address, shard_dial(we, SHARD_NAME))


async def test_a_good_certificate_of_a_wrong_name_is_refused_by_name(tiny_model, tmp_path, caplog):
    authority = ThrowawayCA(tmp_path)
    own, other = authority.issue(SHARD_NAME), authority.issue("intruder")
    colleague = shard_dial(Identity(*own, authority.ca), SHARD_NAME)
    intruder = shard_dial(Identity(*other, authority.ca), SHARD_NAME)
    async with one_shard(tiny_model, colleague, **tls_settings(own, authority.ca)) as address:
        for _ in range(2):
            with pytest.raises(errors.PermissionDenied, match="intruder") as caught:
                await shard_client.describe(address, intruder)
        assert "stagecoach-router" in caught.value.message
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("refused")]
        assert len(told) == 1
        assert "refused ipv4:127.0.0.1:" in told[0]
        assert "certificate is for intruder" in told[0]
    async with one_shard(tiny_model, intruder, allow_peer="intruder", **tls_settings(own, authority.ca)) as address:
        with pytest.raises(errors.PermissionDenied, match="stagecoach-shard"):
            await shard_client.describe(address, colleague)


async def test_a_router_of_a_wrong_name_waits_with_the_reason_until_it_has_the_right_one(tiny_model, tmp_path):
    authority = ThrowawayCA(tmp_path)
    own, other, right = (authority.issue(name) for name in (SHARD_NAME, "intruder", ROUTER_NAME))
    colleague = shard_dial(Identity(*own, authority.ca), SHARD_NAME)
    async with one_shard(tiny_model, colleague, **tls_settings(own, authority.ca)) as address:
        router = start_router([address], edge_tls=False, **tls_settings(other, authority.ca))
        async with AsyncClient(router.address) as client:
            await status_becomes(client, lambda now: "certificate is for intruder" in now.pipelines[0].reason)
            put_in_place(other, right)
            await wait_until_ready(client, router)
        await router.close()


async def test_a_shard_that_does_not_trust_the_next_one_fails_the_open_with_the_reason(tiny_model, issued, tmp_path):
    other = ThrowawayCA(tmp_path / "other")
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(issued.ca.read_bytes() + other.ca.read_bytes())
    own = other.issue(SHARD_NAME)
    first = start_shard(tiny_model, "0:2", **tls_settings(issued.shard, issued.ca))
    last = start_shard(tiny_model, "2:4", **tls_settings(own, bundle))
    router = start_router([first.address, last.address], **tls_settings(issued.router, bundle))
    try:
        options = {"tls": Tls(issued.ca), "max_retries": 0}
        async with asyncio.timeout(TIMEOUT_S), AsyncClient(router.address, **options) as client:
            reason = ""
            while not (last.address in reason and "its certificate is not one to trust" in reason):
                with pytest.raises(errors.Unavailable) as caught:  # as it also is before the shards have loaded
                    await client.generate("x")
                reason = caught.value.message
                await asyncio.sleep(0.02)
    finally:
        for server in (router, first, last):
            await server.close()


async def test_tls_to_a_plain_listener_is_a_reason_and_no_hang(tiny_model, issued):
    async with one_shard(tiny_model, dial_plainly) as address:
        with pytest.raises(errors.HandshakeFailed, match="does not speak TLS"):
            await shard_client.describe(address, shard_dial(Identity(*issued.router, issued.ca), SHARD_NAME))


async def fails_to_connect(address, kind=errors.HandshakeFailed, **settings):
    """What both clients say of it."""
    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(kind) as caught:
            async with AsyncClient(address, max_retries=0, **settings) as client:
                await client.models()

    def blocking():
        with Client(address, max_retries=0, **settings) as client:
            client.models()

    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(kind) as blocked:
            await asyncio.to_thread(blocking)
    assert address in caught.value.message
    assert address in blocked.value.message
    return caught.value.message


async def test_callers_are_told_why_they_do_not_get_through(tiny_model, issued, tmp_path):
    others = issue_cluster(tmp_path / "others")
    async with encrypted_cluster(tiny_model, issued) as address:
        assert "perhaps it speaks TLS" in await fails_to_connect(address, errors.Unavailable)
        assert "certificate" in await fails_to_connect(address, tls=Tls(others.ca))
        assert "another name" in await fails_to_connect(address, tls=Tls(issued.ca, server_name="elsewhere"))
        with Client(address, tls=Tls(issued.ca, server_name=ROUTER_NAME)) as client:
            assert await asyncio.to_thread(client.models)


async def test_an_edge_that_asks_for_certificates_takes_only_those_of_its_ca(tiny_model, issued, tmp_path):
    others = issue_cluster(tmp_path / "others")
    async with encrypted_cluster(tiny_model, issued, tls_client_ca=issued.ca) as address:
        assert "another certificate of us" in await fails_to_connect(address, errors.Unavailable, tls=Tls(issued.ca))
        await fails_to_connect(address, errors.Unavailable, tls=Tls(issued.ca, *others.router))
        async with AsyncClient(address, tls=Tls(issued.ca, *issued.router)) as client:
            assert await client.models()


async def test_a_plain_edge_over_encrypted_links(tiny_model, issued):
    shard = start_shard(tiny_model, "0:4", **tls_settings(issued.shard, issued.ca))
    router = start_router([shard.address], edge_tls=False, **tls_settings(issued.router, issued.ca))
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        assert (await client.generate(token_ids=[1, 2], **greedy(3))).usage.completion_tokens == 3
        assert "does not speak TLS" in await fails_to_connect(router.address, tls=Tls(issued.ca))
    await router.close()
    await shard.close()


async def test_a_plain_edge_asks_nobody_for_certificates(issued):
    router = start_router(["127.0.0.1:1"], tls_client_ca=issued.ca)
    with pytest.raises(errors.ConfigError, match="tls_client_ca"):
        await router.task


def put_in_place(old, new):
    for name in ("cert", "key"):
        getattr(old, name).write_bytes(getattr(new, name).read_bytes())


async def trusted(address, ca):
    """The options for the router at `address`, once it has a certificate of `ca`: it looks every second."""
    tls = Tls(ca)
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                async with AsyncClient(address, max_retries=0, tls=tls) as client:
                    await client.models()
                return tls
            except errors.HandshakeFailed:
                await asyncio.sleep(0.02)


async def test_certificates_change_while_streams_run(tiny_model, reference, issued, tmp_path, caplog):
    new = issue_cluster(tmp_path / "new")
    old_ca = tmp_path / "old_ca.pem"
    old_ca.write_bytes(issued.ca.read_bytes())
    prompt = random_prompts(1, 20)[0]
    async with encrypted_cluster(tiny_model, issued) as address:
        async with AsyncClient(address, tls=Tls(old_ca)) as before:
            stream = await before.generate(token_ids=prompt, stream=True, **greedy(100))
            await anext(stream)
            issued.ca.write_bytes(new.ca.read_bytes())
            for own, replacement in ((issued.router, new.router), (issued.shard, new.shard)):
                put_in_place(own, replacement)
            async with AsyncClient(address, tls=await trusted(address, new.ca)) as after:
                answer = await after.generate(token_ids=prompt, **greedy(10))
                assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 10)
            await fails_to_connect(address, tls=Tls(old_ca))
            async with asyncio.timeout(TIMEOUT_S):
                answer = await stream.collect()
            assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 100)
        with caplog.at_level(logging.ERROR):
            issued.router.cert.write_bytes(b"half a certifica")
            async with asyncio.timeout(TIMEOUT_S):
                while "stays in use" not in caplog.text:
                    await asyncio.sleep(0.01)
            async with AsyncClient(address, tls=Tls(new.ca)) as client:
                assert await client.models()


async def test_a_pipeline_reopens_with_the_new_certificates(tiny_model, reference, issued, tmp_path):
    """A shard that comes back has another CA's certificate; the router's files have changed, too."""
    new = issue_cluster(tmp_path / "new")
    shard = start_shard(tiny_model, "0:4", **tls_settings(issued.shard, issued.ca))
    router = start_router([shard.address], edge_tls=False, **tls_settings(issued.router, issued.ca))
    prompt = random_prompts(1, 20)[0]
    async with AsyncClient(router.address, max_retries=0) as client:
        await wait_until_ready(client, router, shard)
        stream = await client.generate(token_ids=prompt, stream=True, **greedy(100))
        await anext(stream)
        await shard.close()
        put_in_place(issued.router, new.router)
        issued.ca.write_bytes(new.ca.read_bytes())
        shard = start_shard(tiny_model, "0:4", listen=shard.address, **tls_settings(new.shard, new.ca))
        async with asyncio.timeout(TIMEOUT_S):
            answer = await stream.collect()
        assert answer.completions[0].token_ids == reference_tokens(reference, prompt, 100)
    await router.close()
    await shard.close()


async def test_a_process_with_an_expired_certificate_is_not_connected_to(tmp_path):
    authority = ThrowawayCA(tmp_path)
    late = authority.issue(SHARD_NAME, lifetime=timedelta(minutes=-1))
    own = authority.issue(ROUTER_NAME)
    server, port = listen(1024, "127.0.0.1:0", identity=Identity(*late, authority.ca, now=half_an_hour_ago))
    await server.start()
    with pytest.raises(errors.HandshakeFailed, match="expired"):
        await shard_client.describe(f"127.0.0.1:{port}", shard_dial(Identity(*own, authority.ca), SHARD_NAME))
    await server.stop(None)


@pytest.mark.parametrize("encrypted", [True, False])
async def test_who_connects_and_says_nothing_is_cut_off(issued, monkeypatch, encrypted):
    monkeypatch.setattr(channel, "HANDSHAKE_TIMEOUT_S", 0.2)
    identity = Identity(*issued.shard, issued.ca) if encrypted else None
    server, port = listen(1024, "127.0.0.1:0", identity=identity)
    await server.start()
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.read()  # to the end, which the server makes
    writer.close()
    await server.stop(None)


async def test_a_port_in_use_is_named_with_tls_too(issued):
    identity = Identity(*issued.shard, issued.ca)
    server, port = listen(1024, "127.0.0.1:0", identity=identity)
    await server.start()
    with pytest.raises(errors.ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        listen(1024, f"127.0.0.1:{port}", identity=identity)
    await server.stop(None)


async def test_a_shard_can_be_asked_for_the_host_that_it_is_reached_at(tiny_model, tmp_path):
    authority = ThrowawayCA(tmp_path)
    here, elsewhere = authority.issue("here", hosts=["127.0.0.1"]), authority.issue(SHARD_NAME, hosts=["10.0.0.1"])
    router = Identity(*authority.issue(ROUTER_NAME), authority.ca)
    async with one_shard(tiny_model, shard_dial(router, ""), **tls_settings(here, authority.ca)) as address:
        with pytest.raises(errors.HandshakeFailed, match="another name"):
            await shard_client.describe(address, shard_dial(router, SHARD_NAME))
    async with one_shard(
        tiny_model, shard_dial(router, SHARD_NAME), **tls_settings(elsewhere, authority.ca)
    ) as address:
        with pytest.raises(errors.HandshakeFailed, match="another name"):
            await shard_client.describe(address, shard_dial(router, ""))
