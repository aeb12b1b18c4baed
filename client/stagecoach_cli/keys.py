"""`stagecoach keys`: API keys for a router's callers."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from stagecoach.errors import ConfigError
from stagecoach.security.api_keys import Grant, check_grant, check_name, new_entry, new_key, read_entries, write_entry

keys = typer.Typer(no_args_is_help=True)

PRIVATE_MODE = 0o600


@keys.callback()
def _keys() -> None:
    """Make API keys for a router's callers."""  # without a callback, `keys` itself would be its only command


@keys.command()
def new(
    name: Annotated[str, typer.Option(help="Whose key it is. Keys of the same name share their limits.")],
    file: Annotated[
        Path | None,
        typer.Option(help="Add the entry to this file, for the router's --api-keys. By default, print the entry."),
    ] = None,
    requests_per_minute: Annotated[
        int | None,
        typer.Option(
            help="The most calls in a minute, of those that generate or tokenize. By default, there is no limit."
        ),
    ] = None,
    tokens_per_minute: Annotated[
        int | None, typer.Option(help="The most tokens in a minute, of prompts and outputs. By default, no limit.")
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            help="The most sequences at the same time, a request with n completions being n. By default, no limit."
        ),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="A model that the key may use. May be given again. By default, all.")
    ] = None,
    max_priority: Annotated[int, typer.Option(help="The highest priority that its requests may ask for.")] = 0,
    shares_cache: Annotated[
        bool, typer.Option("--shares-cache", help="Share cached prefixes with the other names that have this option.")
    ] = False,
) -> None:
    """Make a key and print it. It is shown only this once: what is kept can recognise the key, but not tell it."""
    grant = Grant(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrent=max_concurrent,
        models=tuple(model) if model else None,
        max_priority=max_priority,
        shares_cache=shares_cache,
    )
    key = new_key()
    entry = new_entry(key, check_name(name, ""), check_grant(grant, ""))
    text = write_entry(entry)
    if file is None:
        print("# The entry, for the file of the router's --api-keys. The key itself is in the last line.")
        print(text)
        print(key)
        return
    _append(file, text, lambda: print(key, flush=True))
    print(f"{name}: entry {entry.id} added to {file}", file=sys.stderr)


def _append(file: Path, entry: str, show_key: Callable[[], None]) -> None:
    """Adds the entry to the file, which is made if it is absent. If it raises, nothing was added.

    The key is shown when all but the writing is done: an entry whose key nobody has seen is of no use, nor is a key
    without an entry. Raises ConfigError where the file cannot be used.
    """
    with contextlib.ExitStack() as opened:
        with _typed(file):
            # A new file is for its owner only. Its digests do not give the keys away, but it has names and limits, too.
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE_MODE)
            entries = opened.enter_context(open(descriptor, "r+", encoding="utf-8"))
            former = entries.read()
        separator = "" if not former else "\n" if former.endswith("\n") else "\n\n"
        read_entries(former + separator + entry)
        show_key()
        with _typed(file):
            entries.write(separator + entry)  # in one write: a router that reads meanwhile sees all of it or nothing
            entries.flush()


@contextlib.contextmanager
def _typed(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}", field="file", value=file) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text", field="file", value=file) from error
