"""The API on a live cluster: what the textbook and the contract have no room for."""

import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import operator
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import types
import unittest.mock

import pytest

import minidist
from minidist import Client, Worker, fire_and_forget, wait
from test_minidist import environment, on_cluster, scheduler  # noqa: F401

# ---- What the tests of live clusters share: tasks that wait for a test, and waiting for both ----

GATES = [threading.Event() for _ in range(4)]
RUNS = []  # what ran: the workers of these tests are in this process


@pytest.fixture(autouse=True)
def gates():
    """The gates are shut when a test begins, and open when it ends: no thread is left behind."""
    RUNS.clear()
    for gate in GATES:
        gate.clear()
    yield
    for gate in GATES:
        gate.set()


def through(gate, value=None):
    """A task that says that it has started, and ends when the test opens its gate."""
    RUNS.append(value)
    GATES[gate].wait(30)
    return value


def slow_pow(x, y):
    return x**y


async def until(condition):
    while not condition():
        await asyncio.sleep(0)


# ---- The tests ----


@on_cluster
async def test_a_future_tells_its_key_and_status_and_what_it_will_be(c, a, b):
    pending, bad = c.submit(through, 0, 5, key=("x", 1)), c.submit(int, "no number", key="bad")
    assert pending.key == ("x", 1) and pending.status == "pending" and not pending.done()
    assert "pending" in repr(pending)
    GATES[0].set()
    assert await pending.exception() is None and await pending.traceback() is None
    assert pending.status == "finished" and pending.done() and await pending == 5
    assert await bad.exception() and bad.status == "error" and bad.done()
    good = c.submit(slow_pow, 2, 3)
    await good
    assert re.fullmatch("<Future: finished, type: int, key: slow_pow-[0-9a-f]{32}>", repr(good))
    assert repr(bad) == "<Future: error, key: bad>"


@on_cluster
async def test_a_call_whose_last_future_is_gone_runs_again(c, a, b):
    GATES[0].set()
    x = c.submit(through, 0, "x")
    await x
    del x
    await until(lambda: not a.data and not b.data)
    assert await c.submit(through, 0, "x") == "x" and RUNS == ["x", "x"]


@on_cluster
async def test_released_and_dropped_results_leave_the_workers(c, a, b):
    x, y = c.map(abs, [-1, -2])
    z = c.submit(operator.add, x, y)
    assert await z == 3
    x.release()
    x.release()
    del y
    await until(lambda: [*a.data, *b.data] == [z.key])
    assert await z == 3


@on_cluster
async def test_a_lost_result_is_computed_again(c, a, b):
    GATES[0].set()
    futures = c.map(through, [0] * 20, range(20))
    await wait(futures)
    await b.close()
    assert await c.gather(futures) == list(range(20))


def test_when_all_clients_are_gone_nothing_is_left_on_scheduler_and_workers():
    async def main():
        before = asyncio.all_tasks()
        async with minidist.Scheduler() as s, Worker(s.address, nthreads=1) as a:
            async with Client(s.address, asynchronous=True) as c:
                futures = [*c.map(abs, range(5)), c.submit(int, "no number")]
                futures.append(c.submit(abs, futures[0]))
                await wait(futures)
                assert len(s.state.tasks) == 7 and len(s.state.workers) == 1
            await until(lambda: not s.state.tasks and not a.data)
            s.state.validate()
            threads = [t for t in threading.enumerate() if t.name.startswith("minidist-")]
        for thread in threads:
            thread.join(30)
        assert threads and asyncio.all_tasks() == before

    asyncio.run(asyncio.wait_for(main(), 30))


@on_cluster
async def test_futures_at_any_depth_of_the_arguments_become_their_values(c, a, b):
    x, y = c.submit(abs, -1), c.submit(abs, -2)
    deep = [x, {"y": (y, [x])}, types.SimpleNamespace(x=x)]
    total = c.submit(lambda d, k: (d[0], d[1]["y"], d[2].x, k["y"]), deep, k={"y": y})
    assert await total == (1, (2, [1]), 1, 2)


@on_cluster
async def test_inputs_travel_between_workers(c, a, b):
    parts = [c.submit(through, 0, i) for i in range(3)]
    await until(lambda: len(RUNS) == 3)
    GATES[0].set()
    assert await c.submit(sum, parts) == 3
    assert a.data and b.data


