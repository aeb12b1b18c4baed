"""What the public service does when the world changes between two of its looks at it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stagecoach.errors import FailedPrecondition, Unavailable
from stagecoach.v1 import inference_pb2 as pb
from stagecoach_router.frontend import auth_interceptor, grpc_service
from stagecoach_router.frontend.grpc_service import InferenceService
from stagecoach_router.tenants.tenants import Tenants


def make_service(**serving: Any) -> InferenceService:
    auth_interceptor._calling_tenant.set(Tenants(None, 0.0).identify(()))
    service = InferenceService()
    facts: Any = SimpleNamespace(model=SimpleNamespace(name="tiny"), **serving)
    service.serving = facts
    return service


class JustLapsed:
    """The requests that are known: at the second look, this one's time is up."""

    def knows(self, key: object) -> bool:
        return True

    def find(self, key: object, digest: bytes) -> None:
        return None


async def raise_it(context: object, error: Exception) -> None:
    raise error


class NoneKnown:
    """The requests that are known: none, and there is room."""

    def knows(self, key: object) -> bool:
        return False

    def check_room(self, caller: object, num_sequences: int) -> None:
        pass


async def test_a_request_that_is_read_while_the_router_closes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(*_: object, **__: object) -> None:
        assert service.num_reading == 1
        service.serving = None

    monkeypatch.setattr(grpc_service, "abort", raise_it)
    monkeypatch.setattr(grpc_service, "read_request", read)
    service = make_service(requests=NoneKnown(), encoder=None, engine=None)
    context: Any = SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1")
    with pytest.raises(Unavailable, match="stopping") as caught:
        await service.Generate(pb.GenerateRequest(prompt="late"), context)
    assert caught.value.retry_after_s > 0
    assert service.num_reading == 0
    await service.all_read()


async def test_a_request_that_comes_back_while_the_router_closes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def digest_of(*_: object) -> bytes:
        service.serving = None
        return b""

    monkeypatch.setattr(grpc_service, "abort", raise_it)
    monkeypatch.setattr(grpc_service, "digest_of", digest_of)
    service = make_service(requests=JustLapsed())
    context: Any = SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1")
    with pytest.raises(Unavailable, match="stopping"):
        await service.Generate(pb.GenerateRequest(request_id="old"), context)


async def test_a_request_that_is_forgotten_between_two_looks_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_service, "abort", raise_it)
    service = make_service(requests=JustLapsed())
    context: Any = SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1")
    with pytest.raises(FailedPrecondition, match="not known here, or not any more"):
        await service.Generate(pb.GenerateRequest(request_id="old", from_tokens=[3]), context)


async def test_a_status_is_of_what_was_served_when_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stop_serving(timeout_s: float) -> None:
        service.serving = None

    written = pb.GetClusterStatusResponse(num_running=7)
    monkeypatch.setattr(grpc_service, "write_status", lambda *_: written)
    pipeline = SimpleNamespace(lost=None, refresh_loads=stop_serving)
    engine = SimpleNamespace(replicas=[SimpleNamespace(pipeline=pipeline)])
    service = make_service(engine=engine, pipelines=None)
    context: Any = None
    assert await service.GetClusterStatus(pb.GetClusterStatusRequest(), context) is written
