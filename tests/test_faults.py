"""What goes wrong with processes, and what ends well all the same.

    Lost workers     killed, asked to end, silent; KilledWorker; lost data; vanished clients
    Processes        several workers by one command, the local cluster, scripts, shutdown
    Tasks            retries, workers=, coroutines, callbacks, fire_and_forget
    Data and run     scatter, futures where they do not belong, Client.run

Tests wait on events: a task calls home (see ``caller``), or a connection ends because the process
that had opened it did.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import logging
import multiprocessing
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import time
import unittest.mock
import uuid
from pathlib import Path

import pytest
from test_api import GATES, RUNS, gates, through, until  # noqa: F401

import minidist
from minidist import (
    ALLOWED_FAILURES,
    LIMITS,
    CancelledError,
    Client,
    KilledWorker,
    LocalCluster,
    Worker,
    fire_and_forget,
    get_worker,
    wait,
)
from test_minidist import ROOT, SCRIPT, Process, environment, on_cluster, scheduler  # noqa: F401

# ---- Helpers: tasks that travel by value, calls home, workers, nothing is left ----


def by_value(function):
    """A function that is pickled as it is: workers need not import this file, and pytest with it."""
    function.__module__ = "__main__"
    return function


@by_value
def call_home(port, value=None):
    """A task that tells its pid to the test, and waits to be hung up on."""
    with socket.create_connection(("127.0.0.1", port)) as home:
        home.sendall(os.getpid().to_bytes(8, "big"))
        home.recv(1)
    return value


@by_value
def stay_in_touch(port, dask_worker):
    """Opens a connection to the test that lasts as long as the worker's process."""
    dask_worker.line = socket.create_connection(("127.0.0.1", port))
    dask_worker.line.sendall(os.getpid().to_bytes(8, "big"))


@by_value
def note(path, value):
    """A task that leaves a mark each time it runs, and has a large result."""
    with open(path, "a") as file:
        file.write(f"{value}\n")
    return [value] * 100_000


@by_value
def run_beside(port, path, value):
    """The first time, it calls home; later it stays for as long as an ``os._exit`` is there."""
    with contextlib.suppress(FileExistsError):
        path.touch(exist_ok=False)
        call_home(port)
    while any(attempt.name == "_exit" for attempt in [*get_worker().state.attempts.values()]):
        time.sleep(0.001)
    return value


