"""Stands before the shard's service: lets in who may call it, and says at once that it is up while it still loads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection

from stagecoach import errors, tls
from stagecoach.v1 import shard_pb2
from stagecoach_shard.service import Context, ShardService


class LoadingGate:
    """Passes calls on to `service` once it is set, and answers Unavailable before.

    `allowed_callers` are the names that certificates may carry; None where links are not encrypted.
    """

    def __init__(self, allowed_callers: Collection[str] | None = None) -> None:
        self._allowed_callers = allowed_callers
        self.service: ShardService | None = None

    async def describe(self, request: shard_pb2.DescribeRequest, context: Context) -> shard_pb2.DescribeResponse:
        return await (await self._ready(context)).describe(request, context)

    async def fetch_files(
        self, request: shard_pb2.FetchFilesRequest, context: Context
    ) -> AsyncIterator[shard_pb2.FileChunk]:
        async for chunk in (await self._ready(context)).fetch_files(request, context):
            yield chunk

    async def session(self, requests: object, context: Context) -> None:
        await (await self._ready(context)).session(requests, context)

    async def forward(self, requests: object, context: Context) -> None:
        await (await self._ready(context)).forward(requests, context)

    async def _ready(self, context: Context) -> ShardService:
        if self._allowed_callers is not None:
            try:
                tls.check_caller(context, self._allowed_callers)
            except errors.PermissionDenied as error:
                await errors.abort(context, error)
        if self.service is None:
            await errors.abort(context, errors.Unavailable("the shard is loading its layers", retry_after_s=1.0))
        return self.service
