"""Time per task, beside concurrent.futures and dask.distributed; of recording; of the minds alone.

    python benchmarks/bench.py [cluster] [dask] [recording] [minds]

(``dask`` needs the extra ``bench``: ``pip install '.[bench]'``.)

Times on a shared machine vary by half from one minute to the next, so what is compared takes
turns, the median of the rounds is given, and the ratio says more than the microseconds.
"""

import contextlib
import functools
import gc
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from pathlib import Path
from pickle import PickleBuffer
from statistics import median

from minidist import Client, ClientMind, SchedulerMind, WorkerMind

MINIDIST = Path(__file__).resolve().parent.parent / "minidist.py"
TASKS, TRIPS, ROUNDS = 10_000, 200, 5
LINKS = 200  # of a chain
SLOWER = 5  # so many times less work where dask.distributed takes part


def noop(i):
    pass


def time_us(work, repeats):
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) / repeats * 1e6


# ---- The cluster ----


@contextlib.contextmanager
def cluster(*options):
    """A scheduler and two workers of one thread, as processes: a client of theirs."""
    processes, address = start_cluster(*options)
    try:
        with Client(address) as client:
            client.wait_for_workers(2)
            yield client
    finally:
        for process in reversed(processes):  # Workers first: they complain about a lost one.
            process.terminate()
            process.wait()


def start_cluster(*options):
    command = [sys.executable, str(MINIDIST)]
    scheduler = subprocess.Popen(
        [*command, "scheduler", "--port", "0", *options], stdout=subprocess.PIPE, text=True
    )
    for line in scheduler.stdout:
        if match := re.search(r"tcp://\S+:\d+", line):
            worker = [*command, "worker", match[0], "--nthreads", "1", "--name"]
            names = ("bench-1", "bench-2")
            return [scheduler, *(subprocess.Popen([*worker, name]) for name in names)], match[0]
    raise SystemExit(f"the scheduler ended with exit code {scheduler.wait()}")


def bench_cluster():
    # The pool forks its processes now, before the client has a thread that a fork would lose.
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(noop, range(100)))
        with cluster() as client:
            compare(client, pool)


# Arguments that never come again: a pure call with a known key would not run a second time.
numbers = count()


def map_and_gather(client, n=TASKS):
    client.gather(client.map(noop, [next(numbers) for _ in range(n)]))


def trips(client, n=TRIPS):
    for _ in range(n):
        client.submit(noop, next(numbers)).result()


def chain(client):
    """Each task needs the result of the one before."""
    future = client.submit(noop, next(numbers))
    for _ in range(LINKS):
        future = client.submit(first, future, next(numbers))
    future.result()


def first(x, _):
    return x


def array(client):
    """What one task has made, for another on the other worker."""
    here, there = client.nthreads()
    made = client.submit(block, 100_000_000 + next(numbers), workers=here)
    client.submit(len, made, workers=there).result()


def block(n):
    """``n`` bytes which are pickled as a NumPy array is: beside the pickle, and not copied."""
    return PickleBuffer(bytearray(n))


def compare(client, pool):
    def map_pool():
        for future in [pool.submit(noop, next(numbers)) for _ in range(TASKS)]:
            future.result()

    def trips_pool():
        for _ in range(TRIPS):
            pool.submit(noop, next(numbers)).result()

    trips(client)  # Until both workers are there, and have imported what they need.
    print(f"{'':38}{'minidist':>10}{'processes':>12}{'ratio':>8}")
    report(f"map + gather of {TASKS:,}, per task", lambda: map_and_gather(client), map_pool, TASKS)
    report("submit(...).result(), a round trip", lambda: trips(client), trips_pool, TRIPS)


def bench_dask():
    try:
        from dask.distributed import Client as DaskClient
    except ImportError:
        return print("dask.distributed is not here to compare with: pip install '.[bench]'")
    options = {"n_workers": 2, "threads_per_worker": 1}
    with Client(**options) as ours, DaskClient(**options, dashboard_address=None) as theirs:
        print(f"{'':38}{'minidist':>10}{'dask':>12}{'ratio':>8}")
        n, m = TASKS // SLOWER, TRIPS // SLOWER
        for name, work, repeats in (
            (f"map + gather of {n:,}, per task", lambda client: map_and_gather(client, n), n),
            ("submit(...).result(), a round trip", lambda client: trips(client, m), m),
            (f"a chain of {LINKS}, per link", chain, LINKS),
            ("100 MB from worker to worker", array, 1),
        ):
            work(ours), work(theirs)
            this, that = (functools.partial(work, client) for client in (ours, theirs))
            report(name, this, that, repeats)


