"""The SDK: call a Stagecoach cluster from Python.

>>> from stagecoach_client import Client
>>> with Client("127.0.0.1:50050") as client:
...     for chunk in client.generate("The capital of France is", max_tokens=16, stream=True):
...         print(chunk.text, end="", flush=True)
"""

from stagecoach.errors import (
    Cancelled,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    FailedPrecondition,
    HandshakeFailed,
    InternalError,
    InvalidArgument,
    KVCacheFull,
    ModelMismatch,
    NotFound,
    OutOfRange,
    Overloaded,
    PermissionDenied,
    RateLimited,
    ShardFault,
    StagecoachError,
    StaleEpoch,
    TopologyError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from stagecoach_client.async_client import AsyncClient
from stagecoach_client.client import Client
from stagecoach_client.requests import GenerateOptions, Message
from stagecoach_client.results import (
    Chunk,
    Completion,
    FinishReason,
    Generation,
    PositionLogprobs,
    Tokenization,
    TokenLogprob,
    Usage,
)
from stagecoach_client.status import ClusterStatus, Model, PipelineStatus, SpareStatus, StageStatus
from stagecoach_client.streams import AsyncGenerationStream, GenerationStream
from stagecoach_client.tls import Tls

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "Cancelled",
    "CheckpointError",
    "Chunk",
    "Client",
    "ClusterStatus",
    "Completion",
    "ConfigError",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FinishReason",
    "GenerateOptions",
    "Generation",
    "GenerationStream",
    "HandshakeFailed",
    "InternalError",
    "InvalidArgument",
    "KVCacheFull",
    "Message",
    "Model",
    "ModelMismatch",
    "NotFound",
    "OutOfRange",
    "Overloaded",
    "PermissionDenied",
    "PipelineStatus",
    "PositionLogprobs",
    "RateLimited",
    "ShardFault",
    "SpareStatus",
    "StageStatus",
    "StagecoachError",
    "StaleEpoch",
    "Tls",
    "TokenLogprob",
    "Tokenization",
    "TopologyError",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Usage",
]
