"""What `stagecoach status` shows of a router that lies: nothing in it moves the cursor."""

from __future__ import annotations

import io

from rich.console import Console

from stagecoach.v1 import inference_pb2 as pb
from stagecoach.v1 import model_pb2
from stagecoach_cli.status import _headlines, _pipeline_table, _spare_table
from stagecoach_client.status import read_status

FORGED = "x\x1b[2J\x9b31m\u202e\n"


def test_no_text_of_a_router_reaches_the_terminal_as_it_came():
    stage = pb.StageStatus(address=FORGED, device=FORGED, hostname=FORGED, kernels=FORGED)
    pipeline = pb.PipelineStatus(model=model_pb2.ModelDescription(name=FORGED), reason=FORGED, stages=[stage])
    spare = pb.SpareStatus(address="a:1", reason=f"a:1: {FORGED}")
    status = read_status(pb.GetClusterStatusResponse(pipelines=[pipeline, pipeline], spares=[spare]))
    output = io.StringIO()
    console = Console(file=output, width=400, markup=False)
    for shown in (_pipeline_table(status, 0), _spare_table(status.spares)):
        console.print(shown)
    assert r"\x1b[2J\x9b31m\u202e\n" in output.getvalue()
    assert output.getvalue().replace("\n", "").isprintable()
    assert _headlines("router", status)