def bench_recording():
    with tempfile.NamedTemporaryFile() as file, cluster("--record", file.name) as recorded:
        with cluster() as plain:
            print(f"{'':38}{'recorded':>10}{'not':>12}{'ratio':>8}")
            works = [functools.partial(map_and_gather, client) for client in (recorded, plain)]
            # They are so much alike that few rounds would show little but the machine's mood.
            report(f"map + gather of {TASKS:,}, per task", *works, TASKS, rounds=3 * ROUNDS)


def report(name, this, that, repeats, rounds=ROUNDS):
    rounds = [(time_us(this, repeats), time_us(that, repeats)) for _ in range(rounds)]
    ours, theirs = (median(times) for times in zip(*rounds, strict=True))
    print(f"{name:38}{ours:7,.0f} us{theirs:9,.0f} us{ours / theirs:8.2f}", flush=True)


# ---- The minds alone: no wire, no pickles, no threads; each task lives its whole life ----

RUN_SPEC = (b"function", b"arguments")


def sent(mind, op):
    """Take the outbox, as a body does after each batch; give the messages with this op."""
    outbox, mind.outbox = mind.outbox, []
    return [(peer, message) for peer, message in outbox if message[0] == op]


def scheduler_life(n):
    """submit, compute-task, task-finished and release of ``n`` tasks that exist at one time."""
    mind = SchedulerMind()
    mind.stimulus_register_client("client", [])
    for worker in ("w1", "w2"):
        mind.stimulus_register_worker(worker, worker, 1, [], [])
    keys = [f"noop-{i}" for i in range(n)]

    def live():
        for want, key in enumerate(keys):
            mind.stimulus_submit("client", key, want, "noop", RUN_SPEC, [], 0)
        while computed := sent(mind, "compute-task"):
            for worker, message in computed:
                mind.stimulus_task_finished(worker, message[2], 16, "NoneType", 5, ())
        for want, key in enumerate(keys):
            mind.stimulus_release_keys("client", [(key, want)])
        mind.outbox.clear()

    yield live
    assert not mind.tasks and mind.submitted == n and mind.number == n + 1


def client_life(n):
    """submit, key-in-memory and release of ``n`` futures that exist at one time."""
    mind = ClientMind()
    keys = [f"noop-{i}" for i in range(n)]
    notice = {"attempt": 1, "nbytes": 16, "type": "NoneType", "holders": ["w1"], "value": (b"N.",)}

    def live():
        states = [mind.stimulus_submit(key, "noop", RUN_SPEC, [], 0) for key in keys]
        mind.stimulus_ask(states)
        for state in states:
            mind.stimulus_key_in_memory("scheduler", state.key, state.want, **notice)
        for state in states:
            mind.stimulus_release(state)
        mind.outbox.clear()
        mind.news.clear()

    yield live
    assert not mind.futures


def worker_life(n):
    """compute-task, take, finished and free-keys of ``n`` attempts that are here at one time."""
    mind = WorkerMind()
    keys = [f"noop-{i}" for i in range(n)]

    def live():
        for number, key in enumerate(keys, 1):
            args = ("noop", RUN_SPEC, [], number, True)
            mind.stimulus_compute_task("scheduler", key, number, *args)
        while attempt := mind.stimulus_take():
            mind.stimulus_finished(attempt.number, None, 16, "NoneType", 5, (b"N.",))
        for number, key in enumerate(keys, 1):
            mind.stimulus_free_keys("scheduler", [(key, number)])
        mind.outbox.clear()

    yield live
    assert not mind.data and not mind.attempts


def time_life_us(life, n):
    """Microseconds per task, without the setting up before the life and the check after it."""
    (us,) = [time_us(live, n) for live in life(n)]
    return us


def bench_minds():
    gc.collect()
    gc.set_threshold(100_000, 50, 50)  # What the scheduler's process sets.
    print(f"{'a whole life in a mind, per task':38}{'1,000 tasks':>13}{'100,000 tasks':>16}")
    for life in (scheduler_life, client_life, worker_life):
        few = median(time_life_us(life, 1_000) for _ in range(25))
        many = median(time_life_us(life, 100_000) for _ in range(3))
        name = f"{life.__name__.split('_')[0].capitalize()}Mind"
        print(f"{name:38}{few:10.1f} us{many:13.1f} us", flush=True)


if __name__ == "__main__":
    benches = {"cluster": bench_cluster, "dask": bench_dask}
    benches |= {"recording": bench_recording, "minds": bench_minds}
    if not set(sys.argv[1:]) <= set(benches):
        sys.exit(__doc__.strip())
    for name in sys.argv[1:] or benches:
        benches[name]()
