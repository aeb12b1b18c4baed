"""Access control: stands before the shard's service, and lets in only those who may call it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from stagecoach import errors
from stagecoach.errors.status import abort
from stagecoach.security import tls
from stagecoach.security.refusals import RefusalLog
from stagecoach.v1 import shard_pb2
from stagecoach_shard.rpc.service import Context, ShardService


@dataclass(frozen=True, slots=True)
class AllowedNames:
    """A caller's certificate must have one of the names in `callers`; to assign layers, one of `assigners` as well."""

    callers: frozenset[str]
    assigners: frozenset[str]

    @classmethod
    def read(cls, allow_peer: str, allow_assign: str) -> AllowedNames:
        """From the settings, each a list of names with commas between them. Raises ConfigError."""
        return cls(tls.read_names(allow_peer, "allow_peer"), tls.read_names(allow_assign, "allow_assign"))


class AccessControl:
    """Passes calls on to `service`. Until that is set, while the checkpoint is being opened, it answers Unavailable.

    `allowed`: None where links are not encrypted, as nobody can then be told from anybody else.
    """

    def __init__(self, allowed: AllowedNames | None = None) -> None:
        self._allowed = allowed
        self._refusals = RefusalLog()
        self.service: ShardService | None = None

    async def describe(self, request: shard_pb2.DescribeRequest, context: Context) -> shard_pb2.DescribeResponse:
        return await (await self._ready(context)).describe(request, context)

    async def assign(self, request: shard_pb2.AssignRequest, context: Context) -> shard_pb2.AssignResponse:
        return await (await self._ready(context, assigns=True)).assign(request, context)

    async def fetch_files(
        self, request: shard_pb2.FetchFilesRequest, context: Context
    ) -> AsyncIterator[shard_pb2.FileChunk]:
        async for chunk in (await self._ready(context)).fetch_files(request, context):
            yield chunk

    async def session(self, requests: object, context: Context) -> None:
        await (await self._ready(context)).session(requests, context)

    async def forward(self, requests: object, context: Context) -> None:
        await (await self._ready(context)).forward(requests, context)

    async def _ready(self, context: Context, *, assigns: bool = False) -> ShardService:
        """The service, or the end of the call where the caller may not call it or it is not there yet."""
        if self._allowed is not None:
            try:
                tls.check_caller(context, self._allowed.callers)
                if assigns:
                    tls.check_caller(context, self._allowed.assigners, "allow_assign")
            except errors.PermissionDenied as error:
                self._refusals.refused(context.peer(), error)
                await abort(context, error)
        if self.service is None:
            await abort(context, errors.Unavailable("the shard is reading its checkpoint", retry_after_s=1.0))
        return self.service
