"""A call whose caller or deadline ended it a moment before the server could say why it fails."""

import asyncio

import grpc.aio
import pytest

from stagecoach import errors
from stagecoach.errors.status import abort


class EndedCall:
    async def abort(self, code, details, trailing_metadata):
        raise grpc.aio.InternalError("a status cannot be sent any more")


async def test_its_task_ends_as_if_it_had_been_cancelled_in_time():
    with pytest.raises(asyncio.CancelledError):
        await abort(EndedCall(), errors.DeadlineExceeded("too late"))
