"""All that a router makes of a model's small files: its tokenizer and its chat template."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from stagecoach.errors import CheckpointError
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.model_files import ModelFiles
from stagecoach_router.text.template_process import TemplateProcess
from stagecoach_router.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ModelText:
    """What has to do with a model's text. `digest`: of the files that it was made of, "" where that is not known."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate
    digest: str = ""

    @classmethod
    async def read(cls, files: ModelFiles, digest: str = "") -> ModelText:
        """Raises CheckpointError for files that cannot be used, whatever is wrong with them."""
        tokenizer, template = await asyncio.to_thread(_read, files)
        return cls(tokenizer, template, digest)


def _read(files: ModelFiles) -> tuple[Tokenizer, ChatTemplate]:
    try:
        return Tokenizer(files), ChatTemplate.from_files(files, TemplateProcess())
    except CheckpointError:
        raise
    except BaseException as error:  # the library is in Rust, whose panics are no Exceptions
        raise CheckpointError(f"the model's small files cannot be used: {error!r}", field="tokenizer.json") from error
