"""The committed generated code is what the pinned generator makes of protos/."""

from pathlib import Path

import google.rpc.status_pb2
import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).parents[3]


def test_generated_code_is_up_to_date(tmp_path):
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    folders = (
        ROOT / "protos",
        Path(grpc_tools.__file__).parent / "_proto",
        Path(google.rpc.status_pb2.__file__).parents[2],
    )
    arguments = [f"--proto_path={folder}" for folder in folders]
    arguments += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", *arguments, *map(str, protos)]) == 0
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*")}
    folder = ROOT / "common" / "stagecoach" / "v1"
    committed = {Path("stagecoach/v1") / path.name: path.read_text() for path in folder.glob("*_pb2*")}
    assert committed == made, "run `make protos`"


def test_payloads_have_the_highest_field_number_of_their_message():
    from stagecoach.rpc.framing import PAYLOAD_FIELD
    from stagecoach.v1 import shard_pb2

    for message in (shard_pb2.MicroBatch, shard_pb2.SessionResponse):
        assert message.DESCRIPTOR.fields_by_name["payload"].number == PAYLOAD_FIELD
        assert max(message.DESCRIPTOR.fields_by_number) == PAYLOAD_FIELD
