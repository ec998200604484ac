"""Ten minutes of what can go wrong: in the simulation, and at the same time with real processes.

    python tests/soak.py [--minutes 10] [--histories 15000] [--seed 0]

In one process the simulated cluster of ``test_minidist.py`` goes through fifty times the histories
of a test run.  Beside it, a scheduler and workers, which check their invariants, compute one random
graph of tasks after the other, while workers are killed, stopped, asked to end and started, and
clients vanish.  Every result is compared with that of plain Python, and every failure has to have
a reason.  In the end nothing is left on the cluster, and what the scheduler has recorded must
replay.  Printed is how often what was reached.  A seed gives the same graphs and the same faults;
when they happen is up to the machine.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from multiprocessing import Pool
from pathlib import Path

from minidist import Client, KilledWorker, fire_and_forget, replay

ROOT = Path(__file__).resolve().parent.parent
SLOTS = 4  # worker processes at a time
PATIENCE = 120  # seconds that a result, or an empty cluster, is waited for


def simulate(histories):
    """What so many histories of the simulated cluster reached, of other seeds than the tests'."""
    sys.path.insert(0, str(ROOT))
    from test_minidist import a_deep_history

    seen = Counter()
    for seed in range(10_000, 10_000 + histories):
        try:
            seen += a_deep_history(seed).seen
        except BaseException as error:
            raise AssertionError(f"the simulated history of seed {seed}: {error!r}") from error
    return seen


# ---- Tasks: they travel by value, and tell by their results what they were called with ----


def number_of(value):
    return hash((len(value), *value[:8])) if isinstance(value, bytes) else value


def instant(n, *values):
    return hash((n, *map(number_of, values)))


def slow(n, *values):
    time.sleep(n % 10 / 50)
    return instant(n, *values)


def large(n, *values):
    return instant(n, *values).to_bytes(8, "big", signed=True) * (n % 200_000)


async def waiting(n, *values):
    await asyncio.sleep(n % 10 / 50)
    return instant(n, *values)


def failing(n, *values):
    raise ValueError(n)