@on_cluster
async def test_equal_pure_calls_run_once_while_the_first_future_lives(c, a, b):
    first, second = c.submit(through, 0, "x"), c.submit(through, 0, "x")
    GATES[0].set()
    assert await c.gather([first, second]) == ["x", "x"]
    assert RUNS == ["x"]
    first.release()
    assert await c.submit(through, 0, "x") == "x" and RUNS == ["x"]


@on_cluster
async def test_data_that_is_there_can_be_broadcast_later(c, a, b):
    data = await c.scatter({"d": 5})
    assert len((await c.who_has(data))["d"]) == 1
    again = await c.scatter({"d": 5}, broadcast=True)
    assert len((await c.who_has(again))["d"]) == 2
    assert await again["d"] == await data["d"] == 5
    await c.scatter({"d": 5}, broadcast=True)
    await c.close()
    assert await again["d"] == await data["d"] == 5, "what was here stays here"


@on_cluster
async def test_a_shutdown_leaves_nobody_waiting_though_the_scheduler_is_not_closed(c, a, b):
    async with Client(a.scheduler_address, asynchronous=True) as other:
        waits, pending = other.submit(abs, -1, workers="nobody"), c.submit(abs, -2, workers="no")
        await c.shutdown()
        for future, why in [(waits, "the scheduler at .* is gone"), (pending, "closed")]:
            with pytest.raises(minidist.CancelledError, match=why):
                await future
    with pytest.raises(ConnectionError, match="no scheduler"):
        await Client(a.scheduler_address, asynchronous=True, timeout=0)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*minidist.split_address(a.scheduler_address))


@on_cluster
async def test_an_asynchronous_client_needs_async_for(c, a, b):
    done = minidist.as_completed([c.submit(abs, -1)])
    with pytest.raises(TypeError, match="need async for"):
        next(done)
    assert [await future async for future in done] == [1]


def test_a_worker_that_has_not_been_started_can_be_closed():
    asyncio.run(Worker("127.0.0.1:8786").close())


@on_cluster
async def test_futures_of_several_clients_do_not_come_from_one_iterator(c, a, b):
    async with Client(a.scheduler_address, asynchronous=True) as other:
        done = minidist.as_completed([c.submit(abs, -1)])
        with pytest.raises(ValueError, match="another client"):
            done.add(other.submit(abs, -2))
        assert [await future async for future in done] == [1]


@on_cluster
async def test_coroutines_share_an_iterator(c, a, b):
    done = minidist.as_completed(c.map(abs, range(5)))

    async def share():
        return [await future async for future in done]

    shares = await asyncio.wait_for(asyncio.gather(share(), share(), share()), 10)
    assert sorted(sum(shares, [])) == [0, 1, 2, 3, 4]


@on_cluster
async def test_another_thread_sees_the_futures_of_an_asynchronous_client(c, a, b):
    def look():
        futures = c.map(abs, range(3000))
        return {future.status for future in futures}, {future.type for future in futures}

    statuses, kinds = await asyncio.to_thread(look)
    assert statuses <= {"pending", "finished"} and kinds <= {None, int}


@on_cluster
async def test_what_is_no_key_is_refused_and_the_client_lives_on(c, a, b):
    future = c.submit(abs, -1, key="x")
    assert await future == 1
    assert await c.nbytes([future], summary=False) == {"x": 28}
    assert await c.story(future)
    for key in [None, 1, object(), ["x"]]:
        with pytest.raises(TypeError, match="a key is a string or a tuple"):
            await c.nbytes([key])
        with pytest.raises(TypeError, match="a key is a string or a tuple"):
            await c.story(key)
    with pytest.raises(TypeError, match="a key is a string or a tuple, not None"):
        await c.scatter({None: 1})
    with pytest.raises(TypeError, match="is no address, host or name"):
        c.submit(abs, -1, workers=0)
    assert await c.submit(abs, -2) == 2


@pytest.fixture(scope="module")
def synchronous():
    with Client(n_workers=1, processes=False) as client:
        yield client


def test_a_synchronous_client_is_no_asynchronous_one(synchronous):
    async def enter():
        async with synchronous:
            pass

    async def iterate():
        return [future async for future in minidist.as_completed([synchronous.submit(abs, -1)])]

    with pytest.raises(TypeError, match="use with"):
        asyncio.run(enter())
    with pytest.raises(TypeError, match="need for, not async for"):
        asyncio.run(iterate())


