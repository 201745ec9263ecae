"""What the programs write to their logs: lines of text or of JSON, and of many requests only some."""

import argparse
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from common import tracing

from dynamo.runtime import Context

LINES_PER_SECOND = 20  # about requests, unless --log-level is debug

MAX_LINE = 10_000  # characters of a line

_WORD = re.compile(r"[^\s\"\x00-\x1f]+")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is logged, and how."""
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.add_argument("--log-format", default="text", choices=["text", "json"], help="json: an object on each line")


def set_up(level: str, form: str = "text") -> None:
    """Write to stderr what our own code logs, and warnings of others. level, form: as the options have them.

    Our loggers get a handler of their own: SGLang resets the root's.
    """
    program = tracing.program()
    handler = logging.StreamHandler()
    handler.setFormatter(_Json(program) if form == "json" else _Text(program))
    if level != "debug":
        handler.addFilter(Thinned().filter)
    for name in ("__main__", "common", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.setLevel(level.upper() if name in ("__main__", "common") else "WARNING")
        logger.addHandler(handler)
        logger.propagate = False


def request_id(context: Context) -> str:
    """The id that the caller knows the request by."""
    return context.metadata.get("x-request-id") or context.id()


def names(context: Context) -> str:
    """How a line of the log names a request: by its id, and its trace if it is part of one."""
    return _pairs(_named(context))


def _named(context: Context) -> dict[str, object]:
    trace = tracing.trace_id(context)
    return {"request_id": request_id(context), **({"trace_id": trace} if trace else {})}


def log_request(
    log: logging.Logger, context: Context, what: str = "", *, level: int = logging.INFO, **fields: object
) -> None:
    """Write the one line that a stage has for a request: `what`, and fields that programs can read too. Those that are
    None are left out."""
    if not log.isEnabledFor(level):
        return
    known = _named(context) | {name: value for name, value in fields.items() if value is not None}
    log.log(level, "%s", " ".join(filter(None, (what, _pairs(known)))), extra={"fields": known, "what": what})


class Thinned:
    """Lets so many lines about requests pass in a second, as many about those that failed, and says how many others
    there were: under load they would cost more than they tell. Warnings and errors pass."""

    def __init__(self, most: int = LINES_PER_SECOND) -> None:
        self._most = most
        self._second = 0
        self._lines = Counter[bool]()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        fields: dict[str, object] | None = getattr(record, "fields", None)
        if fields is None or record.levelno > logging.INFO:
            return True
        failed = "error" in fields
        if (second := int(record.created)) != self._second:
            if (left_out := sum(max(lines - self._most, 0) for lines in self._lines.values())) > 0:
                record.msg, record.args = f"{record.getMessage()} left_out={left_out}", ()
                fields["left_out"] = left_out
            self._second, self._lines = second, Counter()
        self._lines[failed] += 1
        return self._lines[failed] <= self._most


class _Text(logging.Formatter):
    """One line a record. The lines of a traceback are indented, so that none can look like another record."""

    def __init__(self, program: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {program}: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        return _shown(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"    {_shown(line)}" for line in super().formatException(ei).split("\n"))


class _Json(logging.Formatter):
    """One object a line: time (UTC, ISO 8601), level, program, message, and for a request its fields."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "program": self._program,
            "message": (getattr(record, "what", None) or record.getMessage())[:MAX_LINE],
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)[:MAX_LINE]
        return json.dumps(entry | getattr(record, "fields", {}), default=str).replace("\x7f", "\\u007f")


def _shown(line: str) -> str:
    """A line as it may be written: what clients send must neither begin another one nor tell a terminal what to do."""
    if len(line) > MAX_LINE:
        line = f"{line[:MAX_LINE]}…"
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _pairs(fields: Mapping[str, object]) -> str:
    """`name=value` for each. What is not one word is in quotes, so that no value can look like another field."""
    return " ".join(
        f"{name}={json.dumps(str(value)) if name == 'error' or not _WORD.fullmatch(str(value)) else value}"
        for name, value in fields.items()
    )
