"""Goes on with the requests that a former router left in the journal."""

from __future__ import annotations

import asyncio
import logging

from stagecoach.errors import StagecoachError
from stagecoach.v1 import model_pb2
from stagecoach_router.durability.journal import Journal
from stagecoach_router.durability.request_registry import RequestRegistry
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.tenants.tenants import Tenants

logger = logging.getLogger(__name__)


async def recover_requests(
    journal: Journal,
    requests: RequestRegistry,
    tenants: Tenants,
    model: model_pb2.ModelDescription,
    linger_s: float,
) -> None:
    """Begins the journal's requests again, for as long as their callers may take to come back.

    They count as running for their tenants. A request that cannot go on is logged and forgotten. Raises ConfigError for
    a journal of another model, or a damaged one.

    Where this is cut short, as by a signal to stop, the journal is closed: whoever then fails the requests that were
    begun again must not have the journal forget them.
    """
    try:
        await _begin_again(journal, requests, tenants, model, linger_s)
    except BaseException:
        await journal.close()
        raise


async def _begin_again(
    journal: Journal,
    requests: RequestRegistry,
    tenants: Tenants,
    model: model_pb2.ModelDescription,
    linger_s: float,
) -> None:
    left = await journal.load(model.fingerprint)
    going_on = []
    for entry in left:
        await asyncio.sleep(0)  # long answers are spelt out anew, and shards wait for a word meanwhile
        try:
            entry.check(vocab_size=model.vocab_size, context_length=model.context_length)
            tenant = tenants.former(entry.key[0])
            caller = Caller(tenant.name, tenant)
            state = requests.accept(entry.key, entry.digest, entry.request, entry.past, caller=caller)
        except Exception as error:  # one that nobody foresaw would keep the router from starting, each time anew
            unforeseen = not isinstance(error, StagecoachError)
            text = "request %s of the journal cannot go on: %s"
            logger.warning(text, entry.request.request_id, repr(error) if unforeseen else error, exc_info=unforeseen)
            journal.forget(entry.key)
        else:
            going_on.append(state)
    for state in going_on:  # from now on callers can come back, and with many requests it took a while to get here
        requests.linger(state, linger_s)
        await asyncio.sleep(0)
    if left:
        logger.info("%d requests of the journal, %d of them go on", len(left), requests.num_running)
