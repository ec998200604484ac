"""The contract (see contract.py) holds on minidist in both ways, and on dask.distributed."""

import asyncio
import contextlib
import gc
import logging
import pathlib
import re
import subprocess
import sys

import contract
import pytest

import minidist

ROOT = pathlib.Path(minidist.__file__).parent
WORKERS = {"alice": 2, "bob": 1}  # {name: threads}
TIMEOUT = 30  # seconds; a program needs a few milliseconds


class OneLoop:
    """Scheduler, workers and client of ``module`` in one event loop, for asynchronous programs."""

    def __init__(self, module):
        self.programs = contract.load(module, synchronous=False)
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.client = self.runner.run(self.start(module))

    async def start(self, module):
        if module is minidist:
            options, of_scheduler = {}, {}
        else:
            options = {"host": "127.0.0.1"}
            of_scheduler = {"port": 0, "dashboard_address": ":0", "dashboard": False}
        enter = self.stack.enter_async_context
        scheduler = await enter(module.Scheduler(**options, **of_scheduler))
        for name, nthreads in WORKERS.items():
            worker = module.Worker(scheduler.address, nthreads=nthreads, name=name, **options)
            await enter(worker)
        return await enter(module.Client(scheduler.address, asynchronous=True))

    def check(self, name, expected):
        check = self.programs[name].check(self.client, expected)
        self.runner.run(asyncio.wait_for(check, TIMEOUT))

    def close(self):
        self.runner.run(self.stack.aclose())
        self.runner.close()


class Processes:
    """A scheduler and workers in processes of their own, and a client for synchronous programs."""

    def __init__(self, module):
        self.programs = contract.load(module, synchronous=True)
        self.stack = contextlib.ExitStack()
        start = self.start_minidist if module is minidist else self.start_dask
        self.client = self.stack.enter_context(module.Client(start(), timeout=20))

    def start_minidist(self):
        address = self.process("scheduler", "--port", 0)
        for name, nthreads in WORKERS.items():
            self.process("worker", address, "--nthreads", nthreads, "--name", name)
        return address

    def process(self, *arguments):
        """Start what a user would start; return the address that it prints when it is ready."""
        command = [sys.executable, ROOT / "minidist.py", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.stack.enter_context(process)
        self.stack.callback(process.kill)
        return re.search(r"tcp://\S+", process.stdout.readline())[0]

    def start_dask(self):
        from dask.distributed import Nanny, Scheduler, SpecCluster

        options = {"port": 0, "host": "127.0.0.1", "dashboard": False}
        workers = {
            name: {"cls": Nanny, "options": {"name": name, "nthreads": nthreads}}
            for name, nthreads in WORKERS.items()
        }
        scheduler = {"cls": Scheduler, "options": options}
        cluster = SpecCluster(workers=workers, scheduler=scheduler, silence_logs="CRITICAL")
        return self.stack.enter_context(cluster).scheduler_address

    def check(self, name, expected):
        check = self.programs[name].check
        contract.in_thread(check, self.client, expected).result(TIMEOUT)

    def close(self):
        self.stack.close()


@pytest.fixture(scope="module")
def clusters():
    """``use(kind, module, anew)``: one cluster for all programs of a kind, and one at a time.

    With two clients in this process, dask's as_completed would take that of the other loop.
    """
    current = {}

    def use(kind, module, anew=False):
        if anew or (kind, module) not in current:
            close()
            gc.freeze()  # What is here by now need not be looked at by each collection.
            # Dask logs errors with their frames; pytest keeps them, and so the futures in them.
            logging.disable(logging.NOTSET if module is minidist else logging.CRITICAL)
            current[kind, module] = kind(module)
        return current[kind, module]

    def close():
        for key in list(current):
            current.pop(key).close()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINIDIST_TOKEN", "the secret of the contract")
        yield use
        close()
        gc.unfreeze()
        logging.disable(logging.NOTSET)


# What makes no sense in an event loop is left out there.
IN_A_LOOP = [name for name, program in contract.PROGRAMS.items() if program.only != "synchronous"]


@pytest.mark.parametrize("name", IN_A_LOOP)
def test_contract_asynchronous(name, clusters):
    clusters(OneLoop, minidist).check(name, contract.PROGRAMS[name].expected)


@pytest.mark.parametrize("name", contract.PROGRAMS)
def test_contract_synchronous(name, clusters):
    clusters(Processes, minidist).check(name, contract.PROGRAMS[name].expected)


ON_DASK = [  # But for what would leave its scheduler broken, or is a race there.
    pytest.param(kind, name, id=f"{mode}-{name}")
    for kind, mode, names in [
        (OneLoop, "asynchronous", IN_A_LOOP),
        (Processes, "synchronous", contract.PROGRAMS),
    ]
    for name in names
    if contract.PROGRAMS[name].on_dask != contract.NOT_RUN
]


@pytest.mark.bench
@pytest.mark.parametrize("kind, name", ON_DASK)
def test_contract_on_dask(kind, name, clusters):
    from dask import distributed

    expected = contract.PROGRAMS[name].on_dask
    try:
        clusters(kind, distributed).check(name, expected)
    except TimeoutError:  # That cluster hangs, which would fail all that comes after: a new one.
        clusters(kind, distributed, anew=True).check(name, expected)


def test_the_contract_is_large_and_no_program_hides_another():
    program = r"^@program\((?:.|\n)*?^async def (\w+)\(client\):"
    here = re.findall(program, pathlib.Path(contract.__file__).read_text(), re.M)
    in_the_textbook = re.findall(program, contract.in_the_textbook(), re.M)
    decorated = [*here, *in_the_textbook]
    assert decorated == list(contract.PROGRAMS)
    assert len(set(decorated)) == len(decorated) >= 120 and len(in_the_textbook) == 20


def test_the_readme_lists_every_difference_from_dask():
    readme = (ROOT / "README.md").read_text()
    section = re.search(r"^## Differences from dask$(.*?)(?=^## |\Z)", readme, re.M | re.S)
    assert section, "README has no section called Differences from dask"
    rows = re.findall(r"^\| `?([a-z]+_\w+)`? +\|", section[1], re.M)
    assert sorted(rows) == sorted(p.name for p in contract.PROGRAMS.values() if p.differs)


def test_a_program_that_does_otherwise_is_found(clusters):
    cluster = clusters(Processes, minidist)
    for expected in [contract.Gives(7), contract.Raises(KeyError)]:
        with pytest.raises(AssertionError, match="it gave 6"):
            cluster.check("a_builtin_is_a_task", expected)
    with pytest.raises(ZeroDivisionError):
        cluster.check("gather_raises_the_error_of_a_task", contract.Raises(KeyError))


def test_the_synchronous_program_is_the_asynchronous_one_without_its_waiting():
    source = """async def f(client, asynchronous=1):  # async
    async with client as c:
        return [await anext(x) async for x in c], "await"
"""
    assert (
        contract.without_async(source)
        == """def f(client, asynchronous=1):  # async
    with client as c:
        return [next(x) for x in c], "await"
"""
    )
