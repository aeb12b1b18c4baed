"""How a process gets its settings: defaults < TOML file (--config) < environment < flags. Read once, in `__main__`.

Each process declares one frozen settings class; an unknown key in the file or an unknown flag is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from stagecoach.errors import ConfigError, InvalidArgument

# Characters. All settings with long paths have some thousand.
MAX_CONFIG_LENGTH = 1 << 20


class ProcessSettings(BaseSettings):
    """What the settings class of each process derives from."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # the other sources are `read_settings`'s
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


SettingsT = TypeVar("SettingsT", bound=ProcessSettings)


def read_settings(kind: type[SettingsT], program: str, argv: Sequence[str], env_prefix: str) -> SettingsT:
    """The settings of `program`. Exits with status 2 and one line per mistake where they cannot be used."""
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument(
        "--config", type=Path, metavar="FILE", help="settings in TOML; the environment and flags go first"
    )
    known, rest = first.parse_known_args(argv)

    class _FromSources(kind):  # type: ignore[valid-type,misc]
        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **_: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            parser = argparse.ArgumentParser(
                prog=program, description=kind.__doc__, parents=[first], allow_abbrev=False
            )
            return (
                CliSettingsSource(
                    settings_cls,
                    root_parser=parser,
                    cli_parse_args=list(rest),
                    cli_kebab_case=True,
                    cli_hide_none_type=True,
                    cli_avoid_json=True,
                ),
                EnvSettingsSource(settings_cls, env_prefix=env_prefix),
                InitSettingsSource(settings_cls, init_kwargs=_read_toml(known.config)),
            )

    try:
        loaded = _FromSources()
        return kind.model_construct(**dict(loaded))
    except ValidationError as error:
        for mistake in error.errors():
            where = ".".join(str(part) for part in mistake["loc"])
            print(f"{program}: error: {where.replace('_', '-')}: {mistake['msg']}", file=sys.stderr)  # noqa: T201
    except ConfigError as error:
        print(f"{program}: error: {error}", file=sys.stderr)  # noqa: T201
    raise SystemExit(2)


def _read_toml(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        with path.open(encoding="utf-8") as file:  # which may be a pipe, as `<(...)` of a shell is
            text = file.read(MAX_CONFIG_LENGTH + 1)
        if len(text) > MAX_CONFIG_LENGTH:
            raise ConfigError(f"config: {path} has more than {MAX_CONFIG_LENGTH} characters", field="config")
        values = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config: {path}: {error}", field="config") from error
    return {key.replace("-", "_"): value for key, value in values.items()}


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str, field: str) -> int:
    """Bytes from "512M", "1.5GiB" or "1000000"; units are powers of 1,024. Raises InvalidArgument."""
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise InvalidArgument(f"{field} must be a size such as 512M or 2G; got {text!r}", field=field, value=text)
    return int(float(match[1]) * _UNITS[match[2].upper()])
