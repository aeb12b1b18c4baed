"""What a chat template may take is bounded by the process that renders it; a router outlives every template."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from stagecoach.errors import InvalidArgument, Unavailable
from stagecoach_router.tenants.caller import Caller
from stagecoach_router.text import template_process
from stagecoach_router.text.chat_template import ChatTemplate
from stagecoach_router.text.template_process import RenderLimits, TemplateProcess
from tests.unit.router.anyone import ANYONE

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER = [{"role": "user", "content": "hi"}]
# Of this process, while the worker renders.
MAX_PEAK_BYTES = 8 * RenderLimits().max_output_length
ROUNDS = "{% for a in range(9999) %}"
ENDLESS = [
    f"{ROUNDS * 3}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    f"{ROUNDS * 2}{{% for a in range(9999) if false %}}x{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    "{% macro m(n) %}{{ m(n - 1) if n else '' }}{{ m(n - 1) if n else '' }}{% endmacro %}{{ m(40) }}",
    "{% for a in [1] recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "{% set r = range(99999) %}" + ROUNDS + "{% set x = r | list | length %}{% endfor %}",
    "{{ range(10 ** 9) }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 9 * [1] }}",
    "{{ 2 ** (10 ** 9) }}",
    "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for a in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
]
BIG = "{% set x = 'a' * 9999999 %}"
# A list that holds itself twice, forty times over: a few hundred bytes that come to terabytes when written.
DEEP = "{% set ns = namespace(x=[1]) %}{% for a in range(40) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
DEEP_PAIR = DEEP + DEEP.replace("ns", "other")

HUGE = [
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' % 1.5 }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ 'x'.zfill(999999999) }}",
    "{{ '\t'.expandtabs(999999999) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ 'x' | indent(999999999, true) }}",
    "{{ [1] | batch(999999999, 0) | list }}",
    "{{ [1] | slice(999999999) | list }}",
    "{{ 5 | round(-999999999) }}",
    "{{ 5 | round(999999999, 'ceil') }}",
    "{{ [[1]] | tojson(indent=999999999) }}",
    BIG + "{{ x.replace('', x) }}",
    BIG + "{{ x | replace('a', x) }}",
    BIG + "{{ x.join(x) }}",
    BIG + "{{ [x, x, x] | join(x) }}",
    BIG + "{{ range(9999) | map('default', x) | list }}{{ [x, x, x] | string }}",
    BIG + "{{ [none] * 999 | map('default', x, true) | join }}",
    BIG + "{{ x ~ x ~ x }}",
    BIG + "{{ '{0}{0}{0}'.format(x) }}",
    BIG + "{{ '%(a)s%(a)s%(a)s' % {'a': x} }}",
    BIG + "{{ x.translate({97: x}) }}",
    DEEP + "{{ ns.x }}",
    DEEP + "{{ ns.x | string }}",
    DEEP + "{{ ns.x | tojson }}",
    DEEP + "{{ ns.x ~ '' }}",
    DEEP + "{{ '%s' % ns.x }}",
    DEEP + "{{ '{}'.format(ns.x) }}",
    DEEP_PAIR + "{{ ns.x == other.x }}",
    DEEP_PAIR + "{{ ns.x in [other.x] }}",
    DEEP_PAIR + "{{ [ns.x].index(other.x) }}",
    DEEP.replace("[ns.x, ns.x]", "(ns.x, ns.x)") + "{{ {ns.x: 1} | length }}",
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def process() -> AsyncIterator[TemplateProcess]:
    process = TemplateProcess(RenderLimits(max_cpu_s=1))
    yield process
    await process.close()


@pytest.mark.parametrize("source", ENDLESS + HUGE)
async def test_a_template_without_end_or_of_gigabytes_is_stopped(source: str) -> None:
    process = TemplateProcess(RenderLimits(max_wall_s=0.7))
    tracemalloc.start()
    begin = time.monotonic()
    try:
        with pytest.raises(InvalidArgument) as caught:
            await ChatTemplate(source, {}, process).render(USER, ANYONE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        await process.close()
    assert caught.value.field == "messages"
    assert peak < MAX_PEAK_BYTES
    assert time.monotonic() - begin < 5.0  # without the limits: minutes, or the machine's memory


@pytest.mark.parametrize(
    ("source", "limits"),
    [
        (ENDLESS[0], RenderLimits(max_cpu_s=1, max_wall_s=60.0)),
        (ENDLESS[0], RenderLimits(max_cpu_s=60, max_wall_s=1.0)),
        ("{{ 'a' * 10 ** 9 }}", RenderLimits(max_cpu_s=60, max_wall_s=60.0)),
    ],
)
async def test_each_limit_holds_by_itself_and_only_for_who_passes_it(source: str, limits: RenderLimits) -> None:
    process = TemplateProcess(limits)
    hostile = asyncio.create_task(ChatTemplate(source, {}, process).render(USER, ANYONE))
    others = [asyncio.create_task(ChatTemplate(f"{index}", {}, process).render(USER, ANYONE)) for index in range(5)]
    with pytest.raises(InvalidArgument, match="more time or memory") as caught:
        await hostile
    assert caught.value.field == "messages"
    assert await asyncio.gather(*others) == list("01234"), "they waited, and a new worker renders them"
    await process.close()


async def test_the_time_of_one_rendering_does_not_count_for_the_next() -> None:
    process = TemplateProcess(RenderLimits(max_cpu_s=1, max_wall_s=60.0))
    source = "{% for a in range(9999) %}{% for b in range(30) %}{% endfor %}{% endfor %}."
    before_s = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for _ in range(50):
        assert await ChatTemplate(source, {}, process).render(USER, ANYONE) == "."
    await process.close()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before_s > 1.0


async def test_output_is_bounded() -> None:
    process = TemplateProcess(RenderLimits(max_output_length=500))
    with pytest.raises(InvalidArgument) as caught:
        await ChatTemplate("{% for a in range(100) %}0123456789{% endfor %}", {}, process).render(USER, ANYONE)
    assert caught.value.limit == "500"
    assert await ChatTemplate("{{ 'ä' * 500 }}", {}, process).render(USER, ANYONE) == "ä" * 500
    await process.close()


async def test_a_caller_that_goes_away_takes_nobody_elses_answer(process: TemplateProcess) -> None:
    for index in range(20):
        gone = asyncio.create_task(ChatTemplate("gone", {}, process).render(USER, ANYONE))
        for _ in range(index):
            await asyncio.sleep(0)
        gone.cancel()
        assert await ChatTemplate("mine", {}, process).render(USER, ANYONE) == "mine"


async def test_a_worker_that_somebody_killed_is_replaced(started: tuple[TemplateProcess, int]) -> None:
    process, pid = started
    os.kill(pid, signal.SIGKILL)
    await ended(pid)
    assert await ChatTemplate("hi", {}, process).render(USER, ANYONE) == "hi"


async def is_under_way(rendering: asyncio.Task[str], worker: int) -> None:
    """Returns when the worker computes what it was asked."""
    async with asyncio.timeout(10.0):
        while state_of(worker) != "R" and not rendering.done():
            await asyncio.sleep(0.001)


async def test_a_worker_that_is_killed_in_the_midst_of_a_rendering_is_no_fault_of_the_messages(
    started: tuple[TemplateProcess, int],
) -> None:
    """As by a system that has run out of memory."""
    process, pid = started
    source = "{% for a in range(9999) %}{% for b in range(300) %}{% endfor %}{% endfor %}."
    rendering = asyncio.create_task(ChatTemplate(source, {}, process).render(USER, ANYONE))
    await is_under_way(rendering, pid)
    os.kill(pid, signal.SIGKILL)
    assert await rendering == "."


async def test_a_worker_that_stands_still_is_no_fault_of_the_messages() -> None:
    """As where the whole machine does."""
    process = TemplateProcess(RenderLimits(max_wall_s=2.0))
    before = worker_pids()
    await ChatTemplate("hi", {}, process).render(USER, ANYONE)
    [pid] = worker_pids() - before
    os.kill(pid, signal.SIGSTOP)
    assert await ChatTemplate("hi", {}, process).render(USER, ANYONE) == "hi"
    await process.close()


async def test_workers_that_do_not_last_cost_the_caller_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start_process = template_process._start_process

    def start_and_kill(limits: RenderLimits) -> tuple[subprocess.Popen[bytes], socket.socket]:
        worker, connection = start_process(limits)
        worker.kill()
        started.append(worker.pid)
        return worker, connection

    monkeypatch.setattr(template_process, "_start_process", start_and_kill)
    process = TemplateProcess()
    charged: list[int] = []
    tenant: Any = SimpleNamespace(check_tokens=lambda _: None, charge=lambda tokens, _: charged.append(tokens))
    with pytest.raises(Unavailable, match="does not last"):
        await ChatTemplate("hi", {}, process).render(USER, Caller("someone", tenant))
    await process.close()
    assert len(started) == template_process.MAX_ATTEMPTS
    assert charged == []


async def test_what_is_rendered_while_the_router_stops_is_nobodys_mistake() -> None:
    others, process = worker_pids(), TemplateProcess()
    await ChatTemplate("hi", {}, process).render(USER, ANYONE)
    waiting = [asyncio.create_task(ChatTemplate(ENDLESS[0], {}, process).render(USER, ANYONE)) for _ in range(3)]
    await asyncio.sleep(0)
    await process.close()
    for each in waiting:
        with pytest.raises(Unavailable):
            await each
    assert worker_pids() <= others
    with pytest.raises(Unavailable, match="stopping"):
        await ChatTemplate("hi", {}, process).render(USER, ANYONE)


async def test_the_worker_has_no_files_and_variables_of_ours(started: tuple[TemplateProcess, int]) -> None:
    process, pid = started
    proc = Path(f"/proc/{pid}")
    assert sorted(os.listdir(proc / "fd")) == ["0", "1", "2"]
    names = {entry.split(b"=")[0] for entry in (proc / "environ").read_bytes().split(b"\0")}
    assert b"STAGECOACH_API_KEY" not in names
    assert names <= {b"PYTHONPATH", b"LC_CTYPE", b"TZ", b"LD_LIBRARY_PATH", b"PYTHONHOME", b""}
    limits = {line[:25].strip(): line[25:].split()[:2] for line in (proc / "limits").read_text().splitlines()}
    assert limits["Max address space"] == [str(RenderLimits().max_memory_bytes)] * 2
    for what in ("open files", "file size", "processes", "core file size"):
        assert limits[f"Max {what}"] == ["0", "0"], what
    await process.close()
    assert pid not in worker_pids()


@pytest.mark.parametrize(
    "source",
    [
        r"{{ 'a b' | wordwrap(1) }}{{ [1] | pprint }}{{ '<b>\n' | striptags }}{{ 'http://a.b' | urlize }}",
        "{{ strftime_now('%c %Z') }}{{ 'ä' | urlencode }}{{ [3, 1] | sort | tojson }}{{ 'a' | escape | title }}",
        "{{ [1, 2] | random }}{{ {'a': 1} | xmlattr }}{{ 10000 | filesizeformat }}{{ '%s' | format('x') }}",
    ],
)
async def test_what_jinja_needs_is_there_without_opening_a_file(source: str) -> None:
    process = TemplateProcess()  # nothing has been imported by an earlier rendering
    assert await ChatTemplate(source, {}, process).render(USER, ANYONE)
    with pytest.raises(InvalidArgument, match="undefined"):
        await ChatTemplate("{{ nothing.of_it }}", {}, process).render(USER, ANYONE)
    await process.close()


async def test_the_worker_imports_little_so_that_it_starts_fast_and_stays_small() -> None:
    code = "import sys, stagecoach_router.text.template_worker; print(*{name.split('.')[0] for name in sys.modules})"
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    output, _ = await worker.communicate()
    foreign = set(output.decode().split()) - set(sys.stdlib_module_names)
    assert {name for name in foreign if not name.startswith("_")} == {"jinja2", "markupsafe", "stagecoach_router"}


async def test_a_worker_ends_with_its_router() -> None:
    script = (
        "import asyncio; from stagecoach_router.text.template_process import *;"
        "from tests.unit.router.anyone import ANYONE;"
        "asyncio.run(TemplateProcess().render('hi', {}, 2, ANYONE));"
        "import os; print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True); os.kill(os.getpid(), 9)"
    )
    router = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    output, _ = await router.communicate()
    await ended(int(output))


@pytest_asyncio.fixture(loop_scope="module")
async def started(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[TemplateProcess, int]]:
    """A process that has rendered something, and its worker's id. Secrets and open files lay about when it began."""
    monkeypatch.setenv("STAGECOACH_API_KEY", "secret")
    before = worker_pids()
    process = TemplateProcess()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        await ChatTemplate("hi", {}, process).render(USER, ANYONE)
    (pid,) = worker_pids() - before
    yield process, pid
    await process.close()


def worker_pids() -> set[int]:
    """Of this process's own workers."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return {int(pid) for pid in children if b"template_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()}


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]


def is_running(pid: int) -> bool:
    try:
        return state_of(pid) != "Z"
    except FileNotFoundError:
        return False


async def ended(pid: int) -> None:
    async with asyncio.timeout(10.0):
        while is_running(pid):
            await asyncio.sleep(0.001)


async def test_every_message_may_be_gathered_into_a_list(process: TemplateProcess) -> None:
    gather = "{% for m in messages %}{% set ns.l = ns.l + [m] %}{% endfor %}"
    source = "{% set ns = namespace(l=[]) %}" + gather + "{{ ns.l | length }}"
    assert await ChatTemplate(source, {}, process).render(USER * 1000, ANYONE) == "1000"


async def test_a_deep_expression_compiles_in_no_time(process: TemplateProcess) -> None:
    begin = time.monotonic()
    with pytest.raises(InvalidArgument, match="no attribute"):
        await ChatTemplate("{{ messages" + ".s" * 190 + " is defined }}", {}, process).render(USER, ANYONE)
    assert time.monotonic() - begin < 1.5  # with jinja's optimizer: two seconds and more