def test_what_a_task_has_raised_shows_few_frames_of_the_library(synchronous):
    future = synchronous.submit(lambda: 1 / 0)
    for wait_for_it in (future.result, lambda: synchronous.gather([future])):
        with pytest.raises(ZeroDivisionError) as info:
            wait_for_it()
        files = [place.filename for place in traceback.extract_tb(info.tb)]
        assert files.count(minidist.__file__) <= 4 and files[-1] == __file__


def test_a_traceback_shows_the_lines_of_code_that_went_by_value(synchronous):
    def divide(x, y):
        quotient = x / y
        return quotient

    tb = synchronous.submit(divide, 1, 0).traceback()
    (place,) = traceback.extract_tb(tb)
    assert (place.filename, place.name, place.line) == (__file__, "divide", "quotient = x / y")
    assert tb.tb_frame.f_code.co_firstlineno == divide.__code__.co_firstlineno
    assert "^" not in "".join(traceback.format_tb(tb)), "which would be under other words"
    places = [("far.py", 100_000, "f", 7), ("near.py", 5, "g", 5), ("before.py", 1, "h", 100)]
    tb = minidist.rebuild_traceback(places)
    assert [place.lineno for place in traceback.extract_tb(tb)] == [100_000, 5, 1]
    assert [frame.f_lineno for frame, _ in traceback.walk_tb(tb)] == [100_000, 5, 1]


def test_what_code_without_lines_raises_travels(synchronous):
    def divide(x, y):
        return x / y

    divide.__code__ = divide.__code__.replace(co_linetable=b"")
    with pytest.raises(ZeroDivisionError):
        synchronous.submit(divide, 1, 0).result()