@pytest.fixture
def listener():
    """A socket for tasks to call: then the test knows which worker runs them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener


@contextlib.contextmanager
def caller(listener):
    """The next who calls home: (the connection, its pid); hung up on at the end."""
    line, _ = listener.accept()
    with line:
        line.settimeout(30)
        yield line, int.from_bytes(line.recv(8), "big")


def port_of(listener):
    return listener.getsockname()[1]


@contextlib.contextmanager
def workers(address, *names):
    """Processes with one worker of one thread each, registered in this order."""
    with contextlib.ExitStack() as stack:
        some = []
        for name in names:
            command = [SCRIPT, "worker", address, "--nthreads", 1, "--name", name]
            some.append(stack.enter_context(Process(*command)))
            assert some[-1].address
        yield some


def end_of(p):
    """How a process ended, of which all children have ended too: (exit code, what it said)."""
    _, err = p.communicate(timeout=30)
    assert "Traceback" not in err and "Fatal" not in err, err
    return p.returncode, err


def names_of_workers(c):
    return sorted(row["name"] for row in c.scheduler_info()["workers"].values())


def pids_with(token):
    """The processes of this test.  (Where there is no /proc, nobody looks.)"""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if token.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def ends_soon(pid):
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([process], [], [], 5)[0])
    finally:
        os.close(process)


@pytest.fixture(autouse=True)
def nothing_is_left(environment, monkeypatch, capfd):
    """Every process of a test knows its token, ends with the test, and shows no traceback."""
    token = f"the secret of this test: {uuid.uuid4()}"
    monkeypatch.setenv("MINIDIST_TOKEN", token)
    yield
    late = [pid for pid in pids_with(token) if not ends_soon(pid)]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
    assert not late, "processes were left running"
    err = capfd.readouterr().err
    assert "Traceback" not in err and "Fatal" not in err, err


# ---- Lost workers ----


@pytest.mark.parametrize(
    "function, arguments, how",
    [
        (os._exit, [3], "exit code 3"),
        (signal.raise_signal, [signal.SIGKILL], "SIGKILL"),
        (signal.raise_signal, [signal.SIGRTMIN + 1], f"killed by {signal.SIGRTMIN + 1}"),
    ],
)
def test_a_task_that_ends_its_process_is_a_killed_worker_who_names_workers_ways_and_times(
    function, arguments, how
):
    with Client(n_workers=2, threads_per_worker=1) as c:
        error = c.submit(function, *arguments).exception(30)
        assert type(error) is KilledWorker
        death = rf"tcp://[\d.]+:\d+#\w+ \((\d)\): [\w ]*{how} at \d\d:\d\d:\d\d"
        names = re.findall(death, str(error))
        assert len(names) == ALLOWED_FAILURES + 1 and set(names) <= {"0", "1"}, str(error)


def test_what_ran_beside_a_task_that_ends_its_process_has_its_result(listener, tmp_path):
    with Client(n_workers=1, threads_per_worker=3) as c:
        port = port_of(listener)
        innocent = [c.submit(run_beside, port, tmp_path / str(n), n) for n in range(2)]
        with caller(listener), caller(listener):  # They run now, in the very same process.
            bad, waiting = c.submit(os._exit, 3), c.map(pow, range(20), [2] * 20)
            assert type(bad.exception(30)) is KilledWorker
            assert bad.type is None, "it has no result"
            assert c.gather([innocent, waiting]) == [[0, 1], [n * n for n in range(20)]]


def test_workers_that_a_local_cluster_loses_are_replaced_under_their_names():
    with Client(n_workers=2, threads_per_worker=1) as c:
        first = c.run(os.getpid)
        for pid in first.values():
            os.kill(pid, signal.SIGKILL)
        ran = c.submit(os.getpid, pure=False).result(30)  # By a new one: all others are dead.
        assert ran not in first.values()
        c.wait_for_workers(2, timeout=30)
        assert names_of_workers(c) == ["0", "1"]
        assert not set(c.run(os.getpid).values()) & set(first.values())


def test_a_worker_that_is_asked_to_end_hands_its_data_over(scheduler):
    with workers(scheduler.address, "a", "b") as (a, b), Client(scheduler.address) as c:
        data = c.scatter({n: [n] * 100_000 for n in "xyz"}, workers="a")
        assert set(c.who_has(data).values()) == {(a.address,)}
        a.send_signal(signal.SIGTERM)
        assert end_of(a) == (0, "")
        assert c.gather(data) == {n: [n] * 100_000 for n in "xyz"}
        assert set(c.who_has(data).values()) == {(b.address,)}


def test_what_a_worker_that_is_asked_to_end_has_computed_is_not_computed_again(scheduler, tmp_path):
    with workers(scheduler.address, "a", "b") as (a, b), Client(scheduler.address) as c:
        path = str(tmp_path / "runs")
        options = {"workers": "a", "allow_other_workers": True}
        futures = [c.submit(note, path, n, **options) for n in range(3)]
        wait(futures, timeout=30)
        a.send_signal(signal.SIGTERM)
        assert end_of(a) == (0, "")
        assert c.submit(lambda lists: [len(each) for each in lists], futures).result(30) == (
            [100_000] * 3
        )
        assert [each[0] for each in c.gather(futures)] == [0, 1, 2]
        assert sorted(Path(path).read_text().split()) == ["0", "1", "2"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_that_is_asked_to_end_leaves_its_task_to_another(scheduler, listener, number):
    with workers(scheduler.address, "a", "b") as (a, b), Client(scheduler.address) as c:
        future = c.submit(call_home, port_of(listener), "done")
        with caller(listener) as (_, pid):
            first, other = (a, b) if pid == a.pid else (b, a)
            first.send_signal(number)
            assert end_of(first) == (0, "")
            with caller(listener) as (_, again):
                assert (pid, again) == (first.pid, other.pid)
        assert future.result(30) == "done"


@contextlib.contextmanager
def silenced(listener):
    """A cluster where a worker is stopped in the middle of a task: (worker, other, future)."""
    with Process(SCRIPT, "scheduler", "--port", 0, "--worker-ttl", 1) as s:
        address = s.address
        with workers(address, "a", "b") as (a, b), Client(address) as c:
            future = c.submit(call_home, port_of(listener), "done")
            with caller(listener) as (_, pid):
                silent, other = (a, b) if pid == a.pid else (b, a)
                silent.send_signal(signal.SIGSTOP)
                yield silent, other, future


def test_a_worker_that_is_silent_for_too_long_is_dead_and_its_task_runs_elsewhere(listener):
    with silenced(listener) as (silent, other, future):
        with caller(listener) as (_, pid):
            assert pid == other.pid
        assert future.result(30) == "done"


def test_a_worker_that_was_declared_dead_ends_with_exit_code_1_and_says_why_in_one_line(listener):
    with silenced(listener) as (silent, _, _):
        with caller(listener):  # Its task runs elsewhere: it is dead.
            silent.send_signal(signal.SIGCONT)
            code, err = end_of(silent)
        assert code == 1 and len(err.splitlines()) == 1, err
        assert re.search("silent|is gone", err), err


def test_scattered_data_is_lost_with_its_only_holder_and_who_needs_it_is_told_so(
    scheduler, listener
):
    with workers(scheduler.address, "a", "b") as (a, b), Client(scheduler.address) as c:
        data = c.scatter({"the-data": [1] * 100_000}, workers="a")["the-data"]
        running = c.submit(call_home, port_of(listener), data)
        waiting = c.submit(len, running)
        with caller(listener) as (_, pid):
            assert pid == a.pid
            a.kill()
            for lost in [data, running, waiting]:
                with pytest.raises(CancelledError, match=rf"'the-data'.*{a.address}.*\(a\)"):
                    lost.result(30)
                assert lost.status == "cancelled"


def test_what_was_gathered_outlives_the_data_that_it_was_made_from(scheduler):
    with workers(scheduler.address, "a", "b") as (a, b), Client(scheduler.address) as c:
        data = c.scatter(b"x" * 100_000, workers="a")
        size = c.submit(len, data)
        assert size.result(30) == 100_000
        a.kill()
        with pytest.raises(CancelledError):
            data.result(30)
        assert size.result() == 100_000 and size.status == "finished"


def test_what_was_made_from_lost_data_and_is_held_elsewhere_stays_readable(scheduler):
    with workers(scheduler.address, "a", "b") as (a, b), Client(scheduler.address) as c:
        data = c.scatter(b"x" * 100_000, workers="a")
        beside_it = c.submit(bytes.upper, data, workers="a")
        elsewhere = c.submit(bytes.lower, beside_it, workers="b")
        wait([elsewhere], timeout=30)
        beside_it.release()
        a.kill()
        with pytest.raises(CancelledError):
            data.result(30)
        assert elsewhere.result(30) == b"x" * 100_000


def test_a_worker_whose_heartbeat_waits_on_a_slow_link_lives_until_no_byte_comes():
    async def main():
        async with minidist.Scheduler(worker_ttl=0.2) as s:
            slow = minidist.Connection()
            await slow.connect(s.address, "worker")
            slow.send(["register-worker", "tcp://1.2.3.4:5#slow", "slow", 1, [], []])
            await slow.receive()
            for byte in b"".join(minidist.pack([["heartbeat"]]))[:12]:
                slow.writer.write(bytes([byte]))
                now_us = s.state.now_us
                await until(lambda: s.state.now_us > now_us)
            assert s.state.now_us > 2 * s.state.ttl_us
            assert [ws.name for ws in s.state.workers.values()] == ["slow"]
            await until(lambda: not s.state.workers)
            slow.hang_up()

    asyncio.run(main())


def test_a_worker_whose_task_takes_longer_than_its_scheduler_is_patient_lives_on():
    async def main():
        async with (
            minidist.Scheduler(worker_ttl=0.2) as s,
            Worker(s.address, 1) as a,
            Client(s.address, asynchronous=True) as c,
        ):
            future = c.submit(through, 0, "done")
            await until(lambda: s.state.now_us > 4 * s.state.ttl_us)
            assert [*s.state.workers] == [a.id]
            GATES[0].set()
            assert await future == "done"

    asyncio.run(main())


def test_what_waits_on_a_worker_behind_what_takes_long_after_all_goes_to_another():
    async def main():
        async with (
            minidist.Scheduler() as s,
            Worker(s.address, 1),
            Client(s.address, asynchronous=True) as c,
        ):
            GATES[0].set()
            assert await c.gather([c.submit(through, 0), c.submit(abs, -1)]) == [None, 1]
            GATES[0].clear()
            slow, quick = c.submit(through, 0, "slow"), c.submit(abs, -2)
            await until(lambda: "slow" in RUNS)
            async with Worker(s.address, 1):
                assert await asyncio.wait_for(quick.result(), 10) == 2
                GATES[0].set()
                assert await slow == "slow"

    asyncio.run(main())


def test_a_scheduler_that_was_stopped_itself_takes_nobody_for_dead():
    async def main():
        async with minidist.Scheduler(worker_ttl=0.2) as s, Worker(s.address, 1) as a:
            time.sleep(0.5)  # Not asyncio's: nothing of this process goes on.
            now_us = s.state.now_us
            await until(lambda: s.state.now_us > now_us)
            assert [*s.state.workers] == [a.id]

    asyncio.run(main())


def test_what_only_a_vanished_client_wanted_is_freed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys, minidist\n"
        "client = minidist.Client(sys.argv[1])\n"
        "futures = client.map(abs, [-1, -2, -3])\n"
        "minidist.wait([*futures, client.scatter('data')])\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )

    async def main():
        async with (
            minidist.Scheduler() as s,
            Worker(s.address, nthreads=1) as a,
            Client(s.address, asynchronous=True) as c,
        ):
            with Process(script, s.address, PYTHONPATH=str(ROOT)) as p:
                assert await asyncio.to_thread(p.stdout.readline) == "ready\n"
                both = c.submit(abs, -2)
                assert await both == 2
                assert len(a.data) >= 3
                p.kill()
                await until(lambda: [*s.state.tasks] == [*a.data] == [both.key])
            assert len(s.state.clients) == 1

    asyncio.run(asyncio.wait_for(main(), 30))


# ---- Processes ----


@contextlib.contextmanager
def two_by_one_command(address):
    """A process that starts workers x-0 and x-1."""
    with Process(SCRIPT, "worker", address, "--nworkers", 2, "--name", "x") as parent:
        said = ""
        while (
            said.count("tcp://") < 2
        ):  # (Unbuffered, two processes write into each other's lines.)
            said += parent.stdout.readline() or pytest.fail(f"the workers do not start: {said}")
        yield parent


@by_value
def look_around():
    """What a task finds in its process that belongs to no library, but to its user."""
    return hash("a word"), gc.get_threshold(), logging.root.handlers, os.environ["OMP_NUM_THREADS"]


def test_workers_have_one_hash_of_strings_and_their_users_collector_and_logging(
    scheduler, monkeypatch
):
    for name in minidist.ENVIRONMENT:
        monkeypatch.delenv(name)
    with workers(scheduler.address, "a"), Client(scheduler.address) as c:
        with two_by_one_command(scheduler.address):
            one, *others = c.run(look_around).values()
    assert one[1:] == (gc.get_threshold(), [], "1") and others == [one, one]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with Client(n_workers=1) as c:
        assert [*c.run(look_around).values()] == [(*one[:3], "3")]


def test_several_workers_by_one_command_are_called_by_their_addresses_unless_named(scheduler):
    with Process(SCRIPT, "worker", scheduler.address, "--nworkers", 2):
        with Client(scheduler.address) as c:
            c.wait_for_workers(2, timeout=30)
            facts = c.scheduler_info()["workers"]
            assert {row["name"] for row in facts.values()} == {*facts}


def test_tasks_find_the_arguments_and_flags_of_their_script(tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, minidist\n"
        "def look():\n"
        "    return sys.argv[1:3], len(sys.argv), sys.flags.optimize, sys.warnoptions\n"
        "print(*minidist.Client(n_workers=1).submit(look).result())\n"
    )
    script = ["-OO", "-W", "ignore", tmp_path / "script.py", "one", "two words"]
    many = ["x" * 50_000] * 4  # More than Linux takes as one argument.
    with Process(*script, *many, PYTHONPATH=str(ROOT)) as p:
        assert p.communicate(timeout=30) == ("['one', 'two words'] 7 2 ['ignore']\n", "")


def test_one_command_starts_several_workers_with_numbered_names(scheduler):
    with two_by_one_command(scheduler.address) as parent, Client(scheduler.address) as c:
        assert names_of_workers(c) == ["x-0", "x-1"]
        pids = c.run(os.getpid).values()
        assert len({*pids, parent.pid}) == 3, "processes of their own"
        parent.terminate()
        end_of(parent)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGKILL, -signal.SIGKILL)])
def test_several_workers_of_one_command_end_with_it(scheduler, listener, number, code):
    with two_by_one_command(scheduler.address) as parent, Client(scheduler.address) as c:
        c.run(stay_in_touch, port_of(listener))
        with caller(listener) as (one, _), caller(listener) as (another, _):
            parent.send_signal(number)
            assert one.recv(1) == another.recv(1) == b""
        assert end_of(parent) == (code, "")


def test_several_workers_of_one_command_hand_their_data_over_when_it_is_asked_to_end(scheduler):
    with two_by_one_command(scheduler.address) as parent, Client(scheduler.address) as c:
        data = c.scatter({n: n * 100_000 for n in "xyz"})
        with workers(scheduler.address, "a") as (a,):
            parent.terminate()
            assert end_of(parent) == (0, "")
            assert set(c.who_has(data).values()) == {(a.address,)}
            assert c.gather(data) == {n: n * 100_000 for n in "xyz"}


def test_several_workers_of_one_command_end_with_exit_code_1_if_the_scheduler_is_gone(scheduler):
    with two_by_one_command(scheduler.address) as parent:
        scheduler.kill()
        code, said = end_of(parent)
    last = "minidist worker: workers ended with exit codes 1, 1"
    assert (code, said.splitlines()[-1]) == (1, last)


def test_a_second_signal_at_the_very_end_of_a_process_changes_nothing(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio.selector_events, os, signal, sys, minidist\n"
        "loop = asyncio.selector_events.BaseSelectorEventLoop\n"
        "close = loop._close_self_pipe\n"
        "def close_and_get_a_signal(self):\n"
        "    close(self)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "loop._close_self_pipe = close_and_get_a_signal\n"
        "set_handler = signal.signal\n"
        "def set_handler_and_get_a_signal(number, handler):\n"
        "    set_handler(number, handler)\n"
        "    if handler is signal.SIG_DFL:\n"
        "        os.kill(os.getpid(), number)\n"
        "signal.signal = set_handler_and_get_a_signal\n"
        "sys.exit(minidist.main(['scheduler', '--port', '0']))\n"
    )
    with Process(script, PYTHONPATH=str(ROOT)) as p:
        assert p.address
        p.send_signal(signal.SIGINT)
        assert end_of(p) == (0, "")


@by_value
def call_home_in_a_thread(port):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(call_home, port).result()


@by_value
async def call_home_from_the_loop(port):
    await asyncio.to_thread(call_home, port)


@by_value
async def call_home_and_stay(port):
    with socket.create_connection(("127.0.0.1", port)) as home:
        home.sendall(os.getpid().to_bytes(8, "big"))
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(1)


def signals_until_the_end_of(p, number, seconds):
    while p.poll() is None:
        p.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            p.wait(seconds)
    return end_of(p)


@pytest.mark.parametrize(
    "task", [call_home_in_a_thread, call_home_from_the_loop, call_home_and_stay]
)
def test_a_worker_whose_end_is_held_up_by_a_task_ends_when_it_is_asked_again(
    task, scheduler, listener
):
    with workers(scheduler.address, "a") as (worker,), Client(scheduler.address) as c:
        future = c.submit(task, port_of(listener))
        with caller(listener):
            worker.send_signal(signal.SIGTERM)
            while c.nthreads():
                time.sleep(0.01)
            assert signals_until_the_end_of(worker, signal.SIGTERM, 0.01) == (0, "")
        assert future.status == "pending"


def test_a_worker_may_have_a_name_that_its_standard_output_has_no_letters_for(scheduler):
    command = [SCRIPT, "worker", scheduler.address, "--name", "Zoë"]
    with Process(*command, PYTHONIOENCODING="ascii") as p, Client(scheduler.address) as c:
        assert p.stdout.readline().startswith("Worker Zo\\xeb at tcp://")
        assert names_of_workers(c) == ["Zoë"]


@pytest.mark.parametrize("seconds", [0.001, 0.01])  # They meet other parts of its end.
def test_however_many_signals_end_a_process_its_exit_code_is_0(scheduler, seconds):
    with (
        workers(scheduler.address, "a") as (worker,),
        Process(SCRIPT, "scheduler", "--port", 0) as p,
    ):
        assert p.address
        for process in worker, p:
            assert signals_until_the_end_of(process, signal.SIGINT, seconds) == (0, "")


def test_a_worker_process_ends_when_its_standard_input_does(scheduler):
    async def main():
        start = minidist.worker_process(scheduler.address, ended_by=signal.SIGTERM)
        async with start as worker, Client(scheduler.address, asynchronous=True) as c:
            await c.wait_for_workers(1)
            worker.stdin.close()
            assert await asyncio.wait_for(worker.wait(), 30) == -signal.SIGKILL

    asyncio.run(main())


def test_the_main_module_of_a_worker_is_empty(scheduler):
    @by_value
    def names():
        return [name for name in vars(sys.modules["__main__"]) if not name.startswith("__")]

    with workers(scheduler.address, "a"), Client(scheduler.address) as c:
        assert c.submit(names).result(30) == []
    with Client(n_workers=1) as c:
        assert c.submit(names).result(30) == []


def test_a_process_that_ends_just_before_it_is_asked_to_has_its_own_exit_code(capfd):
    async def main():
        async with minidist.worker_process("no address", ended_by=signal.SIGTERM) as process:
            # It has ended, and the loop has had no turn to see it.  (Python 3.11's has a thread.)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert process.returncode == 1

    asyncio.run(main())
    assert capfd.readouterr().err.startswith("minidist worker: ")


def test_an_interrupt_from_the_terminal_ends_several_workers_of_one_command(scheduler):
    with two_by_one_command(scheduler.address) as parent, Client(scheduler.address) as c:
        for pid in [*c.run(os.getpid).values(), parent.pid]:
            os.kill(pid, signal.SIGINT)
        assert end_of(parent) == (0, "")


@pytest.mark.parametrize("forks", [False, True])
def test_the_workers_of_a_local_cluster_end_when_the_process_that_made_them_is_killed(
    listener, tmp_path, forks
):
    """Also if a child that it has forked lives on, and holds all that it had open."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, socket, sys, minidist\n"
        "def stay_in_touch(port, dask_worker):\n"
        "    dask_worker.line = socket.create_connection(('127.0.0.1', port))\n"
        "    dask_worker.line.sendall(bytes(8))\n"
        "client = minidist.Client(n_workers=2)\n"
        "client.run(stay_in_touch, int(sys.argv[1]))\n"
        f"if {forks} and os.fork():\n"
        "    signal.pause()\n"
        "home = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "home.sendall(bytes(8))\n"
        "home.recv(1)\n"
        "os._exit(0)\n"
    )
    with Process(script, port_of(listener), PYTHONPATH=str(ROOT)) as p:
        with caller(listener) as (one, _), caller(listener) as (another, _), caller(listener):
            p.kill()
            assert one.recv(1) == another.recv(1) == b""


