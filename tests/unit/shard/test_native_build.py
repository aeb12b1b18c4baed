"""Building the CPU kernels: once for a machine, into a folder that is ours alone, or with a reason why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stagecoach.errors import ConfigError
from stagecoach_shard.native import library
from tests.unit.shard.native_layers import compiler

# Takes the place of the compiler: writes down that it was asked to build, and gives what was built before.
RECORDING_COMPILER = """#!/bin/sh
case "$*" in
*--version*) echo "recording {version}" ;;
*)
  echo "$*" >> {log}
  case "$*" in *{refused}*) echo "no such thing here" >&2; exit 1 ;; esac
  while [ "$1" != -o ]; do shift; done
  cp {built} "$2"
  ;;
esac
"""


class Compiler:
    """A compiler that takes no time, and what it was asked for."""

    def __init__(self, folder: Path, built: Path) -> None:
        self.path = folder / "recording-cc"
        self._log = folder / "asked"
        self._built = built
        self.install()

    def install(self, *, version: str = "1", refused: str = "nothing") -> None:
        """Versions of different tests differ, as they may share the folder of the process."""
        version = f"{self.path.parent} {version}"
        text = RECORDING_COMPILER.format(version=version, log=self._log, built=self._built, refused=refused)
        self.path.write_text(text)
        self.path.chmod(0o700)

    @property
    def asked(self) -> list[str]:
        """The command lines that were to build something."""
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with all the functions, made the quickest way."""
    path = tmp_path_factory.mktemp("built") / "kernels.so"
    source = library.__file__.replace("library.py", "kernels.c")
    command = [*compiler().split(), "-O0", "-std=gnu11", "-fPIC", "-shared", source, "-o", str(path), "-lm"]
    subprocess.run(command, check=True, timeout=60)
    return path


@pytest.fixture
def recording(tmp_path: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """The compiler of a user with an empty cache, in tmp_path/cache."""
    fake = Compiler(tmp_path, built)
    monkeypatch.setenv("CC", str(fake.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "load", library.load.__wrapped__)
    return fake


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "stagecoach").glob("*"))


def test_what_was_built_is_kept_and_used_again(recording: Compiler, tmp_path: Path) -> None:
    assert library.load().lanes == library.load().lanes
    assert len(recording.asked) == 1
    assert len(kept(tmp_path)) == 1, "the library, and nothing that was only needed while building"
    assert (tmp_path / "cache" / "stagecoach").stat().st_mode & 0o777 == 0o700