def test_functions_travel_also_where_bytes_must_not_be_compared_with_strings():
    code = "import minidist; print(minidist.loads(minidist.dumps(lambda: 1))())"
    run = [sys.executable, "-bb", "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("1\n", "")


def test_who_waits_while_a_client_is_closed_is_told(synchronous):
    for _ in range(3):
        outcome = []

        def wait_for_many(client, outcome=outcome):
            try:
                client.wait_for_workers(99)
            except RuntimeError as error:
                outcome.append(str(error))

        with Client(synchronous._address) as client:
            thread = threading.Thread(target=wait_for_many, args=[client], daemon=True)
            thread.start()
            time.sleep(0.05)  # So that it sleeps, from one question to the next.
        thread.join(10)
        assert outcome == ["this client is closed: make a new one"]


def test_after_a_fork_the_child_is_told_whose_client_it_is(synchronous):
    future = synchronous.submit(time.sleep, 0.5)
    calls = (synchronous.who_has, future.result, future.cancel, lambda: wait([future]))
    end, inherited = os.pipe()
    if not (child := os.fork()):
        for call in calls:  # (In threads: what hangs shall not keep the child.)
            with contextlib.suppress(Exception):
                pool = concurrent.futures.ThreadPoolExecutor(1)
                os.write(inherited, type(pool.submit(call).exception(5)).__name__.encode() + b" ")
        synchronous.close()
        os.write(inherited, b"closed")
        os._exit(0)
    os.close(inherited)
    with open(end) as file:
        assert file.read() == "RuntimeError " * len(calls) + "closed"
    os.waitpid(child, 0)
    assert future.result() is None


def test_the_standard_input_of_a_task_is_empty():
    def read():
        return sys.stdin.read(), subprocess.run(["cat"], capture_output=True, timeout=10).stdout

    with Client(n_workers=1) as client:
        assert client.submit(read).result(timeout=20) == ("", b"")


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_run_reaches_the_caller_and_the_client_lives_on(synchronous, kind):
    def leave():
        raise kind(3)

    with pytest.raises(kind, match="3"):
        synchronous.run(leave)
    assert synchronous.submit(pow, 2, 3).result(timeout=10) == 8


def in_threads(function, number):
    """Start ``function`` in threads; return how many have not ended after a while."""
    threads = [threading.Thread(target=function, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    return sum(thread.is_alive() for thread in threads)


def test_several_threads_may_close_a_client_at_once(synchronous):
    for _ in range(30):
        outcome = []
        client = Client(synchronous._address)
        assert in_threads(lambda client=client: outcome.append(client.close()), 3) == 0  # noqa: B023
        assert outcome == [None] * 3


def test_who_calls_while_a_client_ends_is_told_that_it_is_closed(synchronous, caplog):
    def call(client):
        with pytest.raises((RuntimeError, concurrent.futures.CancelledError), match="is closed"):
            while True:
                client.submit(abs, -1, pure=False).result()
        told.append(True)

    for _ in range(5):
        told, client = [], Client(synchronous._address)
        closer = threading.Timer(0.02, client.close)
        closer.start()
        assert in_threads(functools.partial(call, client), 6) == 0 and told == [True] * 6
        closer.join(5)
    assert not caplog.records  # It also tells its scheduler nothing more.


def test_a_forked_process_has_a_thread_for_its_own_callbacks(synchronous):
    called = threading.Event()
    future = synchronous.submit(abs, -1)
    future.add_done_callback(lambda future: called.set())
    assert called.wait(10)
    if not (child := os.fork()):
        with contextlib.suppress(BaseException):
            called.clear()
            with Client(synchronous._address) as client:
                future = client.submit(abs, -2)
                future.add_done_callback(lambda future: called.set())
                called.wait(10)
        os._exit(0 if called.is_set() else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_program_ends_in_peace_though_a_callback_never_came():
    program = """
import minidist, time
future = minidist.Client(processes=False).submit(time.sleep, 60)
future.add_done_callback(print)
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.filterwarnings("ignore:a call of more than 10 MB")
def test_a_close_that_took_too_long_can_be_tried_again(scheduler):
    client = Client(scheduler.address)
    os.kill(scheduler.pid, signal.SIGSTOP)
    client.submit(len, bytes(20_000_000))
    for _ in range(2):
        with pytest.raises(TimeoutError):
            client.close(timeout=0.2)
    os.kill(scheduler.pid, signal.SIGCONT)
    client.close(timeout=10)


@pytest.mark.filterwarnings("ignore:a call of more than 10 MB")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no kernel can be told so")
def test_a_close_does_not_wait_long_for_a_scheduler_that_takes_nothing(scheduler, monkeypatch):
    monkeypatch.setitem(minidist.LIMITS, "close_seconds", 1)
    client = Client(scheduler.address)
    os.kill(scheduler.pid, signal.SIGSTOP)
    client.submit(len, bytes(20_000_000))
    client.close(timeout=60)  # (The kernel looks now and then.)
    os.kill(scheduler.pid, signal.SIGCONT)


def test_a_client_ends_in_peace_when_its_scheduler_has_just_died(scheduler):
    async def main():
        async with Client(scheduler.address, asynchronous=True):
            scheduler.kill()
            scheduler.wait()  # The loop has not read that it is gone.

    asyncio.run(main())


def test_a_timeout_holds_though_the_scheduler_does_not_answer(scheduler):
    with Client(scheduler.address) as client:
        os.kill(scheduler.pid, signal.SIGSTOP)
        with pytest.raises(TimeoutError):
            client.scatter([1], timeout=0.1)
        with pytest.raises(TimeoutError):
            client.wait_for_workers(1, timeout=0.1)
        os.kill(scheduler.pid, signal.SIGCONT)
        with pytest.raises(TimeoutError, match="0 of 1 workers are there after 0.1 s"):
            client.wait_for_workers(1, timeout=0.1)


def test_a_close_waits_until_the_scheduler_has_read_what_was_said_before(scheduler):
    client = Client(scheduler.address)
    os.kill(scheduler.pid, signal.SIGSTOP)
    future = client.submit(pow, 2, 3)
    fire_and_forget(future)
    with pytest.raises(TimeoutError):  # Else it may be cut off where there is much to read.
        client.close(timeout=2)
    os.kill(scheduler.pid, signal.SIGCONT)
    client.close(timeout=10)
    with Client(scheduler.address) as other:
        assert other.story(future)


def test_a_client_connects_in_a_loop_that_is_not_of_asyncio(monkeypatch):
    """As uvloop's, which is another class, and knows fewer options."""

    async def main():
        loop = asyncio.get_running_loop()
        connect = loop.create_connection
        monkeypatch.setattr(
            loop, "create_connection", lambda make, host, port: connect(make, host, port)
        )
        monkeypatch.setattr(asyncio, "BaseEventLoop", types.ModuleType)
        async with minidist.Scheduler() as scheduler:
            async with Client(scheduler.address, asynchronous=True) as client:
                assert await client.nthreads() == {}

    asyncio.run(main())


def test_a_release_that_was_interrupted_can_be_done_again(monkeypatch):
    with Client(processes=False) as c:
        future = c.submit(abs, -1)
        assert future.result() == 1
        with monkeypatch.context() as patch:
            patch.setattr(c, "_post", unittest.mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                future.release()
        future.release()
        while c.who_has():
            pass


def test_a_batch_ends_before_what_is_raised_and_nothing_of_it_is_lost():
    def invert(x):
        return 1 // x

    with Client(processes=False, threads_per_worker=1) as c:
        futures = minidist.as_completed(c.map(invert, [1, -1, 0, 0.0, 2]), with_results=True)
        while len(futures._ready) < 5:
            c.run(abs, 1)
        assert [result for _, result in futures.next_batch()] == [1, -1]
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                futures.next_batch(block=False)
        assert [result for _, result in futures.next_batch(block=False)] == [0]
        assert futures.is_empty()


@on_cluster
async def test_a_future_that_is_released_twice_and_deleted_counts_once(c, a, b):
    x, y = c.submit(abs, -1), c.submit(abs, -1)
    x.release(), x.release()
    del x
    assert await y == 1 and c.state.futures[y.key].count == 1


def test_a_future_is_made_by_its_client_alone():
    with Client(processes=False) as c:
        with pytest.raises(TypeError):
            minidist.Future("x", c)


def open_descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_an_asynchronous_client_can_be_used_between_two_runs_of_its_loop():
    async def start():
        scheduler = await minidist.Scheduler()
        worker = await Worker(scheduler.address, nthreads=1)
        return scheduler, worker, await Client(scheduler.address, asynchronous=True)

    async def end(*bodies):
        for body in bodies:
            await body.close()

    with asyncio.Runner() as runner:
        scheduler, worker, c = runner.run(start())
        futures = c.map(abs, [-1, -2])
        more = c.submit(sum, futures)
        futures[0].release()
        assert runner.run(asyncio.wait_for(more.result(), 30)) == 3
        runner.run(end(c, worker, scheduler))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts what Linux lists there")
@pytest.mark.parametrize("kind", ["scheduler", "worker", "client", "cluster"])
def test_whatever_is_cancelled_in_any_turn_of_the_loop_leaves_nothing(kind):
    async def live(address):
        options = {"processes": False, "asynchronous": True}
        make = {
            "scheduler": lambda: minidist.Scheduler(),
            "worker": lambda: Worker(address, 1),
            "client": lambda: Client(address, asynchronous=True),
            "cluster": lambda: minidist.LocalCluster(n_workers=1, threads_per_worker=1, **options),
        }
        async with make[kind]():
            pass

    async def nothing_is_left(before):
        for _ in range(100):
            now = open_descriptors(), threading.active_count(), len(asyncio.all_tasks())
            if all(n <= b for n, b in zip(now, before, strict=True)):
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"after {turns} turns: {before} have become {now}")

    async def main():
        nonlocal turns
        # In debug mode asyncio logs whom it accepts just when a server closes; pytest keeps that.
        asyncio.get_running_loop().set_debug(False)
        async with minidist.Scheduler() as scheduler:
            await live(scheduler.address)
            done = False
            while not done:
                before = open_descriptors(), threading.active_count(), len(asyncio.all_tasks())
                task = asyncio.ensure_future(live(scheduler.address))
                for _ in range(turns):
                    await asyncio.sleep(0)
                done = task.done()
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait_for(task, 5)
                await nothing_is_left(before)
                turns += 1

    turns = 0
    asyncio.run(main())


def test_a_scheduler_closes_in_any_turn_of_a_handshake():
    async def main():
        for turns in range(30):
            scheduler = await minidist.Scheduler().__aenter__()
            client = Client(scheduler.address, asynchronous=True, timeout=0)
            opening = asyncio.ensure_future(client.__aenter__())
            for _ in range(turns):
                await asyncio.sleep(0)
            await asyncio.wait_for(scheduler.close(), 5)
            with contextlib.suppress(OSError):
                await opening
                await client.close()

    asyncio.run(main())