def failing_at_first(n, *values, folder):
    """It has no other memory than the disk."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(f"{folder}/{n}", os.O_CREAT | os.O_EXCL))
        raise ValueError(n)
    return instant(n, *values)


def killing(n, *values):
    os._exit(3)


def unpicklable(n, *values):
    return threading.Lock()


KINDS = [instant] * 8 + [slow] * 6 + [large] * 4 + [waiting] * 3
KINDS += [failing, failing_at_first, unpicklable]


class Graph:
    """One random graph of calls: submitted to a client, and computed by plain Python."""

    def __init__(self, choose, folder, number):
        self.choose, self.folder, self.number = choose, folder, number
        self.calls = []  # [(function, its first argument, places of its inputs)]
        self.futures = []  # in the same order
        self.cancelled = set()  # their places

    def grow(self, client, size):
        for place in range(size):
            kind = self.choose.choice(KINDS)
            if self.number % 5 == 0 and place == size // 2:
                kind = killing
            if self.choose.random() < 0.1:
                kind = "data"
            bad = (unpicklable,) if place % 10 == 0 else (unpicklable, failing, killing)
            usable = [i for i, call in enumerate(self.calls) if call[0] not in bad]
            inputs = self.choose.sample(usable, min(len(usable), self.choose.randrange(4)))
            n = self.choose.randrange(10**9)
            self.calls.append((kind, n, [] if kind == "data" else inputs))
            self.futures.append(self.submit(client, place))

    def submit(self, client, place):
        kind, n, inputs = self.calls[place]
        while kind == "data":
            with contextlib.suppress(CancelledError):  # It was lost before it was everywhere.
                return client.scatter(n, hash=False, broadcast=n % 2 == 0, timeout=PATIENCE)
        options = {"priority": n % 3, "pure": False}
        if n % 7 == 0:
            options |= {"workers": [f"w{n % SLOTS}"]}
        if kind is failing_at_first:
            options |= {"retries": 3, "folder": self.folder}
        return client.submit(kind, n, *(self.futures[i] for i in inputs), **options)

    def interfere(self, client):
        """Let go of some, as a user does: by a cancel, or by firing and forgetting."""
        for _ in range(self.choose.randrange(3)):
            place = self.choose.randrange(len(self.futures))
            client.cancel(self.futures[place])
            self.cancelled.add(place)
        fire_and_forget(client.submit(slow, self.choose.randrange(10), pure=False))

    def lineage(self, place):
        found = [place]
        for each in found:
            found += [i for i in self.calls[each][2] if i not in found]
        return found

    def value(self, place):
        kind, n, inputs = self.calls[place]
        if kind in ("data", killing, failing, unpicklable):
            return n
        call = large if kind is large else instant
        return call(n, *map(self.value, inputs))

    def check(self, place):
        """Wait for a result, and compare it: what came of it, in a word or two."""
        lineage = self.lineage(place)
        kinds = {self.calls[i][0] for i in lineage}
        try:
            value = self.futures[place].result(timeout=PATIENCE)
        except CancelledError as error:
            # A submit on data that was lost a moment ago is answered by "its input was cancelled".
            lost = "data" in kinds and ("the data" in str(error) or "its input" in str(error))
            assert lost or self.cancelled & {*lineage}, f"cancelled for no reason: {error}"
            return "data lost" if lost else "cancelled"
        except ValueError as error:
            raising = [
                n for i in lineage for kind, n, _ in [self.calls[i]] if "failing" in name(kind)
            ]
            assert error.args[0] in raising, f"an error of nobody: {error!r}"
            return "task failed"
        except KilledWorker as error:
            assert str(error).count(": ") > 3, error
            return "killed its workers" if killing in kinds else "was there at four deaths"
        except TypeError as error:
            assert self.calls[place][0] is unpicklable and "cannot be pickled" in str(error), error
            return "cannot be pickled"
        except ConnectionError as error:
            assert "fetch" in str(error), error
            return "could not be fetched"
        assert not kinds & {failing, killing}, f"a value in spite of {kinds}"
        assert value == self.value(place), f"a wrong value: {value!r:.80}"
        return "right value"


def name(kind):
    return getattr(kind, "__name__", kind)


# ---- Processes ----


class Cluster:
    """A scheduler and workers, as processes; and a thread that does harm to them."""

    def __init__(self, folder, seed):
        self.folder, self.choose, self.seen = folder, random.Random(seed), Counter()
        self.env = {**os.environ, "MINIDIST_VALIDATE": "1", "PYTHONHASHSEED": "0"}
        self.log = open(f"{folder}/log", "w")
        command = ["scheduler", "--port", 0, "--worker-ttl", 3, "--record", self.recording]
        self.scheduler = self.run(*command, stdout=subprocess.PIPE)
        self.address = re.search(r"tcp://\S+", self.scheduler.stdout.readline())[0]
        self.slots = [self.start_worker(slot) for slot in range(SLOTS)]
        self.stopped = {}  # {slot: when it goes on}
        self.clients = []  # that will vanish
        self.calm, self.ended = threading.Event(), threading.Event()
        self.resting = threading.Event()
        self.thread = threading.Thread(target=self.do_harm, daemon=True)
        self.thread.start()

    @property
    def recording(self):
        return f"{self.folder}/recording.jsonl"

    def run(self, *arguments, script="minidist.py", **options):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        options = {"stdout": self.log, "stderr": self.log, "text": True} | options
        return subprocess.Popen(command, env=self.env, cwd=ROOT, **options)

    def start_worker(self, slot):
        self.seen["workers started"] += 1
        return self.run("worker", self.address, "--nthreads", 1 + slot % 2, "--name", f"w{slot}")

    def do_harm(self):
        while not self.ended.wait(self.choose.random() / 2):
            for slot, process in enumerate(self.slots):
                if process.poll() is not None:
                    self.stopped.pop(slot, None)
                    self.slots[slot] = self.start_worker(slot)
            for slot, until in [*self.stopped.items()]:
                if time.monotonic() > until or self.calm.is_set():
                    del self.stopped[slot]
                    self.slots[slot].send_signal(signal.SIGCONT)
            if self.clients and (self.calm.is_set() or self.choose.random() < 0.2):
                client = self.clients.pop()
                client.kill()
                client.wait()
            if self.calm.is_set() and not self.clients:
                self.resting.set()
            elif not self.calm.is_set() and len(self.stopped) < SLOTS - 1:
                harm = self.choose.choice([self.kill, self.stop, self.end, self.vanish])
                if self.choose.random() < 0.5:
                    harm(self.choose.randrange(SLOTS))

    def kill(self, slot):
        self.seen["killed"] += 1
        self.slots[slot].kill()

    def end(self, slot):
        self.seen["asked to end"] += 1
        self.slots[slot].terminate()

    def stop(self, slot):
        """Sometimes for so long that the scheduler takes it for dead."""
        if slot not in self.stopped and self.slots[slot].poll() is None:
            self.seen["stopped"] += 1
            self.slots[slot].send_signal(signal.SIGSTOP)
            self.stopped[slot] = time.monotonic() + self.choose.choice([0.1, 1, 6])

    def vanish(self, slot):
        """A client comes, submits what others do not want, and is killed amid that or after it."""
        self.seen["clients vanished"] += 1
        arguments = ["--vanish", self.address, "--seed", self.seen.total()]
        self.clients.append(self.run(*arguments, script="tests/soak.py"))

    def calm_down(self):
        self.resting.clear()
        self.calm.set()
        self.resting.wait()

    def close(self):
        self.ended.set()
        self.thread.join()
        for slot in self.stopped:
            self.slots[slot].send_signal(signal.SIGCONT)
        for process in [*self.clients, *self.slots, self.scheduler]:
            process.terminate()
            process.wait(30)
        self.log.close()


def vanish(address, seed):
    """What a client does before it is killed."""
    choose = random.Random(seed)
    with Client(address) as client, tempfile.TemporaryDirectory() as folder:
        graph = Graph(choose, folder, number=1)
        with contextlib.suppress(TimeoutError):
            graph.grow(client, 20)
        time.sleep(PATIENCE)


def endure(cluster, seed, seconds):
    """Graph after graph, until time is over; then nothing is left."""
    end = time.monotonic() + seconds
    with Client(cluster.address) as client:
        for number in itertools.count(1):
            cluster.calm.clear()
            graph = Graph(random.Random(f"{seed} {number}"), cluster.folder, number)
            graph.grow(client, 60)
            graph.interfere(client)
            for place, future in enumerate(graph.futures):
                try:
                    cluster.seen[graph.check(place)] += 1
                except BaseException:
                    call = (name(graph.calls[place][0]), *graph.calls[place][1:])
                    print(f"graph {number} of seed {seed}, {future.key!r}, {call}", flush=True)
                    raise
            cluster.seen["graphs"] += 1
            del graph, future
            if number % 10 == 0 or time.monotonic() > end:
                cluster.calm_down()
                nothing_is_left(client)
                cluster.seen["times that nothing was left"] += 1
            if time.monotonic() > end:
                return


def nothing_is_left(client):
    deadline = time.monotonic() + PATIENCE
    while client.who_has() or any(client.processing().values()):
        if time.monotonic() > deadline:
            raise AssertionError(f"left: {client.who_has()}, {client.processing()}")
        time.sleep(0.1)


def report(title, seen):
    print(f"\n{title}:")
    for what, times in sorted(seen.items(), key=lambda item: -item[1]):
        print(f"{times:10,}  {what}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="of real processes (10)")
    text = "of the simulated cluster, at the same time (15000)"
    parser.add_argument("--histories", type=int, default=15_000, help=text)
    parser.add_argument("--seed", type=int, default=0, help="of the graphs and faults (0)")
    parser.add_argument("--vanish", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.vanish:
        return vanish(options.vanish, options.seed)
    os.environ.setdefault("MINIDIST_TOKEN", os.urandom(16).hex())
    folder = tempfile.mkdtemp(prefix="soak-")
    logging.getLogger("minidist").setLevel("ERROR")  # That a worker is missing is no news here.
    with Pool(1) as pool:
        simulated = pool.apply_async(simulate, [options.histories])
        cluster = Cluster(folder, options.seed)
        try:
            endure(cluster, options.seed, options.minutes * 60)
        finally:
            cluster.close()
            report("real processes", cluster.seen)
            print(f"\nthe log and the recording, kept if something fails: {folder}", flush=True)
        assert "Traceback" not in Path(folder, "log").read_text(), "look into the log"
        (lines,) = [number for number, *_ in replay(cluster.recording, validate=False)][-1:]
        print(f"{lines:,} lines of the recording replay", flush=True)
        report(f"{options.histories:,} simulated histories", simulated.get())
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
