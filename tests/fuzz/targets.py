"""All targets by name, and what makes each: a function of a scratch folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fuzz import (
    checkpoint_targets,
    isolation_target,
    lease_target,
    listen_target,
    operator_targets,
    public_targets,
    result_targets,
    service_targets,
    text_targets,
)
from tests.fuzz.engine import Target

TARGETS: dict[str, Callable[[Path], Target]] = {
    "frame": service_targets.frame,
    "micro_batch": service_targets.micro_batch,
    "hidden_states": service_targets.hidden_states,
    "session": service_targets.session,
    "assign": service_targets.assign,
    "lease": lease_target.lease,
    "isolation": isolation_target.isolation,
    "step_result": result_targets.step_result,
    "load_report": result_targets.load_report,
    "description": result_targets.description,
    "error_status": result_targets.error_status,
    "generate": public_targets.generate,
    "api_keys": public_targets.api_keys,
    "text": public_targets.text,
    "chat_template": public_targets.chat_template,
    "tokenizer_files": public_targets.tokenizer_files,
    "large_text": text_targets.large_text,
    "journal": operator_targets.journal,
    "key_file": operator_targets.key_file,
    "pem": operator_targets.pem,
    "shards": operator_targets.shards,
    "listen": listen_target.listen,
    "safetensors": checkpoint_targets.safetensors,
    "config_json": checkpoint_targets.config_json,
    "stage": checkpoint_targets.stage,
    "gguf": checkpoint_targets.gguf,
}


def make_target(name: str, scratch: Path) -> Target:
    """The target, with a folder of its own under `scratch` for what it writes."""
    folder = scratch / name
    folder.mkdir(parents=True)
    target = TARGETS[name](folder)
    assert target.name == name
    return target
