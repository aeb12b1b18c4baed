"""Builds kernels.c for this very CPU when a shard first starts, keeps the result, and loads it.

There is nothing to install but a C compiler, and where there is none the layers run on torch. What was built is kept
under the user's cache directory by source, compiler and CPU, so that a change of any of them builds anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from ctypes import POINTER, c_float, c_int64, c_void_p
from pathlib import Path

from stagecoach.errors import ConfigError

logger = logging.getLogger(__name__)

BUILD_TIMEOUT_S = 120.0
_SCRATCH = "building-"  # how folders begin in which something is being built
_DIGEST_BYTES = 32
_ENOUGH_BYTES = 1 << 20  # several times the library
_SOURCE = Path(__file__).with_name("kernels.c")
_COMPILERS = ("cc", "gcc", "clang")
# The first set that the compiler takes: one without OpenMP computes on one thread whatever it is told.
_FLAGS = [["-O3", "-std=gnu11", "-fPIC", "-shared", *openmp] for openmp in (["-fopenmp"], [])]


class LayerStruct(ctypes.Structure):
    """`Layer` of kernels.c."""

    _fields_ = [
        *((name, c_int64) for name in ("hidden", "inner", "heads", "kv_heads", "head_dim", "window")),
        *((name, c_void_p) for name in ("qkv", "output", "gate_up", "down", "after")),
        *((name, c_void_p) for name in ("qkv_bias", "output_bias", "gate_up_bias", "down_bias")),
        *((name, c_void_p) for name in ("input_norm", "mlp_norm", "query_norm", "key_norm")),
        ("eps", c_float),
    ]


class StepStruct(ctypes.Structure):
    """`Step` of kernels.c."""

    _fields_ = [
        *((name, c_int64) for name in ("total_tokens", "num_rows", "block_size", "table_width", "num_threads")),
        *((name, c_void_p) for name in ("starts", "num_tokens", "first_tokens", "block_tables", "cache_slots")),
        *((name, c_void_p) for name in ("cos", "sin")),
    ]


class Library:
    """The functions of kernels.c. Pointers are addresses; each call lets go of Python's lock while it runs."""

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be loaded here."""
        library = ctypes.CDLL(str(path))
        library.lanes.restype = c_int64
        self.lanes: int = library.lanes()
        self.packed_words = library.packed_words
        self.packed_words.argtypes, self.packed_words.restype = [c_int64, c_int64], c_int64
        self.pack = library.pack
        self.pack.argtypes, self.pack.restype = [c_void_p, c_int64, c_int64, c_void_p], None
        self.linear = library.linear
        self.linear.argtypes = [
            *(c_void_p, c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
        ]
        self.layer = library.layer
        self.layer.argtypes = [POINTER(LayerStruct), POINTER(StepStruct), c_void_p, c_void_p]


@functools.cache
def load() -> Library:
    """The library for this CPU, built if it must be (seconds, once). Raises ConfigError with the reason where not."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise ConfigError(f"no C compiler here (looked for {', '.join(_COMPILERS)} and $CC)", field="kernels")
    errors: list[str] = []
    for flags in _FLAGS:
        try:
            library = _load(compiler, [*flags, _machine_flag()])
            if errors:
                logger.warning("the CPU kernels compute on one thread, as there is no OpenMP: %s", errors[0])
            return library
        except (OSError, subprocess.SubprocessError) as error:
            errors.append(str(getattr(error, "stderr", None) or error).strip()[:300])
    raise ConfigError(f"{compiler} does not build the kernels: {errors[0]}", field="kernels")


def _load(compiler: str, flags: list[str]) -> Library:
    """Raises OSError or SubprocessError."""
    folder = _folder()
    try:
        return Library(_built(compiler, flags, folder))
    except (OSError, subprocess.SubprocessError) as error:
        # A folder that is full, or that nothing may be run from. A compiler that fails, fails elsewhere as well.
        if isinstance(error, subprocess.SubprocessError) and _has_room(folder):
            raise
        logger.warning("the CPU kernels cannot be kept in %s, and are built for this process only: %s", folder, error)
        return Library(_built(compiler, flags, Path(_process_folder().name)))


def _built(compiler: str, flags: list[str], folder: Path) -> Path:
    """The library's file in `folder`. Raises OSError or SubprocessError."""
    version = subprocess.run(
        [*compiler.split(), "--version"], check=True, capture_output=True, timeout=BUILD_TIMEOUT_S
    ).stdout
    key = hashlib.sha256(b"\0".join([_SOURCE.read_bytes(), version, " ".join(flags).encode(), _cpu()])).hexdigest()
    path = folder / f"kernels-{key[:24]}.so"
    if path.exists() and not _is_whole(path):
        logger.warning("%s is damaged, and is built again", path)
        path.unlink(missing_ok=True)
    if not path.exists():
        logger.info("building the CPU kernels with %s", compiler)
        _remove_left_over(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
            built = Path(scratch) / path.name
            subprocess.run(
                [*compiler.split(), *flags, str(_SOURCE), "-o", str(built), "-lm"],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=BUILD_TIMEOUT_S,
            )
            _seal(built)
            built.replace(path)  # at once: another shard may be building the same
    return path


def _remove_left_over(folder: Path) -> None:
    """Takes away what processes have left that were ended while they built."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with contextlib.suppress(OSError):  # another process has done it
            if time.time() - scratch.stat().st_mtime > 2 * BUILD_TIMEOUT_S:
                shutil.rmtree(scratch, ignore_errors=True)


def _seal(path: Path) -> None:
    """Appends the SHA-256 of what is there, and has all of it on the disk before the file gets its name.

    The loader reads an ELF file by its headers, so what follows its last section is nothing to it. Without the digest a
    file that a power cut has shortened would kill every later start with SIGBUS, before it could say why.
    """
    with path.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _is_whole(path: Path) -> bool:
    """Whether the file ends with the SHA-256 of all before."""
    data = path.read_bytes()
    return data[-_DIGEST_BYTES:] == hashlib.sha256(data[:-_DIGEST_BYTES]).digest()


def _has_room(folder: Path) -> bool:
    """Whether a file as large as the library is can be written there."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ENOUGH_BYTES))
            file.flush()
    except OSError:
        return False
    return True


def _folder() -> Path:
    """A folder that nobody but us can put a library into."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache) / "stagecoach"
    try:
        if not folder.is_absolute():  # a user without a home, or a variable that is to be ignored then
            return Path(_process_folder().name)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:  # a read-only home, or none
        pass
    return Path(_process_folder().name)


@functools.cache
def _process_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="stagecoach-kernels-")


def _machine_flag() -> str:
    return "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"


def _cpu() -> bytes:
    """What tells this CPU from others that run the same system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}) or [platform.processor()]).encode()