def test_another_compiler_or_cpu_builds_anew(recording: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load()
    recording.install(version="2")
    library.load()
    assert len(recording.asked) == 2
    monkeypatch.setattr(library, "_cpu", lambda: b"another")
    library.load()
    assert len(recording.asked) == 3


def test_a_compiler_with_arguments(recording: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{recording.path} -g")
    library.load()
    assert recording.asked[0].startswith("-g ")


def test_a_folder_that_others_may_write_to_is_not_used(recording: Compiler, tmp_path: Path) -> None:
    shared = tmp_path / "cache" / "stagecoach"
    shared.mkdir(parents=True)
    for mode in (0o777, 0o775):
        shared.chmod(mode)
        library.load()
        assert kept(tmp_path) == []
    assert len(recording.asked) == 1, "one folder of its own serves a process"


@pytest.mark.parametrize("cache", ["/dev/null", "some/folder"], ids=["no-folder", "relative"])
def test_without_a_usable_cache_a_folder_of_the_process_serves(
    recording: Compiler, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    assert library.load().lanes > 0
    assert not (tmp_path / "some").exists()
    folder = library._process_folder()
    assert Path(folder.name).stat().st_mode & 0o777 == 0o700
    assert kept(tmp_path) == []


def test_without_openmp_it_is_built_for_one_thread_and_says_so(
    recording: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    recording.install(refused="-fopenmp")
    library.load()
    assert ["-fopenmp" in line for line in recording.asked] == [True, False]
    assert "one thread" in caplog.text
    assert "no such thing here" in caplog.text


def test_a_compiler_that_fails_is_named_with_what_it_said(recording: Compiler, tmp_path: Path) -> None:
    recording.install(refused="-O3")
    with pytest.raises(ConfigError, match="recording-cc does not build the kernels: no such thing here") as caught:
        library.load()
    assert caught.value.field == "kernels"
    assert kept(tmp_path) == []


@pytest.mark.parametrize("missing", ["/nowhere/cc", "  "])
def test_a_compiler_that_is_not_there_is_named(
    recording: Compiler, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", missing)
    with pytest.raises(ConfigError, match="does not build the kernels"):
        library.load()


def test_a_library_that_does_not_load_is_a_reason_and_not_a_crash(recording: Compiler, tmp_path: Path) -> None:
    recording.install()
    recording.path.write_text(recording.path.read_text().replace("cp ", "echo nonsense > $2; true "))
    with pytest.raises(ConfigError, match="does not build the kernels"):
        library.load()


@pytest.mark.parametrize("left", [0, 10, 4096, 0.5, 0.99], ids=["none", "bytes", "page", "half", "most"])
def test_a_kept_library_that_was_cut_off_is_built_again(
    recording: Compiler, left: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In a process of its own, which a file that is loaded though it is cut off would end with SIGBUS."""
    library.load()
    [file] = kept(tmp_path)
    whole = file.read_bytes()
    file.unlink()  # and not written over: this process runs it
    file.write_bytes(whole[: int(left if left >= 1 else left * len(whole))])
    program = "from stagecoach_shard.native import library; print(library.load().lanes)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip() in ("4", "8", "16")) == (0, True), done.stderr
    assert [kept_file.read_bytes() for kept_file in kept(tmp_path)] == [whole]
    assert len(recording.asked) == 2


def test_a_full_cache_folder_is_no_reason_to_go_without_kernels(
    recording: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_has_room", lambda folder: folder != tmp_path / "cache" / "stagecoach")
    full = tmp_path / "cache" / "stagecoach"
    text = recording.path.read_text().replace(
        "cp ", f'case "$2" in {full}/*) echo "no space left" >&2; exit 1;; esac; cp '
    )
    recording.path.write_text(text)
    assert library.load().lanes in (4, 8, 16)
    assert kept(tmp_path) == []
    assert f"cannot be kept in {full}" in caplog.text


def test_what_a_process_left_that_was_ended_while_it_built_is_taken_away(recording: Compiler, tmp_path: Path) -> None:
    old, young = (tmp_path / "cache" / "stagecoach" / f"building-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True, mode=0o700)
        (folder / "half.so").touch()
    folder.parent.chmod(0o700)
    os.utime(old, (1e9, 1e9))
    library.load()
    assert not old.exists()
    assert young.exists(), "another process may be at it"


def test_two_processes_that_build_at_once_both_load_it(recording: Compiler, tmp_path: Path) -> None:
    """Each waits in the compiler until the other is there too."""
    meet = tmp_path / "meet"
    meet.mkdir()
    rendezvous = (
        f": > {meet}/$$; n=0; while [ $(ls {meet} | wc -l) -lt 2 ] && [ $n -lt 500 ]; "
        "do sleep 0.02; n=$((n+1)); done; cp "
    )
    recording.path.write_text(recording.path.read_text().replace("cp ", rendezvous))
    program = "from stagecoach_shard.native import library; print(library.load().lanes)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert printed[0] == printed[1] != ""
    assert len(recording.asked) == 2
    assert len(list(meet.iterdir())) == 2
    assert len(kept(tmp_path)) == 1


def test_the_real_compiler_builds_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in between is faked, but for the optimiser, which is not what is tested."""
    monkeypatch.setenv("CC", compiler())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_FLAGS", [["-O0", *(flag for flag in library._FLAGS[0] if flag != "-O3")]])
    assert library.load.__wrapped__().lanes in (4, 8, 16)
    assert len(kept(tmp_path)) == 1
