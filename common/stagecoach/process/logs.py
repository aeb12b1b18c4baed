"""Logs: one line an event, on stderr.

What is logged quotes what peers and callers sent. So nothing in a message begins a line of its own or moves a cursor,
no record is long, and what is said again and again is said once in a while, with how often it was said.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from stagecoach.process.relayed_log import RelayHandler
from stagecoach.process.standard_streams import own_standard_error
from stagecoach.visible_text import cut, visible

# Of one record, its traceback included.
MAX_LENGTH = 16_384
# Of an error, as far as it is looked at to tell whether it is the same again: at the end there may be a time of day.
MAX_KEY_LENGTH = 256
# A warning that is repeated is left out for so long, and told with how many were when it comes again.
REPEAT_S = 30.0
# So many different warnings are remembered.
MAX_REMEMBERED = 256
# Before each line of a traceback, which may quote anything. No line of a log begins like that.
_MARK = "    | "


def configure_logging(level: str) -> None:
    """`level` is a name of the logging module, in any case."""
    handler = RelayHandler(own_standard_error())
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(RepeatFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler])


class LineFormatter(logging.Formatter):
    """A line a record; the lines of a traceback follow, each with a mark before it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        # Cut first, so that the rest costs no more than what is kept.
        record.message = visible(cut(record.message, MAX_LENGTH // 4))
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802
        text = super().formatException(ei)  # type: ignore[arg-type]
        begin, end = text[: MAX_LENGTH // 4], text[MAX_LENGTH // 4 :][-MAX_LENGTH // 4 :]
        lines = begin.split("\n") if not end else [*begin.split("\n"), "…", *end.split("\n")]
        return "\n".join(_MARK + visible(line) for line in lines)


@dataclass(slots=True)
class _Repeated:
    since_s: float
    num_left_out: int = 0


class RepeatFilter(logging.Filter):
    """Lets a warning through once in `REPEAT_S`. What breaks may break again and again, for the same reason."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock  # not the record's own time: a clock that is set back would silence what breaks till then
        self._seen: OrderedDict[tuple[str, str, str], _Repeated] = OrderedDict()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        message = cut(record.getMessage(), MAX_LENGTH // 4)
        error = record.exc_info[1] if record.exc_info else None  # of the same words, another one is other news
        key = (record.name, message, "" if error is None else cut(repr(error), MAX_KEY_LENGTH))
        now_s = self._clock()
        seen = self._seen.get(key)
        if seen is not None and now_s - seen.since_s < REPEAT_S:
            seen.num_left_out += 1
            return False
        if seen is not None and seen.num_left_out:
            past_s = now_s - seen.since_s
            record.msg, record.args = f"{message} ({seen.num_left_out} times more in the last {past_s:.0f} s)", None
        self._seen[key] = _Repeated(now_s)
        self._seen.move_to_end(key)
        if len(self._seen) > MAX_REMEMBERED:
            self._seen.popitem(last=False)
        return True
