from google.rpc import status_pb2 as _status_pb2
from stagecoach.v1 import model_pb2 as _model_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("protocol_version", "software_version", "shard_id", "model", "layers", "dtype", "device", "block_size", "num_blocks", "num_free_blocks", "kv_cache_bytes", "weights_bytes", "max_batch_tokens", "pid", "hostname", "max_queued_steps", "kernels", "assignable", "process_id", "files_digest")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOSTNAME_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_STEPS_FIELD_NUMBER: _ClassVar[int]
    KERNELS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNABLE_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    FILES_DIGEST_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    software_version: str
    shard_id: str
    model: _model_pb2.ModelDescription
    layers: _model_pb2.LayerRange
    dtype: _model_pb2.DType
    device: str
    block_size: int
    num_blocks: int
    num_free_blocks: int
    kv_cache_bytes: int
    weights_bytes: int
    max_batch_tokens: int
    pid: int
    hostname: str
    max_queued_steps: int
    kernels: str
    assignable: bool
    process_id: str
    files_digest: str
    def __init__(self, protocol_version: _Optional[int] = ..., software_version: _Optional[str] = ..., shard_id: _Optional[str] = ..., model: _Optional[_Union[_model_pb2.ModelDescription, _Mapping]] = ..., layers: _Optional[_Union[_model_pb2.LayerRange, _Mapping]] = ..., dtype: _Optional[_Union[_model_pb2.DType, str]] = ..., device: _Optional[str] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., kv_cache_bytes: _Optional[int] = ..., weights_bytes: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., pid: _Optional[int] = ..., hostname: _Optional[str] = ..., max_queued_steps: _Optional[int] = ..., kernels: _Optional[str] = ..., assignable: bool = ..., process_id: _Optional[str] = ..., files_digest: _Optional[str] = ...) -> None: ...

class AssignRequest(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "layers")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    layers: _model_pb2.LayerRange
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., layers: _Optional[_Union[_model_pb2.LayerRange, _Mapping]] = ...) -> None: ...

class AssignResponse(_message.Message):
    __slots__ = ("description",)
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    description: DescribeResponse
    def __init__(self, description: _Optional[_Union[DescribeResponse, _Mapping]] = ...) -> None: ...

class FetchFilesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("name", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("open", "report_load")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    REPORT_LOAD_FIELD_NUMBER: _ClassVar[int]
    open: OpenRequest
    report_load: ReportLoad
    def __init__(self, open: _Optional[_Union[OpenRequest, _Mapping]] = ..., report_load: _Optional[_Union[ReportLoad, _Mapping]] = ...) -> None: ...

class ReportLoad(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("protocol_version", "model_fingerprint", "layers", "dtype", "lease_id", "epoch", "num_blocks", "block_size", "max_slots", "next_hop", "silence_timeout_s")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SLOTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_HOP_FIELD_NUMBER: _ClassVar[int]
    SILENCE_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    model_fingerprint: str
    layers: _model_pb2.LayerRange
    dtype: _model_pb2.DType
    lease_id: int
    epoch: int
    num_blocks: int
    block_size: int
    max_slots: int
    next_hop: str
    silence_timeout_s: float
    def __init__(self, protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., layers: _Optional[_Union[_model_pb2.LayerRange, _Mapping]] = ..., dtype: _Optional[_Union[_model_pb2.DType, str]] = ..., lease_id: _Optional[int] = ..., epoch: _Optional[int] = ..., num_blocks: _Optional[int] = ..., block_size: _Optional[int] = ..., max_slots: _Optional[int] = ..., next_hop: _Optional[str] = ..., silence_timeout_s: _Optional[float] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("opened", "result", "fault", "load", "payload")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    opened: OpenResponse
    result: StepResult
    fault: Fault
    load: LoadReport
    payload: bytes
    def __init__(self, opened: _Optional[_Union[OpenResponse, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., fault: _Optional[_Union[Fault, _Mapping]] = ..., load: _Optional[_Union[LoadReport, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("epoch", "step", "outputs", "timings")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    outputs: _containers.RepeatedCompositeFieldContainer[OutputBlock]
    timings: _containers.RepeatedCompositeFieldContainer[StageTiming]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[OutputBlock, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ...) -> None: ...

class StageTiming(_message.Message):
    __slots__ = ("decode_s", "queue_s", "compute_s")
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    decode_s: float
    queue_s: float
    compute_s: float
    def __init__(self, decode_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., compute_s: _Optional[float] = ...) -> None: ...

class OutputBlock(_message.Message):
    __slots__ = ("num_rows", "num_columns", "candidates", "log_sum_exp", "dtype")
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_COLUMNS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    LOG_SUM_EXP_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    num_rows: int
    num_columns: int
    candidates: bool
    log_sum_exp: bool
    dtype: _model_pb2.DType
    def __init__(self, num_rows: _Optional[int] = ..., num_columns: _Optional[int] = ..., candidates: bool = ..., log_sum_exp: bool = ..., dtype: _Optional[_Union[_model_pb2.DType, str]] = ...) -> None: ...

class Fault(_message.Message):
    __slots__ = ("epoch", "step", "status")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    status: _status_pb2.Status
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class LoadReport(_message.Message):
    __slots__ = ("num_steps", "num_tokens", "compute_s", "wait_s", "decode_s", "queue_depth", "num_fast_frames", "num_frames", "encode_s", "queue_s", "number", "lease_num_steps", "lease_compute_s", "lease_queue_depth")
    NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    NUM_FAST_FRAMES_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    LEASE_NUM_STEPS_FIELD_NUMBER: _ClassVar[int]
    LEASE_COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    LEASE_QUEUE_DEPTH_FIELD_NUMBER: _ClassVar[int]
    num_steps: int
    num_tokens: int
    compute_s: float
    wait_s: float
    decode_s: float
    queue_depth: int
    num_fast_frames: int
    num_frames: int
    encode_s: float
    queue_s: float
    number: int
    lease_num_steps: int
    lease_compute_s: float
    lease_queue_depth: int
    def __init__(self, num_steps: _Optional[int] = ..., num_tokens: _Optional[int] = ..., compute_s: _Optional[float] = ..., wait_s: _Optional[float] = ..., decode_s: _Optional[float] = ..., queue_depth: _Optional[int] = ..., num_fast_frames: _Optional[int] = ..., num_frames: _Optional[int] = ..., encode_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., number: _Optional[int] = ..., lease_num_steps: _Optional[int] = ..., lease_compute_s: _Optional[float] = ..., lease_queue_depth: _Optional[int] = ...) -> None: ...

class MicroBatch(_message.Message):
    __slots__ = ("header", "payload")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    header: MicroBatchHeader
    payload: bytes
    def __init__(self, header: _Optional[_Union[MicroBatchHeader, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class MicroBatchHeader(_message.Message):
    __slots__ = ("lease_id", "epoch", "step", "row_slots", "row_starts", "row_num_tokens", "block_table_updates", "outputs", "dtype", "first_layer", "timings")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ROW_SLOTS_FIELD_NUMBER: _ClassVar[int]
    ROW_STARTS_FIELD_NUMBER: _ClassVar[int]
    ROW_NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TABLE_UPDATES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    epoch: int
    step: int
    row_slots: _containers.RepeatedScalarFieldContainer[int]
    row_starts: _containers.RepeatedScalarFieldContainer[int]
    row_num_tokens: _containers.RepeatedScalarFieldContainer[int]
    block_table_updates: _containers.RepeatedCompositeFieldContainer[BlockTableUpdate]
    outputs: _containers.RepeatedCompositeFieldContainer[OutputGroup]
    dtype: _model_pb2.DType
    first_layer: int
    timings: _containers.RepeatedCompositeFieldContainer[StageTiming]
    def __init__(self, lease_id: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., row_slots: _Optional[_Iterable[int]] = ..., row_starts: _Optional[_Iterable[int]] = ..., row_num_tokens: _Optional[_Iterable[int]] = ..., block_table_updates: _Optional[_Iterable[_Union[BlockTableUpdate, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[OutputGroup, _Mapping]]] = ..., dtype: _Optional[_Union[_model_pb2.DType, str]] = ..., first_layer: _Optional[int] = ..., timings: _Optional[_Iterable[_Union[StageTiming, _Mapping]]] = ...) -> None: ...

class BlockTableUpdate(_message.Message):
    __slots__ = ("slot", "first", "block_ids")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    slot: int
    first: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, slot: _Optional[int] = ..., first: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class OutputGroup(_message.Message):
    __slots__ = ("token_indices", "num_candidates", "log_sum_exp", "temperatures")
    TOKEN_INDICES_FIELD_NUMBER: _ClassVar[int]
    NUM_CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    LOG_SUM_EXP_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    token_indices: _containers.RepeatedScalarFieldContainer[int]
    num_candidates: int
    log_sum_exp: bool
    temperatures: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_indices: _Optional[_Iterable[int]] = ..., num_candidates: _Optional[int] = ..., log_sum_exp: bool = ..., temperatures: _Optional[_Iterable[float]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("credits",)
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    credits: int
    def __init__(self, credits: _Optional[int] = ...) -> None: ...