def test_a_worker_of_a_local_cluster_that_is_asked_to_end_is_replaced_and_its_data_kept(
    listener, caplog
):
    with Client(n_workers=2, threads_per_worker=1) as c:
        data = c.scatter(["x" * 100_000, "y" * 100_000])
        c.run(stay_in_touch, port_of(listener), workers="0")
        with caller(listener) as (line, pid):
            os.kill(pid, signal.SIGTERM)
            assert line.recv(1) == b""
        c.wait_for_workers(2, timeout=30)
        assert names_of_workers(c) == ["0", "1"] and pid not in c.run(os.getpid).values()
        assert c.gather(data) == ["x" * 100_000, "y" * 100_000]
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


SCRIPT_THAT_CALLS_HOME = """
import subprocess, sys, time, minidist
home = f"import socket; s = socket.create_connection(('127.0.0.1', {sys.argv[1]}))"
call = [sys.executable, "-c", f"{home}; s.sendall(bytes(8)); s.recv(1)"]
minidist.Client(n_workers=1).submit(subprocess.run, call).result()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_what_a_task_has_started_ends_with_the_script(listener, tmp_path, number):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT_THAT_CALLS_HOME)
    with Process(script, port_of(listener), PYTHONPATH=str(ROOT)) as p:
        with caller(listener) as (line, _):
            p.send_signal(number)
            assert line.recv(1) == b""


def test_what_a_task_has_started_ends_with_its_worker_of_a_local_cluster(listener):
    home = f"import socket; s = socket.create_connection(('127.0.0.1', {port_of(listener)}))"
    call = [sys.executable, "-c", f"{home}; s.sendall(bytes(8)); s.recv(1)"]
    with Client(n_workers=1) as c:
        task = c.submit(subprocess.run, call)
        with caller(listener) as (line, _):
            c.close()
            assert line.recv(1) == b"" and task.cancelled()


@by_value
def end_a_child():
    """A task that forks a process, and stops it as a ``multiprocessing.Pool`` stops its own."""
    child = multiprocessing.get_context("fork").Process(target=signal.pause)
    child.start()
    child.terminate()
    child.join()
    return child.exitcode, os.getpid()


def test_a_signal_to_a_process_that_a_task_has_forked_does_not_end_the_worker():
    with Client(n_workers=1, threads_per_worker=1) as c:
        for _ in range(3):
            code, pid = c.submit(end_a_child, pure=False).result(30)
            assert code == -signal.SIGTERM
            assert list(c.run(os.getpid).values()) == [pid]


def test_tasks_on_a_local_cluster_find_an_empty_standard_input():
    with Client(n_workers=1) as c:
        with pytest.raises(EOFError):
            c.submit(input).result(30)
        assert c.submit(subprocess.check_output, "cat").result(30) == b""


def test_a_silent_worker_of_a_local_cluster_is_killed_and_replaced(listener):
    with Client(n_workers=1, threads_per_worker=1, worker_ttl=1) as c:
        c.run(stay_in_touch, port_of(listener))
        with caller(listener) as (line, pid):
            os.kill(pid, signal.SIGSTOP)
            assert c.submit(os.getpid).result(30) != pid
            assert line.recv(1) == b""


def test_a_worker_of_a_local_cluster_is_replaced_as_soon_as_that_can_be_done(monkeypatch, caplog):
    with Client(n_workers=1, threads_per_worker=1) as c:
        pid = c.submit(os.getpid).result(30)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", "nowhere")
            os.kill(pid, signal.SIGKILL)
            while "The worker 0 cannot be replaced yet" not in caplog.text:
                time.sleep(0.01)
        assert c.submit(os.getpid, pure=False).result(30) != pid


def test_a_script_needs_no_main_guard_and_its_tasks_can_import_what_is_beside_it(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    (folder / "beside.py").write_text("def double(x):\n    return 2 * x\n")
    (elsewhere / "beside.py").write_text("'What the script does not import, its tasks do not.'\n")
    (folder / "script.py").write_text(
        "import beside\n"
        "from minidist import Client\n"
        "print('begins')\n"
        "def through_main(x):\n"
        "    import beside\n"
        "    return beside.double(x)\n"
        "client = Client(n_workers=4)\n"
        "print(client.gather(client.map(beside.double, [1, 2])), end=' ')\n"
        "print(client.submit(through_main, 3).result())\n"
    )
    with Process(folder / "script.py", cwd=elsewhere, PYTHONPATH=str(ROOT)) as p:
        out, err = p.communicate(timeout=30)
        assert (out, err, p.returncode) == ("begins\n[2, 4] 6\n", "", 0)


def test_what_tasks_print_or_leave_for_their_end_is_there_when_the_script_has_ended(tmp_path):
    (tmp_path / "script.py").write_text(
        "import atexit, minidist, time\n"
        "def note(i):\n"
        "    print('line', i)\n"
        "    atexit.register(print, 'end', i)\n"
        "    atexit.register(time.sleep, 1.5 * (i == 99))\n"
        "client = minidist.Client(n_workers=2)\n"
        "client.gather(client.map(note, range(500)))\n"
    )
    with Process(tmp_path / "script.py", PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="") as p:
        out, err = p.communicate(timeout=30)
        assert (err, p.returncode) == ("", 0)
    said = [f"{what} {i}" for what in ("line", "end") for i in range(500)]
    assert sorted(out.splitlines()) == sorted(said)


def test_a_task_may_have_a_cluster_of_its_own_of_which_nothing_is_said(tmp_path):
    (tmp_path / "script.py").write_text(
        "from minidist import Client\n"
        "def inner():\n"
        "    with Client(n_workers=1) as client:\n"
        "        return client.submit(abs, -1).result()\n"
        "with Client(n_workers=1) as client:\n"
        "    print(client.submit(inner).result())\n"
    )
    with Process(tmp_path / "script.py", PYTHONPATH=str(ROOT)) as p:
        assert p.communicate(timeout=60) == ("1\n", "")


def test_a_script_that_is_imported_does_not_start_clusters_without_end(tmp_path):
    """Its functions travel by name: so each worker imports it, and has a cluster for that."""
    (tmp_path / "script.py").write_text(
        "import minidist\n"
        "def inc(x):\n"
        "    return x + 1\n"
        "minidist.Client(n_workers=1).submit(inc, 1).result()\n"
    )
    (tmp_path / "other.py").write_text("import script\n")
    with Process(tmp_path / "other.py", PYTHONPATH=str(ROOT)) as p:
        _, err = p.communicate(timeout=60)
    assert re.search(r"\nRuntimeError: .*Do so under: if __name__ == '__main__'", err)


def test_what_a_script_has_wrapped_or_spawned_goes_by_value_too(tmp_path):
    """Names of its main module mean nothing, or something else, where its tasks run."""
    (tmp_path / "script.py").write_text(
        "import functools, multiprocessing, sys, typing, minidist\n"
        "@functools.cache\n"
        "def count(n):\n"
        "    return n if n < count.least else count(n - 1) + count(n - 2)\n"
        "count.least = 2\n"
        "Number = typing.NewType('Number', int)\n"
        "Alias = getattr(typing, 'TypeAliasType', typing.NewType)('Alias', Number)\n"
        "P = typing.ParamSpec('P')\n"
        "def call(n: Alias, *args: P.args) -> Number:\n"
        "    return Number(count(n))\n"
        "def show_two(address):\n"
        "    with minidist.Client(address) as client:\n"
        "        two = client.submit(call, 8).result(), client.submit(count, 9).result()\n"
        "    print(two, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    with minidist.Client(n_workers=1) as client:\n"
        "        spawn = multiprocessing.get_context('spawn')\n"
        "        address = client.scheduler_info()['address']\n"
        "        show_two(address)\n"
        "        process = spawn.Process(target=show_two, args=[address])\n"
        "        process.start()\n"
        "        process.join()\n"
    )
    with Process(tmp_path / "script.py", PYTHONPATH=str(ROOT)) as p:
        assert p.communicate(timeout=60) == ("(21, 34)\n(21, 34)\n", "")


def test_a_script_that_ends_without_closing_its_client_has_sent_all(scheduler, listener, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import socket, sys, minidist\n"
        "def call_home(port, *numbers):\n"
        "    socket.create_connection(('127.0.0.1', port)).sendall(bytes(8))\n"
        "client = minidist.Client(sys.argv[1])\n"
        "numbers = client.map(abs, range(5_000))\n"
        "minidist.fire_and_forget(client.submit(call_home, int(sys.argv[2]), numbers))\n"
    )
    command = [script, scheduler.address, port_of(listener)]
    with workers(scheduler.address, "a"), Process(*command, PYTHONPATH=str(ROOT)) as p:
        assert end_of(p) == (0, "")
        with caller(listener):
            pass


def test_without_processes_a_local_cluster_runs_tasks_in_threads_of_this_one():
    with Client(processes=False) as c:
        assert c.submit(os.getpid).result(30) == os.getpid()
        assert list(c.nthreads().values()) == [os.cpu_count()]


@pytest.mark.parametrize(
    "asked_for, workers_of_threads",
    [
        ({}, (8, 1)),
        ({"threads_per_worker": 2}, (4, 2)),
        ({"threads_per_worker": 9}, (1, 9)),
        ({"n_workers": 4}, (4, 2)),
        ({"n_workers": 9}, (9, 1)),
        ({"n_workers": 0}, (0, 8)),
        ({"processes": False}, (1, 8)),
        ({"n_workers": 2, "processes": False}, (2, 4)),
    ],
)
def test_a_local_cluster_has_a_thread_for_each_core(monkeypatch, asked_for, workers_of_threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    cluster = LocalCluster(asynchronous=True, **asked_for)  # It is not started.
    assert (cluster.n_workers, cluster.threads_per_worker) == workers_of_threads


def test_a_local_cluster_has_as_many_workers_and_threads_as_asked_for():
    with Client(n_workers=4, threads_per_worker=4) as c:
        assert list(c.nthreads().values()) == [4] * 4
        assert len({*c.run(os.getpid).values(), os.getpid()}) == 5, "processes of their own"


def test_a_local_cluster_outlives_the_clients_that_it_is_given_to():
    with LocalCluster(n_workers=1, threads_per_worker=1) as cluster:
        with Client(cluster) as c:
            pid = c.submit(os.getpid).result(30)
        with Client(cluster.scheduler_address) as c:
            assert c.submit(os.getpid).result(30) == pid != os.getpid()


def test_an_asynchronous_client_brings_a_local_cluster_and_ends_it():
    async def main():
        async with Client(asynchronous=True, n_workers=1) as c:
            pid = await c.submit(os.getpid)
            assert pid != os.getpid() and await c.submit(abs, -1) == 1
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_task_that_no_worker_is_there_for_is_warned_of(caplog):
    with Client(n_workers=0) as c:
        future = c.submit(abs, -1)
        c.nthreads()  # What the scheduler had to say before has arrived with this answer.
        assert future.status == "pending"
        assert re.search("no worker", caplog.text)


def test_shutdown_ends_scheduler_and_workers_and_nobody_complains(scheduler):
    with workers(scheduler.address, "a") as (a,), two_by_one_command(scheduler.address) as parent:
        c = Client(scheduler.address)
        c.wait_for_workers(3, timeout=30)
        c.shutdown()
        ends = [end_of(p) for p in [scheduler, a, parent]]
        assert [code for code, _ in ends] == [0, 0, 0], ends
        assert not [err for _, err in ends if "is gone" in err], ends
        with pytest.raises(RuntimeError, match="closed"):
            c.submit(abs, -1)


# ---- Tasks ----


def test_a_callback_that_raises_is_logged_and_others_are_called_with_the_future(caplog):
    called = queue.SimpleQueue()

    def fail(future):
        raise ArithmeticError("the callback's own fault")

    with Client(n_workers=1, threads_per_worker=1, processes=False) as c:
        good, bad = c.submit(abs, -1), c.submit(int, "no number")
        for future in [good, bad]:
            for callback in [called.put, fail, called.put]:
                future.add_done_callback(callback)
        assert {called.get(timeout=30) for _ in range(4)} == {good, bad}
        wait([good])
        good.add_done_callback(called.put)  # It is done already.
        assert called.get(timeout=30) is good
        assert caplog.text.count("ArithmeticError: the callback's own fault") == 2
        assert repr(good.key) in caplog.text or good.key in caplog.text


def add_up(values):
    RUNS.append(sum(values))


@on_cluster
async def test_what_is_fired_and_forgotten_runs_though_its_client_has_left(c, a, b):
    async with Client(c._address, asynchronous=True) as d:
        blockers = [d.submit(through, 0, n) for n in range(3)]
        fire_and_forget(d.submit(add_up, blockers))
        d.submit(through, 1, "forgotten")
        await until(lambda: len(RUNS) == 3)
    GATES[0].set()
    GATES[1].set()
    await until(lambda: len(RUNS) == 4 and not (a.data or b.data))
    assert sorted(RUNS) == [0, 1, 2, 3]


FAILURES = []


def fail_twice(value):
    FAILURES.append(value)
    if FAILURES.count(value) <= 2:
        raise ArithmeticError(f"failure {len(FAILURES)}")
    return value


@on_cluster
async def test_a_task_is_tried_again_as_often_as_it_has_retries(c, a, b):
    FAILURES.clear()
    assert await c.submit(fail_twice, "x", retries=2) == "x"
    assert FAILURES == ["x"] * 3


@on_cluster
async def test_a_task_that_fails_more_often_than_it_has_retries_fails_with_its_last_error(c, a, b):
    FAILURES.clear()
    with pytest.raises(ArithmeticError, match="failure 2"):
        await c.submit(fail_twice, "x", retries=1)
    assert FAILURES == ["x"] * 2


def name_of_worker(_=None):
    return get_worker().name


@on_cluster
async def test_a_task_runs_only_where_it_may(c, a, b):
    for some in ["b", b.address, b.address.removeprefix("tcp://"), ["b"], ("nobody", b.address)]:
        futures = c.map(name_of_worker, range(6), workers=some, pure=False)
        assert await c.gather(futures) == ["b"] * 6
    for some in ["127.0.0.1", ["a", "b"]]:
        futures = c.map(name_of_worker, range(6), workers=some, pure=False)
        assert set(await c.gather(futures)) <= {"a", "b"}


@on_cluster
async def test_other_workers_run_a_task_only_while_none_of_its_own_is_there(c, a, b):
    options = {"allow_other_workers": True, "pure": False}
    assert await c.submit(name_of_worker, workers="nobody", **options) in {"a", "b"}
    futures = c.map(name_of_worker, range(6), workers="b", **options)
    assert await c.gather(futures) == ["b"] * 6


def test_a_task_for_nobody_who_is_there_is_warned_of_and_runs_as_soon_as_he_joins(caplog):
    @on_cluster
    async def check(c, a, b):
        caplog.clear()
        future = c.submit(name_of_worker, workers="carol")
        await c.nthreads()  # What the scheduler had to say before has arrived with this answer.
        assert "carol" in caplog.text and future.status == "pending"
        async with Worker(c._address, nthreads=1, name="carol"):
            assert await future == "carol"

    check("in this process")


async def async_through(gate, value):
    """As ``through``, for a coroutine function."""
    RUNS.append(f"{value} begins")
    while not GATES[gate].is_set():
        await asyncio.sleep(0)
    RUNS.append(f"{value} ends")
    assert asyncio.get_running_loop() is get_worker().loop
    return get_worker().name


@on_cluster
async def test_coroutine_functions_run_in_the_loop_of_the_worker(c, a, b):
    async def fail():
        raise ArithmeticError("later")

    GATES[0].set()
    assert await c.submit(async_through, 0, 1, workers="b") == "b"
    with pytest.raises(ArithmeticError, match="later"):
        await c.submit(fail)


async def wait_for_ever():
    RUNS.append("begun")
    try:
        await asyncio.Event().wait()
    finally:
        RUNS.append("over")


@on_cluster
async def test_a_coroutine_is_cancelled_when_its_worker_closes(c, a, b):
    future = c.submit(wait_for_ever, workers=[a.address])
    await until(lambda: RUNS)
    await a.close()
    assert RUNS == ["begun", "over"]
    await c.cancel(future)


async def stay_whatever_comes(gate):
    while not GATES[gate].is_set():
        with contextlib.suppress(asyncio.CancelledError):
            RUNS.append("still here")
            await asyncio.sleep(0.01)


@on_cluster
async def test_a_worker_closes_though_a_coroutine_makes_nothing_of_being_cancelled(c, a, b):
    future = c.submit(stay_whatever_comes, 0, workers=[a.address])
    await until(lambda: RUNS)
    with unittest.mock.patch.dict(LIMITS, close_seconds=0.1):
        await a.close()
    RUNS.clear()
    await until(lambda: RUNS)
    GATES[0].set()
    await c.cancel(future)


@on_cluster
async def test_a_coroutine_counts_as_a_thread(c, a, b):
    GATES[0].set()
    await c.submit(async_through, 0, 0, workers="b")  # Known as short, others are sent early.
    GATES[0].clear()
    futures = [c.submit(async_through, 0, n, workers="b") for n in (1, 2)]
    await until(lambda: len(RUNS) == 3)
    assert await c.submit(abs, -1, workers="a") == 1
    GATES[0].set()
    assert await c.gather(futures) == ["b", "b"]
    first, second = (run.split()[0] for run in RUNS[2::2])
    assert RUNS[2:] == [f"{n} {what}" for n in (first, second) for what in ("begins", "ends")]


# ---- Data and run ----


def large_once(path):
    with open(path, "a") as file:
        file.write("called\n")
    return bytes(100_000)


def test_a_client_behind_a_firewall_fails_alone_and_what_others_have_is_not_computed_again(
    tmp_path,
):
    path = tmp_path / "calls"
    with minidist.LocalCluster(n_workers=2) as cluster, Client(cluster) as other:
        theirs = other.submit(large_once, path)
        wait(theirs)
        with (
            Client(cluster) as c,
            unittest.mock.patch.object(
                minidist.Connection, "connect", side_effect=OSError("no route")
            ),
        ):
            with pytest.raises(
                ConnectionError, match="large_once-.* could not be fetched from tcp:"
            ):
                c.submit(large_once, path).result(timeout=30)
        assert (theirs.status, theirs.result()) == ("finished", bytes(100_000))
    assert path.read_text() == "called\n"


def test_data_that_no_worker_is_there_for_raises_a_timeout_error_that_says_so():
    with Client(n_workers=0) as c:
        with pytest.raises(TimeoutError, match="with 0 workers: start one"):
            c.scatter([1, 2, 3], timeout=0.1)
        with pytest.raises(TimeoutError, match="with 0 workers: start one"):
            c.scatter({"x": 1}, timeout="100 ms")


@on_cluster
async def test_broadcast_data_is_on_all_workers(c, a, b):
    async with Worker(c._address, nthreads=1, name="carol") as third:
        data = await c.scatter({"x": [1, 2], "y": "z"}, broadcast=True)
        for each in [a, b, third]:
            assert each.data == {"x": [1, 2], "y": "z"}
        addresses = {each.address for each in [a, b, third]}
        assert {key: {*some} for key, some in (await c.who_has(data)).items()} == {
            "x": addresses,
            "y": addresses,
        }


@pytest.mark.parametrize("deaf", [0, 1], ids=["the first holder", "who gets a copy"])
def test_a_worker_that_dies_while_data_is_broadcast_to_it_does_not_hang_it(scheduler, deaf):
    async def main(some):
        async with Client(scheduler.address, asynchronous=True) as c:
            some[deaf].send_signal(signal.SIGSTOP)
            scattering = asyncio.ensure_future(c.scatter({"x": 1}, broadcast=True))
            begun = ("processing", "memory")[deaf]
            while begun not in [finish for _, _, finish, _, _ in await c.story("x")]:
                pass
            some[deaf].kill()
            data = await scattering
            assert await data["x"] == 1
            assert await c.who_has(data) == {"x": (some[1 - deaf].address,)}

    with workers(scheduler.address, "a", "b") as some:
        asyncio.run(asyncio.wait_for(main(some), 30))


@on_cluster
async def test_a_future_of_a_closed_client_is_no_argument(c, a, b):
    async with Client(c._address, asynchronous=True) as d:
        future = d.submit(abs, -1)
        assert await future == 1
    for call in [lambda: c.submit(abs, future), lambda: c.map(max, [[future]])]:
        with pytest.raises(ValueError, match="another client"):
            call()


FUTURES = []


def first_future():
    return FUTURES[0]


@on_cluster
async def test_a_future_as_the_result_of_a_task_is_a_type_error_that_says_what_to_do(c, a, b):
    FUTURES[:] = [c.submit(abs, -1, key="the-future")]
    with pytest.raises(TypeError, match="'the-task'.*as an argument.*gather"):
        await c.submit(first_future, key="the-task")
    FUTURES.clear()


@on_cluster
async def test_a_future_in_scattered_data_is_a_type_error_that_says_what_to_do(c, a, b):
    future = c.submit(abs, -1, key="the-future")
    for data in [[future], {"x": future}, [{"deep": [future]}], future]:
        with pytest.raises(TypeError, match="gather"):
            await c.scatter(data)


@on_cluster
async def test_run_calls_a_function_on_each_worker_or_on_those_named(c, a, b):
    def at_once(text, dask_worker, end=""):
        return text + dask_worker.name + end

    async def later(text, dask_worker, end=""):
        await asyncio.sleep(0)
        return text + dask_worker.name + end

    for function in [at_once, later]:
        assert await c.run(function, "I am ", end="!") == {
            a.address: "I am a!",
            b.address: "I am b!",
        }
    for some in ["b", ["b"], b.address]:
        assert await c.run(name_of_worker, workers=some) == {b.address: "b"}


def fail_on_b():
    if get_worker().name == "b":
        raise ArithmeticError("on b")
    return "fine"


@on_cluster
async def test_run_raises_returns_or_ignores_errors(c, a, b):
    with pytest.raises(ArithmeticError, match="on b"):
        await c.run(fail_on_b)
    results = await c.run(fail_on_b, on_error="return")
    assert results[a.address] == "fine" and type(results[b.address]) is ArithmeticError
    assert await c.run(fail_on_b, on_error="ignore") == {a.address: "fine"}


@pytest.mark.parametrize("on_error", ["raise", "return", "ignore"])
def test_a_worker_that_is_lost_while_it_runs_a_function_is_an_error(scheduler, listener, on_error):
    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        workers(scheduler.address, "a", "b") as (a, b),
        Client(scheduler.address) as c,
    ):
        running = pool.submit(c.run, call_home, port_of(listener), "fine", on_error=on_error)
        with caller(listener), caller(listener):
            a.kill()
            a.wait(30)
        if on_error == "raise":
            with pytest.raises(ConnectionError, match=a.address):
                running.result(30)
            return
        results = running.result(30)
        assert results.pop(b.address) == "fine"
        assert [type(error) for error in results.values()] == (
            [ConnectionError] if on_error == "return" else []
        )
