"""The tests of minidist, as a textbook.

Each test's name is one claim.  The chapters follow those of ``minidist.py``.

    0     The map: what the module says of itself
    1     Vocabulary: messages, queues, and what chapters 1 to 4 may not know
    2     Client mind: a transcript for each claim
    3     Scheduler mind: transcripts
    4     Worker mind: transcripts
          The simulated cluster: the three minds together, in any order of events, with faults:
          the cluster, the properties, the two drivers, planted bugs, one story in full
    5     Wire
    6     Serialization
    7-9   The API on a live cluster; twenty programs, as users write them
    12    Command line and processes
          Faults on real sockets and processes
"""

import ast
import asyncio
import contextlib
import functools
import inspect
import json
import operator
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections import Counter, deque
from concurrent.futures import CancelledError
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import minidist
from minidist import (
    ALLOWED_FAILURES,
    BYTES_PER_US,
    LEAVING,
    MESSAGES,
    OPS,
    ROOM_US,
    SCHEDULER,
    TRANSFER_US,
    Client,
    ClientMind,
    HeapSet,
    ProtocolError,
    SchedulerMind,
    Worker,
    WorkerMind,
    as_completed,
    check_message,
    dumps,
    fire_and_forget,
    get_worker,
    loads,
    pack,
    pack_exception,
    read_batch,
    unpack_exception,
    wait,
)

ROOT = Path(minidist.__file__).parent
SCRIPT = str(ROOT / "minidist.py")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """One secret for all processes of a test; minds validate themselves."""
    monkeypatch.setenv("MINIDIST_TOKEN", "the secret of the tests")
    monkeypatch.setenv("MINIDIST_VALIDATE", "1")


# ---- 0. The map: what the module says of itself ----


def test_the_module_says_what_it_is_in_its_first_line():
    assert (
        minidist.__doc__.splitlines()[0]
        == "minidist: dask.distributed in one readable Python file."
    )


def test_every_step_of_the_journey_names_a_method_that_bears_its_number():
    steps = re.findall(r"^    (\d+)\. (\S+)", minidist.__doc__, re.M)
    assert [int(number) for number, _ in steps] == list(range(1, 13))
    for number, name in steps:
        assert operator.attrgetter(name)(minidist).__doc__.startswith(f"[{number}] "), name


# ---- 1. Vocabulary: messages, queues, purity ----


def test_a_message_arrives_as_it_was_sent():
    """It comes as JSON, with its frames, that are bytes, in a table beside it."""
    inputs, frames = [("y", 2), (("z", 0), 3)], [b"inc", b"args"]
    message = ["submit", ("x", 1), 1, "inc", (b"inc", b"args"), inputs, 0.5, ["a"], False, 0]
    came = json.loads(json.dumps(message, default=frames.index))
    assert check_message(came, frames, "client") == message


@pytest.mark.parametrize(
    "message",
    [
        ["no-such-op"],
        {"shutdown": 1},
        ["shutdown", 1],
        ["retry", "x"],
        ["key-lost", "x", 1],
        ["fetch-missed", "x", 1, True, [], False],
        ["fetch-missed", "x", 1, 1, [7], False],
        ["fetch-missed", 1, "x", 1, [], False],
        ["release-keys", [["x"]]],
        ["release-keys", [["x", "1"]]],
        ["release-keys", [[7, 1]]],
    ],
)
def test_what_no_client_sends_is_refused(message):
    with pytest.raises(ProtocolError):
        check_message(message, [], "client")


def test_a_queue_gives_the_smallest_priority_first_and_forgets_what_was_taken_out():
    class Item:
        def __init__(self, priority):
            self.priority = priority

    queue, items = HeapSet(), [Item(n * 37 % 100) for n in range(100)]
    for item in items:
        queue.push(item)
    for item in [item for n, item in enumerate(items) if n % 4]:
        queue.discard(item)
    order = []
    while item := queue.peek():
        order.append(item.priority)
        queue.discard(item)
    assert order == sorted(item.priority for item in items[::4])
    assert len(queue) == 0
    queue.push(items[0])
    queue.discard(items[0])
    assert not queue.heap


def test_the_minds_know_no_network_no_clock_no_chance_and_no_pickle():
    source = open(minidist.__file__).read()
    part_one = source[source.index("# ---- 1. ") :].partition("# ---- 5. ")[0]
    names = set()
    for node in ast.walk(ast.parse(part_one)):
        names |= {getattr(node, field, None) for field in ("id", "attr", "module")}
        names |= {alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")}
    assert "SchedulerMind" in part_one
    assert not names & {"asyncio", "time", "random", "pickle", "cloudpickle", "socket"}


# ---- 2. Client mind ----


def sent(mind):
    """What a mind has to say since it was last asked: [(peer, op, {field: value})]."""
    said = [
        (peer, op, dict(zip(OPS[op][1], values, strict=True)))
        for peer, (op, *values) in mind.outbox
    ]
    mind.outbox.clear()
    mind.validate()
    return said


@pytest.fixture
def client():
    """A client that wants x, and has said so."""
    client = ClientMind()
    client.stimulus_submit("x", "inc", (b"spec",), [], 0)
    sent(client)
    return client


def test_a_submit_names_its_inputs_by_key_and_want(client):
    x = client.futures["x"]
    y = client.stimulus_submit("y", "inc", (), [x], 0)
    fields = dict(key="y", want=2, name="inc", run_spec=(), inputs=[("x", 1)], priority=0)
    fields |= dict(workers=(), loose=False, retries=0)
    assert sent(client) == [(SCHEDULER, "submit", fields)]
    assert (y.status, y.count) == ("pending", 1)


def test_two_futures_of_one_key_are_one_want_and_the_last_one_lets_go(client):
    x = client.futures["x"]
    assert client.stimulus_submit("x", "inc", (b"spec",), [], 0) is x
    client.stimulus_release(x)
    assert sent(client) == []
    client.stimulus_release(x)
    assert sent(client) == [(SCHEDULER, "release-keys", {"names": [("x", 1)]})]
    assert (client.futures, x.status, x.value) == ({}, "cancelled", ())


def test_news_of_an_older_want_is_ignored(client):
    client.stimulus_release(client.futures["x"])
    again = client.stimulus_submit("x", "inc", (b"spec",), [], 0)
    client.stimulus_key_erred(SCHEDULER, "x", 1, (b"old",), "", "")
    client.stimulus_key_cancelled(SCHEDULER, "x", 1, "old")
    assert (again.want, again.status) == (2, "pending")


def test_a_value_is_fetched_only_when_somebody_asks_for_it(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    assert (x.status, sent(client)) == ("finished", [])
    client.stimulus_ask([x])
    assert sent(client) == [("w", "get-data", {"names": [("x", 5)]})]
    client.stimulus_data("w", "x", 5, "ok", (b"42",))
    assert (x.value, sent(client)) == ((b"42",), [])


# ---- 3. Scheduler mind ----


class Scheduler(SchedulerMind):
    """A scheduler driven by hand: its stimuli with what the transcripts do not care about."""

    def __init__(self, *workers, nthreads=1, clients=("c",)):
        super().__init__()
        for client in clients:
            self.stimulus_register_client(client, [])
        for worker in workers:
            self.stimulus_register_worker(worker, f"name of {worker}", nthreads, [], [])
        self.outbox.clear()

    def submit(self, key, *inputs, client="c", want=1, name=None, **options):
        """``inputs`` are wanted under the number 1, like everything else."""
        call = (key, want, name or key, (str(key).encode(),), [(i, 1) for i in inputs])
        options = dict(priority=0, workers=(), loose=False, retries=0) | options
        self.stimulus_submit(client, *call, *options.values())

    def release(self, *keys, client="c", want=1):
        self.stimulus_release_keys(client, [(key, want) for key in keys])

    def finish(self, key, nbytes=8, duration_us=1_000_000, value=()):
        """The worker that has ``key`` finishes it; returns (worker, attempt)."""
        ts = self.tasks[key]
        worker, attempt = ts.processing_on.id, ts.attempt
        self.stimulus_task_finished(worker, attempt, nbytes, "int", duration_us, value)
        return worker, attempt

    def measured(self, name, duration_us):
        """Let the scheduler know how long ``name`` takes."""
        self.submit("measure", want=99, name=name)
        self.finish("measure", duration_us=duration_us)
        self.release("measure", want=99)
        sent(self)
        return self

    def states(self):
        self.validate()
        return {key: ts.state for key, ts in self.tasks.items()}

    def computing(self):
        """Who was sent what since last asked: [(worker, key)]."""
        return [(peer, fields["key"]) for peer, op, fields in sent(self) if op == "compute-task"]


def test_a_task_without_inputs_is_sent_at_once():
    s = Scheduler("w")
    s.submit("x")
    order = s.tasks["x"].priority
    fields = dict(key="x", attempt=1, name="x", run_spec=(b"x",), places=[], order=order)
    assert sent(s) == [("w", "compute-task", fields | {"wanted": True})]
    assert s.states() == {"x": "processing"}


def test_a_dependent_waits_until_its_dependency_is_in_memory():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    assert s.states() == {"x": "processing", "y": "waiting"}
    s.finish("x")
    assert s.states() == {"x": "memory", "y": "processing"}


def test_tasks_are_sent_in_the_order_of_their_priorities_then_of_their_submission():
    s = Scheduler()
    for key, priority in [("low", -1), ("a", 0), ("b", 0), ("high", 7)]:
        s.submit(key, priority=priority)
    s.stimulus_register_worker("w", "w", 4, [], [])
    assert [key for _, key in s.computing()] == ["high", "a", "b", "low"]


def test_a_lost_result_is_computed_again_with_the_inputs_that_were_freed():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    s.finish("x")
    s.release("x")
    s.finish("y")
    sent(s)
    s.stimulus_worker_left("w")
    assert s.states() == {"x": "no-worker", "y": "waiting"}
    assert [op for _, op, _ in sent(s)] == ["worker-left", "key-lost", "warning"]
    s.stimulus_register_worker("v", "v", 1, [], [])
    s.finish("x")
    s.finish("y")
    assert s.states() == {"x": "released", "y": "memory"}


# ---- 4. Worker mind ----


def test_an_attempt_without_inputs_is_ready_at_once_and_ends_with_its_value():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [], 0, True)
    assert (w.attempts[7].state, sent(w)) == ("ready", [])
    assert w.stimulus_take().number == 7
    assert (w.attempts[7].state, w.stimulus_take(), sent(w)) == ("executing", None, [])
    w.stimulus_finished(7, 1, 8, "int", 10, (b"1",))
    fields = dict(attempt=7, nbytes=8, type="int", duration_us=10, value=(b"1",))
    assert sent(w) == [(SCHEDULER, "task-finished", fields)]
    assert (w.attempts, list(w.data)) == ({}, [("y", 7)])


def test_threads_take_attempts_in_the_order_of_their_priorities():
    w = WorkerMind()
    for number, priority in [(1, 5), (2, 3), (3, 4)]:
        w.stimulus_compute_task(SCHEDULER, "y", number, "f", (b"f",), [], priority, True)
    assert [w.stimulus_take().number for _ in range(3)] == [2, 3, 1]


# ---- The simulated cluster: three minds, every order of events, and faults ----
#
# The worst bugs of such systems are interleavings: a release that overtakes a submit, a theft that
# crosses a cancel, a worker that dies between two messages.  No test of a live cluster meets them
# often enough.  Since the minds are pure, here is a cluster in which *nothing* happens by itself:
#
#   Cluster      real minds, bodies that only keep values, one FIFO channel for each connection and
#                direction, and a clock that stands still.  ``step`` lets one thing happen: a message
#                arrives, a thread begins or ends a task, somebody acts, something breaks, time passes.
#   a driver     chooses the steps.  Hypothesis shrinks what it finds to a short story; a seeded
#                ``random`` goes deeper, and counts what it reached.
#   properties   say what must hold after each step, whenever nothing is in flight, and at the end.
#   planted bugs show that each property bites.

DURATIONS_US = {"instant": 10, "short": 2_000, "long": 20_000, "hours": 10**10, "unpicklable": 10}
FAILS = ("never", "never", "never", "never", "at first", "always", "kills its worker")


class Cluster:
    """Minds, channels and values.  ``pick`` is any number; it chooses among what is possible."""

    @dataclass(frozen=True)
    class Call:
        """What a user submits: a call on the values of other keys, or (``data``) a value."""

        n: int
        name: str = "data"
        inputs: tuple = ()
        fails: str = "never"
        retries: int = 0
        workers: tuple = ()
        loose: bool = False

        def value(self, *values):
            """The frames of its value, which shows which call was made with which values.

            Or a text instead: then it cannot be pickled.
            """
            number = crc32(repr((self.n, *values)).encode())
            return f"cannot pickle {number}" if self.name == "unpicklable" else (b"%d" % number,)

    class Counting(SchedulerMind):
        """A scheduler's mind that says how often a worker stole."""

        stolen = 0

        def steal(self, ws):
            ts = super().steal(ws)
            self.stolen += ts is not None
            return ts

    class Broken(AssertionError):
        """A property does not hold: which one."""

    def __init__(self, workers=2, clients=1):
        self.minds = {SCHEDULER: self.Counting()}  # {id: mind} of those alive; w... and c... too
        self.channels = {}  # {(sender, receiver, kind): deque}; None in one: the connection is lost
        self.running = {}  # {worker: {attempt number: (Attempt, values of its inputs)}}
        self.hung = set()  # workers that do nothing until they come back
        self.names = {}  # {worker: its name}
        self.held = {}  # {client: [FutureState]}: one entry for each Future object
        self.broken = set()  # {(peer, holder)}: data links that fail for good
        self.calls = {}  # {key: Call}
        self.specs = {}  # {number: Call}: older calls of a key run beside its newest
        self.now_us = 0
        self.heard_us = {}  # {worker: when the scheduler got its last sign of life}
        # What has happened, for the properties to judge by:
        self.seen = Counter()
        self.log = []  # every message: (sender, receiver, message)
        self.news = []  # [(client, FutureState, its status before)] that changed in this step
        self.known = {}  # {FutureState: (status, value)}, as the news told it
        self.lost = set()  # keys of which a client has heard that their value is lost
        self.vain = []  # [(peer, value, holder)]: who needed a value and did not get it there
        self.excused = set()  # {(peer, holder)}: between whom a link has failed
        self.gone = set()  # workers that died, left, or were taken for dead
        self.took = {}  # {worker: the keys whose values were there when it went}
        self.taken_along = []  # values that left with a worker though others could have had them
        self.struck = set()  # {(holder, value)}: given up there since somebody did not get it
        self.cancelled = set()  # {(whose want, key)}
        self.deaths = {}  # {key: the workers that died while it was alone there}
        self.runs, self.allowed = Counter(), Counter()  # {key: how often it ran, and may run}
        self.forgotten = set()  # keys that were fired and forgotten
        self.retried = {}  # {FutureState that its user wanted once more: its exception before}
        self.needless = []  # attempts that began though nobody needed them, as their worker knew
        self.strays = []  # [(worker, attempt)]: it began where it must not run
        self.edges = set()  # {(kind of mind, start, finish)}
        for _ in range(workers):
            self.a_worker_joins()
        for _ in range(clients):
            self.a_client_joins()

    def step(self, event, pick):
        """Let one thing happen, and look at what must hold always."""
        getattr(self, event)(pick)
        self.demand(self, *ALWAYS)
        self.news.clear()
        self.vain.clear()

    @classmethod
    def demand(cls, of, *promises):
        """Properties must hold ``of`` a cluster, or a mind; Broken says which one does not."""
        for promise in promises:
            try:
                promise(of)
            except AssertionError as error:
                raise cls.Broken(promise.__name__) from error

    @staticmethod
    def pick_from(options, pick):
        """One of the options, in a list; or none, if there are none."""
        return [options[pick % len(options)]] if options else []

    @staticmethod
    def threads_of(worker):
        return 1 + int(worker[-1]) % 2

    def ids(self, kind):
        return [id for id in self.minds if id[0] == kind]

    def pick_state(self, pick, *statuses):
        """One (client, state) that its user holds, in a list, or none."""
        pairs = [(c, s) for c in self.ids("c") for s in self.held[c]]
        pairs = [(c, s) for c, s in pairs if not statuses or s.status in statuses]
        return self.pick_from(pairs, pick)

    def lineage(self, *keys):
        """These keys and all that they are computed from."""
        found = list(dict.fromkeys(keys))
        for key in found:  # It grows meanwhile.
            found += [i for i in self.calls[key].inputs if i not in found]
        return found

    def family(self, keys):
        """What may have to run again when these keys do: lineages, and all that is made of them."""
        keys = set(keys)
        return self.lineage(*(k for k in self.calls if keys & set(self.lineage(k))), *keys)

    # What users do.

    def a_client_joins(self, pick=0):
        if self.seen["calls changed"]:
            return  # Which of two calls wins would depend on whose message comes first.
        self.seen["clients"] += 1
        id = f"c{self.seen['clients']}"
        self.minds[id], self.held[id] = ClientMind(), []
        self.post(id, SCHEDULER, ["register-client", id, []])

    def a_client_submits(self, pick=0):
        for client in self.pick_from(self.ids("c"), pick):
            held = self.usable(client)
            inputs = [held[pick // (7**i) % len(held)] for i in range(pick % 4) if held]
            workers = tuple(f"name {i}" for i in range(pick // 11 % 3)) if pick % 4 == 0 else ()
            self.submit_new(
                client,
                list(DURATIONS_US)[pick // 5 % 17 % 5],
                tuple(dict.fromkeys(state.key for state in inputs)),
                FAILS[pick // 3 % 31 % len(FAILS)],
                retries=max(0, pick // 2 % 7 - 4),
                workers=workers,
                loose=bool(workers) and pick % 8 == 0,
            )

    def a_client_maps_over_one_input(self, pick=0):
        for client in self.pick_from(self.ids("c"), pick):
            for state in self.pick_from(self.usable(client), pick):
                for _ in range(2 + pick % 4):
                    self.submit_new(client, "long", (state.key,))

    def submit_new(self, client, *call, **options):
        n = len(self.calls)
        key = ("call", n) if n % 2 else f"call-{n}"
        self.calls[key] = self.specs[n] = self.Call(n, *call, **options)
        self.submit(client, key)

    def usable(self, client):
        """The states whose futures a user has: those of a scatter only when it is over."""
        return [
            s
            for s in self.held[client]
            if s.status != "pending" or self.calls[s.key].name != "data"
        ]

    def a_client_scatters(self, pick=0):
        for client in self.pick_from(self.ids("c"), pick):
            n = len(self.calls)
            known = [key for key, call in self.calls.items() if call.name == "data"]
            (key,) = (self.pick_from(known, pick // 3) if pick % 3 == 0 else []) or [f"data-{n}"]
            self.calls.setdefault(key, self.Call(n, workers=("name 0",) if pick % 5 == 0 else ()))
            self.submit(client, key, broadcast=pick % 2 == 0)

    def a_client_submits_a_known_call(self, pick=0):
        for client in self.pick_from(self.ids("c"), pick):
            running = [key for key in self.calls if self.is_running(key)] if pick % 2 else []
            for key in self.pick_from(running or list(self.calls), pick // 3):
                self.submit(client, key)

    def a_user_changes_a_call(self, pick=0):
        """Drop a key's futures and submit it at once as another call, with another outcome.

        Only where it is clear which call should win: with one client, and no dependents.
        """
        taken = {key for call in self.calls.values() for key in call.inputs} | self.forgotten
        keys = [s.key for s in self.held.get("c1", ()) if s.key not in taken]
        keys = [key for key in keys if self.calls[key].name != "data"]
        keys = [key for key in keys if pick % 2 and self.is_running(key)] or keys
        for key in self.pick_from(keys if self.seen["clients"] == 1 else [], pick):
            for state in [state for state in self.held["c1"] if state.key == key]:
                self.release("c1", state)
            call = self.calls[key]
            fails = "always" if call.fails == "never" else "never"
            self.calls[key] = replace(call, n=call.n + 1_000, fails=fails)
            self.specs[call.n + 1_000] = self.calls[key]
            self.submit("c1", key)
            self.seen["calls changed"] += 1

    def submit(self, client, key, broadcast=False):
        """Submit a call, and before it those of its inputs that this client does not hold."""
        call, mind = self.calls[key], self.minds[client]
        held = {state.key: state for state in self.usable(client)}
        if call.name == "data":
            workers = list(call.workers)
            state = mind.stimulus_scatter(key, call.value(), 8, "int", workers, broadcast)
        else:
            futures = [held.get(i) or self.submit(client, i) for i in call.inputs]
            if not set(futures) <= set(self.usable(client)):
                return None  # Some other time: what it needs is only now being scattered.
            spec, options = (b"%d" % call.n,), (list(call.workers), call.loose, call.retries)
            state = mind.stimulus_submit(key, call.name, spec, futures, call.n % 3 / 2, *options)
        self.seen["resubmitted while it runs"] += state.count == 1 and self.is_running(key)
        self.held[client].append(state)
        self.flush(client)
        return state

    def is_running(self, key):
        return any(a.key == key for some in self.running.values() for a, _ in some.values())

    def a_client_releases(self, pick=0):
        for client, state in self.pick_state(pick):
            self.release(client, state)

    def release(self, client, state):
        self.held[client].remove(state)
        self.minds[client].stimulus_release(state)
        self.flush(client)

    def a_client_asks(self, pick=0):
        for client, state in self.pick_state(pick):
            self.minds[client].stimulus_ask([state])
            self.flush(client)

    def a_client_cancels(self, pick=0):
        statuses = ["pending"] if pick % 2 else []
        for client, state in self.pick_state(pick, *statuses):
            force = pick % 5 == 0
            self.cancelled.add(("anybody" if force else client, state.key))
            self.seen["cancelled while it runs"] += self.is_running(state.key)
            self.minds[client].stimulus_cancel([state], force)
            self.flush(client)

    def a_client_retries(self, pick=0):
        for client, state in self.pick_state(pick, "error"):
            self.retried[state] = state.exception
            self.minds[client].stimulus_retry([state])
            self.flush(client)

    def a_client_fires_and_forgets(self, pick=0):
        for client, state in self.pick_state(pick):
            self.minds[client].stimulus_fire_and_forget([state])
            self.forgotten.add(state.key)
            self.release(client, state)

    # What threads, messages and clocks do.

    def something_moves(self, pick=0):
        """One message arrives, or a thread begins or ends a task.  False: all is quiet."""
        moves = [(self.deliver, *c) for c in self.channels if c[1] not in self.hung]
        moves += self.thread_moves(pick)
        for move, *arguments in self.pick_from(moves, pick):
            move(*arguments)
        return bool(moves)

    def thread_moves(self, pick):
        for worker in self.ids("w"):
            if worker not in self.hung:
                if len(self.running[worker]) < self.threads_of(worker) and self.minds[worker].ready:
                    yield self.take, worker
                yield from [(self.end, worker, number, pick) for number in self.running[worker]]

    def take(self, worker):
        attempt = self.minds[worker].stimulus_take()
        call, inputs = self.specs[int(attempt.run_spec[0])], attempt.inputs
        drawn = any((key, number) in inputs for _, key, number in self.struck)
        drawn = drawn or any(self.calls[key].name == "unpicklable" for key, _ in inputs)
        if call.workers and self.names[worker] not in call.workers and not (call.loose or drawn):
            self.strays.append((worker, attempt))
        values = [self.minds[worker].data[name] for name in attempt.inputs]
        self.running[worker][attempt.number] = (attempt, values)
        self.runs[attempt.key] += 1
        self.seen["computed again"] += attempt.key in self.lost
        ws = self.minds[SCHEDULER].workers.get(worker)
        if ws and (SCHEDULER, worker, "stream") not in self.channels:
            ts, _ = ws.processing[attempt.number]
            self.needless += [attempt] if ts.attempt != attempt.number else []
            self.seen["suspects"] += ws.alone
            self.seen["suspects of two deaths"] += ws.alone and not ts.deaths
        self.flush(worker)

    def end(self, worker, number, pick):
        attempt, values = self.running[worker][number]
        call = self.specs[int(attempt.run_spec[0])]
        if call.fails == "kills its worker":
            self.seen["killed by a task"] += 1
            return self.lose_worker(worker, told=pick % 2)
        del self.running[worker][number]
        if call.fails == "always" or (call.fails == "at first" and self.runs[attempt.key] == 1):
            self.minds[worker].stimulus_failed(number, (b"error %d" % call.n,))
        else:
            value = call.value(*values)
            rides = value if attempt.wanted and pick % 2 and isinstance(value, tuple) else ()
            fields = (10 ** (call.n % 8), "int", DURATIONS_US[call.name], rides)
            self.minds[worker].stimulus_finished(number, value, *fields)
        self.flush(worker)

    def time_passes(self, pick=0):
        """Who lives says so; and the scheduler, or a worker, learns what time it is."""
        self.now_us += pick % 25 * (1_000_000 if pick % 3 else 1_000)  # Seconds; or hardly any.
        for worker in self.ids("w"):
            if worker not in self.hung:
                self.post(worker, SCHEDULER, ["heartbeat"])
        for id in [SCHEDULER] if pick % 2 else self.pick_from(self.ids("w"), pick):
            if id not in self.hung:
                for worker in self.minds[SCHEDULER].workers if id == SCHEDULER else ():
                    if self.now_us - self.heard_us[worker] > self.minds[SCHEDULER].ttl_us:
                        self.blame(worker)
                        self.fault("silent for too long", worker)
                self.minds[id].stimulus_time_passes(self.now_us)
                self.flush(id)

    # Faults.

    def fault(self, what, worker):
        """A worker is lost: what was there, and what that is made from, may run once more."""
        if worker in self.minds:  # (What was silent for too long may have died since.)
            self.took[worker] = {key for key, _ in self.minds[worker].data}
        if worker in self.gone:
            return  # Of a worker that left, or was silent, its death is no news.
        self.seen[what] += 1
        self.seen["faults"] += 1
        self.gone.add(worker)
        touched = {*self.took[worker], *(a.key for a in self.minds[worker].attempts.values())}
        if ws := self.minds[SCHEDULER].workers.get(worker):
            touched |= {ts.key for ts, _ in ws.processing.values()}
            touched |= {ts.key for ts in (*ws.has_what, *ws.arriving.values())}
        self.allowed.update(self.lineage(*touched))

    def blame(self, worker):
        """The scheduler is about to hear of a death: whom it may blame for that."""
        ws = self.minds[SCHEDULER].workers.get(worker)
        if ws and len(ws.processing) == 1 and ws.load != LEAVING:
            for ts, _ in ws.processing.values():
                self.deaths.setdefault(ts.key, set()).add(worker)
        self.seen["witnesses"] += bool(ws and len(ws.processing) > 1 and ws.load != LEAVING)

    def a_worker_joins(self, pick=0):
        self.seen["workers"] += 1
        id = f"w{self.seen['workers']}"
        cut_off = [w for w in self.minds[SCHEDULER].workers if w not in self.minds]
        if cut_off and pick % 3 == 1:  # One was cut off, and is back before that is known.
            id = f"{cut_off[0].partition('#')[0]}#{id[1:]}"
        taken = [self.names[w] for w in self.ids("w")]
        free = [f"name {i}" for i in range(99) if f"name {i}" not in taken]
        self.names[id] = taken[0] if taken and pick % 9 == 5 else free[0]
        self.minds[id], self.running[id] = WorkerMind(), {}
        threads = self.threads_of(id)
        self.post(id, SCHEDULER, ["register-worker", id, self.names[id], threads, [], []])

    def a_worker_dies(self, pick=0):
        for worker in self.pick_from(self.ids("w"), pick):
            self.lose_worker(worker, told=pick % 2)

    def lose_worker(self, worker, told):
        """It ends.  Whom the scheduler will blame is known when it hears of it (``deliver``)."""
        self.fault("lost while it runs" if self.running[worker] else "lost", worker)
        self.vanish(worker, told)

    def a_worker_leaves(self, pick=0):
        for worker in self.pick_from([w for w in self.ids("w") if w not in self.hung], pick):
            if not self.minds[worker].leaving:
                self.minds[worker].stimulus_leave()
                self.flush(worker)

    def a_worker_hangs(self, pick=0):
        self.hung.update(self.pick_from(self.ids("w"), pick))

    def a_worker_comes_back(self, pick=0):
        self.hung.difference_update(self.pick_from(sorted(self.hung), pick))

    def a_client_vanishes(self, pick=0):
        for client in self.pick_from(self.ids("c")[1:], pick):
            del self.held[client]
            self.seen["clients vanished"] += 1
            if pick % 3 == 0:  # Closed: the last thing that it says.
                self.post(client, SCHEDULER, ["leave"])
            self.vanish(client, told=pick % 2)

    def vanish(self, id, told):
        """All its connections are lost; ``told``: after what it had sent to the scheduler."""
        self.remember_edges(self.minds.pop(id))
        self.hung.discard(id)
        self.running.pop(id, None)
        stream = self.channels.get((id, SCHEDULER, "stream"), ()) if told else ()
        for channel in [channel for channel in self.channels if id in channel]:
            del self.channels[channel]
        self.channels[id, SCHEDULER, "stream"] = deque([*stream, None])
        for peer, _ in self.links(id):
            self.channels[id, peer, "answer"] = deque([None])

    def links(self, to=None):
        """The data connections in use, and the keys of what travels there: {(peer, holder): keys}"""
        links = {}
        for peer in [*self.ids("c"), *self.ids("w")]:
            asked = [(h, key) for h, some in self.minds[peer].requests.items() for key, _ in some]
            puts = self.minds[peer].puts if peer in self.held else {}
            for holder, key in asked + [(w, state.key) for state, (w, _) in puts.items()]:
                if to in (None, holder):
                    links.setdefault((peer, holder), []).append(key)
        return links

    def a_data_link_fails(self, pick=0):
        links = [(peer, holder) for peer, holder in self.links() if holder in self.minds]
        for peer, holder in self.pick_from(links, pick):
            self.seen.update(["faults", "links failed"])
            self.channels.pop((peer, holder, "request"), None)
            self.channels[holder, peer, "answer"] = deque([None])
            self.excused.add((peer, holder))
            if pick % 3 == 0:
                self.broken.add((peer, holder))

    # The network.

    def post(self, sender, receiver, message, kind="stream"):
        self.channels.setdefault((sender, receiver, kind), deque()).append(message)
        self.log.append((sender, receiver, message))

    def flush(self, id):
        """Do what a body does after each stimulus: send, and wake who waits."""
        mind = self.minds[id]
        self.demand(mind, type(mind).validate)
        for peer, message in mind.outbox:
            self.seen[message[0]] += 1
            if message[0] == "key-lost":
                self.lost.add(message[1])
            if message[0] == "goodbye" and peer in self.running:
                self.taken_along += self.only_there(peer)
                self.took[peer] = {key for key, _ in self.minds[peer].data}
            if message[0] not in ("get-data", "put-data"):
                if peer in self.minds:
                    self.post(id, peer, message)
            elif peer in self.minds and (id, peer) not in self.broken:
                self.post(id, peer, message, "request")
            else:
                self.post(peer, id, None, "answer")
        mind.outbox.clear()
        if id[0] == "c":
            before = {state: self.known.get(state, ("pending",))[0] for state in mind.news}
            self.news += [(id, state, status) for state, status in before.items()]
            self.known |= {state: (state.status, state.value) for state in mind.news}
            mind.news.clear()

    def only_there(self, worker):
        """The values that clients want and could have kept, had this worker not left with them."""
        wanted = {(s.key, s.attempt) for c in self.ids("c") for s in self.minds[c].futures.values()}
        others = [w for w in self.ids("w") if w != worker]
        data = self.minds[worker].data if worker in self.minds else {}
        left = [name for name in data if (worker, *name) not in self.struck]
        alone = [name for name in left if not any(name in self.minds[w].data for w in others)]
        there = [name for name in alone if name in wanted and isinstance(data[name], tuple)]
        staying = [ws for ws in self.minds[SCHEDULER].workers.values() if ws.load != LEAVING]
        cut_off = [ws for ws in staying if (ws.id, worker) in self.excused]
        can_be = len(cut_off) < min(ALLOWED_FAILURES, len(staying)) and not self.cancelled
        faults = self.seen["faults"] - self.seen["links failed"] - self.seen["left"]
        return there if can_be and not faults else []

    def deliver(self, sender, receiver, kind):
        channel = self.channels[sender, receiver, kind]
        message = channel.popleft()
        if not channel:
            del self.channels[sender, receiver, kind]
        role = {"c": "client", "w": "worker", "s": "scheduler"}[sender[0]]
        if message is None:
            if kind == "stream":
                self.blame(sender)
            elif sender in self.minds and receiver[0] == "w":  # (Death touches all that was there.)
                self.allowed.update(self.lineage(*self.links(sender).get((receiver, sender), ())))
            lost = "link_lost" if kind == "answer" else f"{role}_left"
            getattr(self.minds[receiver], f"stimulus_{lost}")(sender)
        else:
            _, header, *frames = pack([message])
            assert all(type(frame) is bytes for frame in frames), message
            (message,), _ = json.loads(header)
            check_message(message, frames, "holder" if kind == "answer" else role)
            self.handle(sender, receiver, *message)
        if receiver in self.minds:
            self.flush(receiver)

    def handle(self, sender, receiver, op, *values):
        """What a body does with a message: most of them are for its mind."""
        fields = dict(zip(OPS[op][1], values, strict=True))
        stimulus = getattr(self.minds[receiver], "stimulus_" + op.replace("-", "_"), None)
        if op == "get-data":
            for name in fields["names"]:
                self.post(receiver, sender, self.answer(receiver, name), "answer")
        elif op in ("refused", "goodbye"):
            self.vanish(receiver, told=False)
        elif receiver == SCHEDULER:
            scheduler = self.minds[SCHEDULER]
            known = sender in scheduler.workers or sender in scheduler.clients
            if known or op.startswith("register-"):
                self.witness(sender, op, fields)
                stimulus(fields.pop("id", sender), *fields.values())
        elif op not in ("registered", "warning"):
            held = {*getattr(self.minds[receiver], "data", ())}
            stimulus(sender, *values)
            for name in {*getattr(self.minds[receiver], "data", ())} - held:
                self.seen["transfers"] += op == "data"
                self.seen["replicas"] += sum(name in self.minds[w].data for w in self.ids("w")) > 1

    def witness(self, sender, op, fields):
        """Before the scheduler acts on a message: what it allows, and what it shows."""
        tasks, ws = self.minds[SCHEDULER].tasks, self.minds[SCHEDULER].workers.get(sender)
        misses, current = (), False
        if op in ("submit", "retry"):
            # What failed because the same input did is retried, too.
            again = self.family(self.lineage(fields["key"])) if op == "retry" else [fields["key"]]
            for key in again:
                self.allow_run(key, tasks)
        elif op in ("heartbeat", "register-worker"):
            self.heard_us[sender] = self.minds[SCHEDULER].now_us
            for old in self.minds[SCHEDULER].workers if op == "register-worker" else ():
                if old.partition("#")[0] == sender.partition("#")[0]:
                    self.fault("registered again", old)
        elif op == "leave" and ws:
            self.fault("left", sender)
        elif op == "fetch-missed":
            misses = [(fields["key"], fields["attempt"], fields["holders"])]
            ts = tasks.get(fields["key"])
            wanted = ts in self.minds[SCHEDULER].clients[sender].wants_what
            current = wanted and ts.attempt == fields["attempt"] and ts.state == "memory"
        elif op.startswith("task-"):
            current, misses = False, fields.get("misses", ())
            self.struck.update((h, key, attempt) for key, attempt, some in misses for h in some)
            if fields["attempt"] in ws.processing:
                ts, _ = ws.processing[fields["attempt"]]
                current = ts.attempt == fields["attempt"]
                self.seen["abandoned"] += not current
                self.seen["returned as late"] += op == "task-returned" and current and not misses
        for key, attempt, holders in misses if current else ():
            self.vain += [(sender, (key, attempt), holder) for holder in holders]

    def allow_run(self, key, tasks):
        """A key that nobody needed may run once, and what it is computed from, if nobody does."""
        ts, call = tasks.get(key), self.calls[key]
        if not (ts and (ts.who_wants or ts.waiters) and not ts.error):
            self.allowed[key] += 1 + call.retries
            for i in call.inputs:
                self.allow_run(i, tasks)

    def answer(self, holder, name):
        value = self.minds[holder].data.get(name)
        if value is None:
            return ["data", *name, "missing", ()]
        if type(value) is str:
            return ["data", *name, "error", (value.encode(),)]
        return ["data", *name, "ok", value]

    # What the properties compare with.

    def expected(self, key):
        """What plain sequential Python gives, and which exceptions may be seen.

        The value is None if the call raises, or (a string) cannot be pickled: then it is of use on
        the worker that has it, and only there.
        """
        call = self.calls[key]
        outcomes = [self.expected(i) for i in call.inputs]
        values = [value for value, _ in outcomes]
        exceptions = {exception for _, some in outcomes for exception in some}
        # An input that cannot be pickled takes retries, too.
        spent = exceptions or not call.retries
        if call.fails == "always" or (call.fails == "at first" and spent):
            exceptions.add(b"error %d" % call.n)
        if call.fails in ("always", "kills its worker") or None in values:
            return None, exceptions
        value = call.value(*values)
        if type(value) is str:
            exceptions.add(value.encode())
        return value, exceptions

    def worth_stealing(self, ts, victim, ws):
        """Whether a task would start sooner on an idle worker, its inputs moved there."""
        missing = [d.nbytes for d in ts.dependencies if ws not in d.who_has]
        moving_us = TRANSFER_US + sum(missing) // BYTES_PER_US if missing else 0
        here_us = (victim.occupancy - victim.queue[ts]) // victim.nthreads
        there_us = moving_us + ws.occupancy // ws.nthreads
        bound = ts.suspect or any(d.stuck for d in ts.dependencies)
        return ws in self.minds[SCHEDULER].allowed(ts) and not bound and there_us < here_us

    # The end.

    def the_books_are_compared(self, pick=0):
        """In a copy of the cluster all that is in flight arrives, without another fault."""
        copy = deepcopy(self, {id(self.log): []})  # ... but for its log.
        copy.hung.clear()
        copy.broken.clear()
        while copy.channels:
            copy.deliver(*self.pick_from(list(copy.channels), pick)[0])
        self.demand(copy, agreement, capacity)

    def calm_down(self, choose):
        """No more faults: what is under way arrives, in some order, and then nothing moves.

        Workers that tasks have killed, and those that tasks call for by name, are there.
        """
        self.hung.clear()
        for _ in range(3_000 + 300 * len(self.calls) * len(self.minds)):
            if not self.something_moves(choose.randrange(10**6)):
                called = {"name 0"} | {w for call in self.calls.values() for w in call.workers}
                if called <= {self.names[w] for w in self.ids("w")}:
                    return
                self.a_worker_joins()
            self.demand(self, *ALWAYS)
            self.news.clear(), self.vain.clear()
        raise self.Broken("liveness")

    def end_well(self, choose):
        """The end of each history: everybody gets what he waits for, and lets it go."""
        self.calm_down(choose)
        self.demand(self, agreement)
        for client in self.ids("c"):
            asked = [state for state in self.held[client] if choose.random() < 0.8]
            self.minds[client].stimulus_ask(asked)
            self.flush(client)
        self.calm_down(choose)
        self.demand(self, liveness, oracle, agreement, no_needless_run)
        for client in self.ids("c"):
            for state in list(self.held[client]):
                self.release(client, state)
        self.calm_down(choose)
        self.demand(self, quiescence)
        self.seen["stolen"] += self.minds[SCHEDULER].stolen
        for mind in self.minds.values():
            self.remember_edges(mind)

    def remember_edges(self, mind):
        kind = SchedulerMind if isinstance(mind, SchedulerMind) else type(mind)
        self.edges |= {(kind, start, finish) for _, start, finish, _, _ in mind.story}


# The properties.  Each is a function of the cluster that asserts it.  One more is the minds' own,
# which is demanded after each stimulus: ``validate`` asserts that every relation is known on both
# sides, and that every counter can be recounted.


def oracle(cluster):
    """A value is the one that plain sequential Python gives.

    However often it was computed, wherever, and whatever bore its key before.
    """
    for client in cluster.ids("c"):
        for state in cluster.held[client]:
            value, _ = cluster.expected(state.key)
            if state.status == "finished":
                assert value is not None, state
                assert state.value in ((), value), state


def honesty(cluster):
    """A future fails only for a reason that the history contains, and its message names it.

    A task's own exception is one that the task, or something that it is made from, raises.
    """
    for client, state, _ in cluster.news:
        lineage = cluster.lineage(state.key)
        named = set(re.findall(r"\bw[\d#]++(?! could not fetch)", state.text))
        assert named <= cluster.gone | {end for link in cluster.excused for end in link}, state
        its_own = ("it was cancelled", "its last future was released")
        if state.text and not state.text.startswith(its_own):
            assert any(repr(key) in state.text for key in lineage), state
        if "was lost" in state.text:
            lost = [key for worker in named for key in cluster.took.get(worker, ())]
            assert any(repr(key) in state.text for key in lost if key in lineage), state
        if state.status == "error" and state.exception:
            assert state.exception[0] in cluster.expected(state.key)[1], state
            number = state.exception[0].removeprefix(b"error ")
            at_first = number.isdigit() and cluster.specs[int(number)].fails == "at first"
            assert not (at_first and state.exception == cluster.retried.get(state)), state
        elif state.status == "error" and state.type == "KilledWorker":
            blamed = [key for key in lineage if repr(key) in state.text]
            assert any(named <= cluster.deaths.get(key, set()) for key in blamed), state
            assert len(named) > ALLOWED_FAILURES, state
        elif state.status == "error":
            assert "fetch" in state.text, state


def no_live_future_is_cancelled(cluster):
    """A future is cancelled only if somebody cancelled it, or data that it rests on was lost.

    (Or let go: then a retry has nothing to compute it from.)  Or something that it is made from was
    cancelled.  What is finished does not rest on anything.  Its message says which of these it was.
    """
    for client, state, before in cluster.news:
        if state.status == "cancelled" and state in cluster.held.get(client, ()):
            assert not state.value, state
            lineage = cluster.lineage(state.key)
            by_user = any({(client, k), ("anybody", k)} & cluster.cancelled for k in lineage)
            data = [key for key in lineage if cluster.calls[key].name == "data"]
            lost = data and (cluster.seen["faults"] or "which was let go" in state.text)
            assert (by_user and "cancelled" in state.text) or (
                lost and before != "finished" and "data" in state.text
            ), state
            cluster.seen["lost data"] += "was lost with" in state.text


def no_early_free(cluster):
    """Who still needs a value never looks for it in vain.

    Unless its holder is gone, the link there has failed, or it was struck there for such a reason.
    A worker that leaves hands over what exists nowhere else.
    """
    assert not cluster.taken_along
    for peer, name, holder in cluster.vain:
        excused = (peer, holder) in cluster.excused or holder in cluster.gone
        assert excused or (holder, *name) in cluster.struck, (peer, name, holder)


def capacity(cluster):
    """Long tasks are never hoarded, and a suspect has its worker for itself.

    When nothing is in flight, no thread is free for what waits: neither for what is in the common
    queue, nor for what should be stolen from another worker's.
    """
    scheduler = cluster.minds[SCHEDULER]
    for ws in scheduler.workers.values():
        assert sum(d > ROOM_US for _, d in ws.processing.values()) <= 2 * ws.nthreads, ws
        attempts = cluster.minds[ws.id].attempts.values() if ws.id in cluster.minds else ()
        begun = [attempt for attempt in attempts if attempt.state == "executing"]
        assert len(begun) == len(cluster.running.get(ws.id, ())) <= ws.nthreads, ws
        suspects = [ts for n, (ts, _) in ws.processing.items() if ts.suspect and ts.attempt == n]
        assert not suspects or len(ws.processing) == 1, ws
    if not cluster.channels:
        for ws in scheduler.workers.values():
            waiting = [ts for queue in (scheduler.queue, ws.queue) if (ts := queue.peek())]
            kept_empty = ws.alone or any(ts.suspect for ts in waiting)
            if ws.load != LEAVING and len(ws.processing) < ws.nthreads and not kept_empty:
                assert not waiting, ws
                for victim in scheduler.crowded:
                    assert not cluster.worth_stealing(victim.queue.peek(), victim, ws), ws


def agreement(cluster):
    """When nothing is in flight, all believe the same: scheduler, workers and clients.

    What runs and waits where, who holds what, who wants what, and what has become of it.
    """
    scheduler = cluster.minds[SCHEDULER]
    assert set(scheduler.workers) == set(cluster.ids("w"))
    assert set(scheduler.clients) == set(cluster.ids("c"))
    for id, ws in scheduler.workers.items():
        copies = [attempt for attempt, ts in ws.arriving.items() if attempt != ts.attempt]
        assert {*ws.processing, *copies} == set(cluster.minds[id].attempts), id
        holds = {(ts.key, ts.attempt) for ts in ws.has_what}
        assert holds == set(cluster.minds[id].data), id
    for id, cs in scheduler.clients.items():
        futures = cluster.minds[id].futures
        wants = {ts.key: want for ts, want in cs.wants_what.items()}
        assert wants == {key: state.want for key, state in futures.items()}, id
        for ts in cs.wants_what:
            state, word = futures[ts.key], {"memory": "finished", "erred": "error"}.get(ts.state)
            if not state.final:
                assert state.status == (word or "pending"), (id, state, ts)
                assert state.status != "finished" or state.attempt == ts.attempt, (id, state)


def liveness(cluster):
    """Nothing that is wanted waits for ever, and whoever asked has its value.

    By now a worker is there for every task.  What was fired and forgotten has run.
    """
    for client in cluster.ids("c"):
        for state in cluster.held[client]:
            assert state.status != "pending", state
            assert state.value or state.status != "finished" or not state.asked, state
            assert cluster.known.get(state, ("cancelled", ())) == (state.status, state.value), state
    cancelled = {key for _, key in cluster.cancelled}
    sorry = cluster.seen["faults"] or cluster.seen["clients vanished"]
    for key in cluster.forgotten if not (sorry or cluster.seen["calls changed"]) else ():
        lineage = cluster.lineage(key)
        calls = [cluster.calls[k] for k in lineage if cluster.calls[k].name != "data"]
        fine = all(call.fails == "never" and call.name != "unpicklable" for call in calls)
        assert cluster.runs[key] or not (fine and calls) or cancelled & {*lineage}, key


def no_needless_run(cluster):
    """A task runs once each time that it is needed and was not, and once for each retry.

    Each fault that touched it, or what is made from it, allows one run more.
    """
    assert not cluster.needless
    for key, runs in cluster.runs.items():
        assert runs <= cluster.allowed[key], key


def restrictions(cluster):
    """What is tied to some workers begins on no other.

    But an input that could not be fetched draws it to who holds that: elsewhere it never could.
    """
    assert not cluster.strays


def quiescence(cluster):
    """When all is let go, every table on every side is empty."""
    for id, mind in cluster.minds.items():
        if id == SCHEDULER:
            assert not (mind.tasks or mind.queue or mind.unrunnable or mind.crowded)
            assert not any(cs.wants_what for cs in [*mind.clients.values(), mind.keeper])
            workers = mind.workers.values()
            assert not any(ws.processing or ws.has_what or ws.arriving for ws in workers)
        else:
            assert not mind.fetching and not mind.requests
        if id[0] == "w":
            assert not (mind.data or mind.attempts or mind.needed_by or mind.ready)
            assert not cluster.running[id]
        if id[0] == "c":
            assert not mind.futures


ALWAYS = (honesty, no_live_future_is_cancelled, no_early_free, capacity, restrictions)

# The two drivers.

ACTS = ["a_client_submits", "a_client_submits_a_known_call", "a_client_releases", "a_client_asks"]
ACTS += ["a_user_changes_a_call", "a_client_scatters", "a_client_cancels", "a_client_retries"]
ACTS += ["a_client_fires_and_forgets", "a_client_maps_over_one_input"]
FAULTS = ["a_worker_dies", "a_worker_joins", "a_data_link_fails", "a_client_vanishes"]
FAULTS += ["a_client_joins", "a_worker_leaves", "a_worker_hangs", "a_worker_comes_back"]
FAULTS += ["time_passes"]
PICKS = st.integers(0, 9_999)


class AnyHistory(RuleBasedStateMachine):
    """Whatever happens, in whatever order: hypothesis chooses, and shrinks what it finds.

    Each history switches on a random subset of the acts and faults ("swarm"): with everything on
    at once, whole classes of bugs never show.
    """

    @initialize(
        acts=st.sets(st.sampled_from(ACTS)),
        faults=st.sets(st.sampled_from(FAULTS)),
        workers=st.integers(0, 3),
    )
    def a_cluster_starts(self, acts, faults, workers):
        self.switched_on = {*acts, *faults, "a_client_submits"}
        self.cluster = Cluster(workers)

    @rule(picks=st.lists(PICKS, min_size=1, max_size=12))
    def something_moves(self, picks):
        for pick in picks:
            self.cluster.step("something_moves", pick)

    @rule(pick=PICKS)
    def the_books_are_compared(self, pick):
        self.cluster.step("the_books_are_compared", pick)

    @staticmethod
    def rule_for(event):
        """The rule named ``event``: it happens in the histories in which it is switched on."""

        def happens(self, pick):
            self.cluster.step(event, pick)

        happens.__name__ = event
        switched_on = precondition(lambda self: event in getattr(self, "switched_on", ()))
        return switched_on(rule(pick=PICKS)(happens))

    def teardown(self):
        if hasattr(self, "cluster"):
            self.cluster.end_well(random.Random(0))


for event in [*ACTS, *FAULTS]:
    setattr(AnyHistory, event, AnyHistory.rule_for(event))

QUICK = settings(
    max_examples=150,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_any_history_ends_well():
    run_state_machine_as_test(AnyHistory, settings=QUICK)


NEVER, NOTHING = (dict.fromkeys([*ACTS, *FAULTS], weight) for weight in (0, 0.1))
PROFILES = [  # {event: its weight}, in the place of random ones; in turn
    {},
    # Broken links: values are there, and cannot be had.
    dict.fromkeys(FAULTS, 0) | {"a_data_link_fails": 6, "a_client_asks": 6},
    # Second thoughts: what runs is cancelled, released, and wanted again.
    NOTHING
    | {"a_client_submits": 2, "a_client_submits_a_known_call": 2, "a_client_cancels": 5}
    | {"a_client_releases": 2, "a_user_changes_a_call": 1, "a_client_retries": 3},
    # Growth: much waits for one worker, and others join.
    NOTHING
    | {"a_client_submits": 0.5, "a_client_maps_over_one_input": 1, "a_worker_joins": 0.5}
    | {"time_passes": 0.5, "something_moves": 20},
    # Other calls: what a key stands for changes, and little else.
    NEVER
    | {"a_client_submits": 1, "a_user_changes_a_call": 2, "a_worker_joins": 0.5}
    | {"a_worker_leaves": 0.5, "something_moves": 10},
    # Gifts: data is scattered by several clients, and does not arrive.
    NEVER
    | {"a_client_scatters": 1, "a_client_joins": 0.3, "a_client_vanishes": 0.2}
    | {"a_client_releases": 1, "a_data_link_fails": 0.5, "something_moves": 3},
    # Farewells: workers leave, and others join.
    dict.fromkeys(FAULTS, 0) | {"a_worker_leaves": 0.5, "a_worker_joins": 1},
    # Silence: workers hang, and the clock does not.
    {"a_worker_hangs": 0.5, "a_worker_comes_back": 0.2, "time_passes": 2},
]


def a_deep_history(seed, steps=300):
    """A longer history than hypothesis makes, from a seed; its own weights for what happens."""
    choose = random.Random(seed)
    cluster = Cluster(workers=choose.randint(0, 3), clients=choose.randint(1, 2))
    weights = {act: choose.choice([0, 0.5, 1, 2]) for act in ACTS} | {"a_client_submits": 3}
    weights |= {fault: choose.choice([0, 0, 0, 0.5, 2]) for fault in FAULTS}
    weights |= {"something_moves": choose.choice([5, 20, 60]), "the_books_are_compared": 0.1}
    weights |= PROFILES[seed % len(PROFILES)]
    for event in choose.choices(list(weights), list(weights.values()), k=steps):
        cluster.step(event, choose.randrange(10**6))
    cluster.end_well(choose)
    return cluster


HISTORIES = 112


@pytest.fixture(scope="module")
def deep_histories():
    """({what: how many of the histories saw it}, edges taken)."""
    reached, edges = Counter(), set()
    for seed in range(HISTORIES):
        cluster = a_deep_history(seed)
        reached.update(what for what, times in cluster.seen.items() if times)
        edges |= cluster.edges
    return reached, edges


def test_half_of_the_deep_histories_see_a_fault_and_one_in_twenty_whatever_is_rare(deep_histories):
    reached, _ = deep_histories
    assert reached["faults"] >= HISTORIES / 2
    rare = ["computed again", "stolen", "task-returned", "transfers", "fetch-missed", "lost data"]
    rare += ["cancelled while it runs", "resubmitted while it runs", "suspects", "replicas"]
    rare += ["abandoned", "returned as late", "give-back", "key-cancelled", "calls changed"]
    rare += ["put-failed", "retry", "fire-and-forget", "clients vanished", "killed by a task"]
    rare += ["lost while it runs", "silent for too long", "left", "key-erred", "witnesses"]
    rare += ["suspects of two deaths"]
    assert [what for what in rare if reached[what] < HISTORIES / 20] == []


@pytest.mark.parametrize("mind", [SchedulerMind, WorkerMind])
def test_every_edge_in_the_table_is_taken_by_some_history(mind, deep_histories):
    _, edges = deep_histories
    assert {(start, finish) for kind, start, finish in edges if kind is mind} == set(
        mind.TRANSITIONS
    )


@pytest.mark.parametrize("planted", [False, True], ids=["", "planted"])
def test_the_same_history_gives_the_same_messages_to_the_byte_in_every_process(planted, tmp_path):
    """*Determinism*: no order depends on addresses or on the randomization of hashes.

    In a copy of the source in which one does, that shows.
    """
    source, line = Path(SCRIPT).read_text(), "ws, _ = self.changed.popitem()"
    assert source.count(line) == 1
    by_hash = "ws = min(self.changed, key=lambda ws: hash(ws.id)); del self.changed[ws]"
    (tmp_path / "minidist.py").write_text(source.replace(line, by_hash if planted else line))
    code = """import hashlib, test_minidist
logs = [test_minidist.a_deep_history(seed).log for seed in range(16)]
print(hashlib.sha256(repr(logs).encode()).hexdigest())"""
    command, options = ["-c", code], dict(cwd=tmp_path, PYTHONPATH=str(ROOT))
    with (
        Process(*command, **options, PYTHONHASHSEED="1") as p,
        Process(*command, **options, PYTHONHASHSEED="2") as q,
    ):
        digest, other = p.communicate()[0], q.communicate()[0]
        assert len(digest) == len(other) == 65 and (digest != other) == planted


# Planted bugs: a simulation that finds nothing proves nothing, unless it finds these.  Each row:
# the method | the line as it is | the line as planted | the property that must catch it.

PLANTED = """
# A stale message is believed: a number is not compared.
ClientMind.current | state.want == want | True | honesty
# An abandoned attempt is adopted by a later want.
SchedulerMind.end_attempt | current = ts.attempt == attempt | ts = self.tasks.get(ts.key, ts); current = ts.state == "processing"; ts.attempt = attempt if current else ts.attempt | oracle
# A value is freed by its key alone.
WorkerMind.stimulus_free_keys | in names: | in [n for n in self.data if n[0] in dict(names)]: | agreement
# A wake-up is forgotten.
SchedulerMind.enter_memory | self.mark(dependent) | pass | validate
SchedulerMind.stimulus_register_worker | self.marked |= self.unrunnable | pass | validate
SchedulerMind.account | self.changed[ws] = None | pass | validate
WorkerMind.arrived | self.mark(attempt) | pass | validate
# A result is released too early, ...
SchedulerMind.goal | if not (ts.who_wants or ts.waiters): | if not ts.who_wants: | validate
ClientMind.stimulus_release | if state.count: | if False: | no_live_future_is_cancelled
SchedulerMind.may_go | if few and not ts.arriving: | if False: | no_early_free
# ... or never.
SchedulerMind.leave_memory | self.send_name(ws.id, "free-keys", (ts.key, ts.attempt)) | pass | agreement
SchedulerMind.stimulus_task_finished | self.send_name(worker, "free-keys", (ts.key, attempt)) | 0 | agreement
SchedulerMind.stimulus_client_left | self.let_go(cs, ts) | pass | validate
SchedulerMind.let_go | self.end_arrival(ts, ts.attempt) | pass | validate
# A reference is counted twice, or not at all.
ClientMind.known | state.count += 1 | state.count += 2 | quiescence
ClientMind.known | state.count += 1 | pass | no_live_future_is_cancelled
# The two sides of a relation part; a counter cannot be recounted.
SchedulerMind.add_replica | ts.who_has[ws] = ws.has_what[ts] = None | ts.who_has[ws] = None | validate
SchedulerMind.remove_replica | ws.nbytes -= ts.nbytes | pass | validate
# Somebody is not told.
SchedulerMind.end_arrival | self.tell(ts) | pass | agreement
SchedulerMind.stimulus_put_failed | self.end_arrival(ts, attempt) | pass | liveness
WorkerMind.missed | in self.needed_by.get(name, ()) | in () | validate
# A retry loses its dependencies.
SchedulerMind.stimulus_retry | each.error or |  | honesty
# An innocent is blamed; a suspect does not run alone.
SchedulerMind.suspect | if blamed else | if True else | honesty
SchedulerMind.has_room | ws.load == EMPTY | ws.load <= FREE | validate
# A message does not say which data was lost, with which worker, or which deaths are to blame.
SchedulerMind.give_up | the data {ts.key!r} | data | honesty
SchedulerMind.lose | f"was lost with {departed}" | "was lost" | honesty
SchedulerMind.suspect | '; '.join(ts.deaths) | ts.deaths[0] | honesty
# A cancel reaches too much.
SchedulerMind.stimulus_cancel_keys | force or other is cs | True | no_live_future_is_cancelled
ClientMind.become | if not state.value: | if True: | no_live_future_is_cancelled
# Work is done for nobody; or nobody does it.
SchedulerMind.leave_processing | self.send(ts.processing_on.id, "give-back", [ts.attempt]) | 0 | no_needless_run
SchedulerMind.stimulus_time_passes | now_us - ws.seen_us > self.ttl_us | False | no_needless_run
SchedulerMind.steal | self.start_us(ts, ws) < waiting_us | False | capacity
# It is done where it must not be.
SchedulerMind.steal | ws in self.allowed(ts) and |  | restrictions
"""
ROWS = [row.split(" | ") for row in PLANTED.strip().splitlines() if row[0] != "#"]


@pytest.fixture
def plant(monkeypatch):
    """Bugs are planted until the test ends: ``plant`` replaces a line of a method.

    The line must stand once in its source.
    """

    def plant(method, line, planted):
        source = textwrap.dedent(inspect.getsource(method))
        assert source.count(line) == 1, source
        kind = method.__qualname__.partition(".")[0]
        source = source.replace(line, planted).replace("super()", f"super({kind}, self)")
        namespace = vars(minidist) | globals()
        exec(source, namespace)
        monkeypatch.setattr(namespace[kind], method.__name__, namespace[method.__name__])

    return plant


@pytest.mark.parametrize("method, line, planted, promise", ROWS)
def test_a_planted_bug_is_caught_by_its_property(method, line, planted, promise, plant):
    """One of the histories that a test run goes through breaks this very property.

    And none before it a ``validate``: there are bugs after which all books balance.
    """
    plant(operator.attrgetter(method)(minidist), line, planted)
    for seed in range(HISTORIES):
        try:
            a_deep_history(seed)
        except Cluster.Broken as broken:
            if str(broken) in (promise, "validate"):
                assert str(broken) == promise
                return
        except (AttributeError, LookupError):
            pass  # The bug has broken a mind.  That is no property of the cluster.
    pytest.fail("no history breaks it")


def test_the_story_of_a_reference_that_was_counted_twice(plant):
    """One of them in full: ``ClientMind.known`` adds 2 for a second Future object.

    With that line planted, ``run_state_machine_as_test(AnyHistory)`` finds a history of some fifty
    steps that breaks *quiescence*, and shrinks it for as many trials as it allows itself.  This is
    the shortest that it printed, and no step can be left out:

        state = AnyHistory()
        state.a_cluster_starts(acts={"a_client_scatters"}, faults=set(), workers=0)
        state.a_client_scatters(pick=0)
        state.a_client_scatters(pick=0)
        state.teardown()

    No worker, no fault, nothing delivered: a client scatters, and scatters the same once more, so
    that two Future objects share one want.  At the end both are let go, and 3 - 2 references are
    left.  Thus the want is never released, and ``client.futures`` keeps it for ever.  In a system
    that runs for weeks this is a leak of memory on three machines; here it is five lines.
    """
    text = inspect.getdoc(test_the_story_of_a_reference_that_was_counted_twice)
    story = re.findall(r"^ {4}(state.*)\n", text, re.M)
    exec("\n".join(story), globals(), {})
    plant(ClientMind.known, "state.count += 1", "state.count += 2")
    for step in range(2, len(story) - 1):
        exec("\n".join(story[:step] + story[step + 1 :]), globals(), {})
    with pytest.raises(Cluster.Broken, match="^quiescence$"):
        exec("\n".join(story), globals(), {})


def test_releases_on_a_stream_of_their_own_are_caught_if_wants_are_not_compared(plant):
    """Either would do: one ordered stream, or a scheduler that compares the numbers of wants.

    Without both, a release overtakes what was submitted after it.
    """
    kind = '"releases" if message[0] == "release-keys" else "stream"'
    line = "self.post(id, peer, message)"
    plant(Cluster.flush, line, f"self.post(id, peer, message, {kind})")
    test_a_planted_bug_is_caught_by_its_property(
        method="SchedulerMind.wanted_by",
        line="cs.wants_what.get(ts) == want",
        planted="ts in cs.wants_what",
        promise="agreement",
        plant=plant,
    )


# ---- 5. Wire ----

keys = st.text() | st.recursive(
    st.tuples(st.text() | st.integers()),
    lambda key: st.lists(st.text() | key, min_size=1, max_size=3).map(tuple),
    max_leaves=5,
)
few = functools.partial(st.lists, max_size=3)
of_the_kind_of = {  # One field of each kind, and the values that it may have.
    "key": keys,
    "want": st.integers(),
    "priority": st.floats(allow_nan=False),
    "id": st.text(),
    "wanted": st.booleans(),
    "run_spec": few(st.binary(max_size=200)).map(tuple),
    "attempts": few(st.integers()),
    "holders": few(st.text()),
    "keys": few(keys),
    "facts": few(st.integers() | st.text()),
    "names": few(st.tuples(keys, st.integers())),
    "places": few(st.tuples(keys, st.integers(), few(st.text()))),
}
values = {  # {field: the values that it may have}
    field: some
    for field, kind in minidist.FIELDS.items()
    for one, some in of_the_kind_of.items()
    if kind == minidist.FIELDS[one]
}
senders = ["client", "worker", "scheduler", "holder"]
messages = {  # {who sends them: any messages that it may send}
    sender: st.one_of(
        st.tuples(st.just(op), *(values[name] for name in names)).map(list)
        for op, (some, names, _) in OPS.items()
        if sender in some
    )
    for sender in senders
}
# (who sends them, batches of messages)
some_batches = st.sampled_from(senders).flatmap(
    lambda sender: st.tuples(st.just(sender), few(few(messages[sender])))
)


@settings(deadline=None)
@given(some_batches, st.lists(st.integers(min_value=0)))
def test_batches_arrive_as_they_were_sent_however_the_bytes_are_split(sent_batches, cuts):
    sender, batches = sent_batches
    stream = b"".join(b"".join(pack(batch)) for batch in batches)
    places = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    pieces = [stream[i:j] for i, j in zip(places, places[1:], strict=False)]

    async def read_all(reader):
        return [await read_batch(reader, sender) for _ in batches]

    async def arrive():
        reader = asyncio.StreamReader()
        reading = asyncio.create_task(read_all(reader))
        for piece in pieces:
            reader.feed_data(piece)
            await asyncio.sleep(0)
        reader.feed_eof()
        return await reading

    assert asyncio.run(arrive()) == batches


anything_in_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([*MESSAGES]),
    lambda some: st.lists(some) | st.dictionaries(st.text(), some),
)


@settings(deadline=None)
@given(anything_in_json.map(lambda garbage: json.dumps(garbage).encode()) | st.binary())
def test_garbage_is_a_protocol_error_and_nothing_else(header):
    async def read(*buffers):
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(buffers))
        reader.feed_eof()
        return await read_batch(reader, "client")

    try:
        batch = asyncio.run(read(minidist.PREFIX.pack(len(header)), header))
    except ProtocolError:
        pass
    except EOFError:
        _, sizes = json.loads(header)
        assert sum(sizes) > 0, "only if it names frames, which do not come"
    else:
        assert asyncio.run(read(*pack(batch))) == batch, "what has arrived can be sent on"


# ---- 6. Serialization ----

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda some: st.lists(some) | st.tuples(some, some) | st.dictionaries(st.text(), some),
)


@given(plain | st.frozensets(st.integers()) | st.sets(st.text()))
def test_an_object_arrives_as_it_was(obj):
    assert loads(dumps(obj)) == obj


@given(st.lists(st.tuples(st.sampled_from([ValueError, KeyError, OSError]), st.text()), min_size=1))
def test_an_exception_arrives_with_its_causes(chain):
    error = None
    for kind, text in chain[:10]:
        cause, error = error, kind(text)
        error.__cause__ = cause
    got = unpack_exception(pack_exception(error))
    for kind, text in reversed(chain[:10]):
        assert (type(got), got.args) == (kind, (text,))
        got = got.__cause__
    assert got is None


# ---- 7-9. The API on a live cluster ----

CANNOT_UNPICKLE = """
import _pickle, argparse, marshal, pickle, sys
import gettext, locale, shutil  # argparse imports them late, and imports need marshal
import minidist

known = 0
while known < len(sys.modules):  # Python 3.15 imports others when they are looked at.
    known = len(sys.modules)
    [getattr(module, name) for module in [*sys.modules.values()] for name in [*vars(module)]]

def refuse(*args, **kwargs):
    raise SystemError("the scheduler unpickles")

names = ["load", "loads", "Unpickler", "_load", "_loads", "_Unpickler"]
ways = {id(getattr(m, n, refuse)) for m in (pickle, _pickle, marshal) for n in names}
for module in list(sys.modules.values()):
    for name, value in list(vars(module).items()):
        if id(value) in ways:
            setattr(module, name, refuse)
try:
    pickle.loads(pickle.dumps(1))
except SystemError:
    sys.exit(minidist.main(["scheduler", "--port", "0"]))
"""


class Process(subprocess.Popen):
    """A Python process with piped output, killed at the end if it still runs."""

    def __init__(self, *arguments, cwd=ROOT, **env):
        command, env = [sys.executable, *map(str, arguments)], {**os.environ, **env}
        pipe = subprocess.PIPE
        super().__init__(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=env)

    def __exit__(self, *error):
        self.kill()
        super().__exit__(*error)

    @functools.cached_property
    def address(self):
        """What a scheduler or worker prints as soon as it is ready."""
        return re.search(r"tcp://\S+", self.stdout.readline())[0]


SCHEDULERS = ["in this process", "that cannot unpickle"]


def on_cluster(test):
    """Make a test of ``async def test(c, a, b)``, for each kind of scheduler.

    It runs with a client and two workers, ``a`` with two threads, and has half a minute.
    """

    async def run(kind):
        async with contextlib.AsyncExitStack() as stack:
            if kind == "in this process":
                address = (await stack.enter_async_context(minidist.Scheduler())).address
            else:
                address = stack.enter_context(Process("-c", CANNOT_UNPICKLE)).address
            async with (
                Worker(address, nthreads=2, name="a") as a,
                Worker(address, nthreads=1, name="b") as b,
                Client(address, asynchronous=True) as c,
            ):
                await asyncio.wait_for(test(c, a, b), 30)

    @pytest.mark.parametrize("kind", SCHEDULERS)
    def test_on_cluster(kind):
        asyncio.run(run(kind))

    test_on_cluster.__name__ = test.__name__
    return test_on_cluster


@on_cluster
async def test_an_exception_comes_back_as_itself_with_the_frames_of_the_worker(c, a, b):
    def slow_pow(x, y):
        return x**y

    f = c.submit(slow_pow, 10, "0.5")
    assert type(await f.exception()) is TypeError
    frames = [frame for frame, _ in traceback.walk_tb(await f.traceback())]
    assert "slow_pow" in [frame.f_code.co_name for frame in frames]
    assert frames[-1].f_code.co_filename == __file__
    with pytest.raises(TypeError) as info:
        await f
    last = traceback.extract_tb(info.tb)[-1]
    assert (last.name, last.line) == ("slow_pow", "return x**y")
    ours = [f for f in traceback.extract_tb(await f.traceback()) if f.filename == SCRIPT]
    assert not ours, "none of the library's frames"


@pytest.mark.parametrize("kind", SCHEDULERS)
@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(), st.lists(st.integers(0, 30))), min_size=1, max_size=30))
def test_a_random_graph_gives_what_plain_python_gives(kind, nodes):
    async def graph(c, a, b):
        futures, values = [], []
        for number, inputs in nodes:
            inputs = [i % len(values) for i in inputs if values]
            futures.append(c.submit(lambda n, x: n + sum(x), number, [futures[i] for i in inputs]))
            values.append(number + sum(values[i] for i in inputs))
        assert await c.gather(futures) == values

    on_cluster(graph)(kind)


def program(topic, *, gives=None, raises=None, **on_dask):
    """Make of ``async def claim(client)`` a test for each kind of scheduler: what comes of it.

    Where dask does otherwise, ``on_dask`` says what and why.
    """

    def enter(run):
        async def test(c, a, b):
            with pytest.raises(raises) if raises else contextlib.nullcontext():
                assert await run(c) == gives

        globals()[f"test_{run.__name__}"] = on_cluster(test)
        return run

    return enter


# -- Twenty programs of the contract --
#
# Each is one claim that users may rely on, here and in dask.distributed.  ``tests/contract.py`` has
# the others.  It takes these by their text, from here to the next chapter, and runs them all in an
# event loop, without one, and on dask.


@program("submit", gives=3)
async def a_call_has_keyword_arguments(client):
    return await client.submit(int, "11", base=2).result()


@program("submit", gives="slept")
async def a_coroutine_function_is_a_task(client):
    return await client.submit(asyncio.sleep, 0, result="slept").result()


@program("submit", gives=1)
async def equal_calls_run_once(client):
    futures = [client.submit(os.urandom, 8) for _ in range(3)]
    return len(set(await client.gather(futures)))


@program("submit", gives=3)
async def equal_calls_that_are_not_pure_run_each_time(client):
    futures = [client.submit(os.urandom, 8, pure=False) for _ in range(3)]
    return len(set(await client.gather(futures)))


@program("submit", gives=False)
async def a_released_result_is_freed_and_its_call_runs_again(client):
    future = client.submit(os.urandom, 8)
    first = await future.result()
    future.release()
    while future.key in await client.who_has():
        pass
    return await client.submit(os.urandom, 8).result() == first


@program("submit", gives=True)
async def a_worker_is_chosen_by_its_address(client):
    addresses = list(await client.nthreads())
    calls = [client.submit(lambda: get_worker().address, workers=a, pure=False) for a in addresses]
    return await client.gather(calls) == addresses


@program("arguments", gives={"a": [(2, {"b": [3]})]})
async def futures_are_found_in_nested_containers(client):
    x, y = client.map(abs, [-2, -3])
    return await client.submit(dict, {"a": [(x, {"b": [y]})]}).result()


@program("map", gives=[11, 22])
async def map_takes_items_from_several_iterables_up_to_the_end_of_the_shortest(client):
    return await client.gather(client.map(operator.add, [1, 2, 3], (10, 20)))


@program("map", gives=(["finished", "error", "finished"], [1.0, 0.5]))
async def an_item_of_map_fails_alone(client):
    futures = client.map(operator.truediv, [1, 1, 1], [1, 0, 2])
    await wait(futures)
    return [f.status for f in futures], await client.gather(futures, errors="skip")


@program("gather", gives={"a": [2, (3, {"b": 2})], "c": [[]]})
async def gather_keeps_the_shape_of_nested_containers(client):
    x, y = client.map(abs, [-2, -3])
    return await client.gather({"a": [x, (y, {"b": x})], "c": [[]]})


@program("scatter", gives=({"left": 10, "right": 11}, ["left", "right"]))
async def the_keys_of_a_scattered_dict_are_the_keys_of_its_futures(client):
    futures = await client.scatter({"left": 10, "right": 11})
    return await client.gather(futures), [futures["left"].key, futures["right"].key]


@program("scatter", gives=[22, [-22, -22], 22])
async def a_scattered_future_is_an_argument(client):
    future = await client.scatter(-22)
    calls = [client.submit(abs, future), client.submit(list, [future, future])]
    return await client.gather([*calls, *client.map(abs, [future])])


@program("scatter", gives=2)
async def broadcast_data_is_on_every_worker(client):
    future = await client.scatter(25, broadcast=True)
    return len((await client.who_has(future))[future.key])


@program("cancel", raises=CancelledError)
async def what_depends_on_a_cancelled_future_is_cancelled(client):
    waiting = client.submit(str.upper, "to be cancelled", workers="nobody")
    dependent = client.submit(len, client.submit(str.split, waiting))
    await client.cancel(waiting)
    await dependent.result()


@program("retry", gives=("error", None, None))
async def what_failed_is_run_again(client):
    folder = tempfile.mktemp()
    future = client.submit(os.rmdir, folder)
    await wait(future)
    os.mkdir(folder)
    return future.status, await client.retry(future), await future.result()


@program("errors", gives=("ZeroDivisionError('division by zero')", "error"))
async def an_error_is_that_of_all_dependents(client):
    future = client.submit(sum, [client.submit(abs, client.submit(operator.truediv, 1, 0))])
    return repr(await future.exception()), future.status


@program("as_completed", gives=3)
async def futures_are_added_while_others_come(client):
    futures = as_completed([client.submit(abs, 1)], with_results=True)
    async for future, result in futures:
        if result < 3:
            futures.add(client.submit(operator.add, future, 1))
    return result


@program("wait", gives=(True, ["pending"]))
async def wait_can_wait_for_the_first(client):
    never, quick = client.submit(abs, -1, workers="nobody"), client.submit(abs, -2)
    done, not_done = await wait([never, quick], return_when="FIRST_COMPLETED")
    return done == {quick}, [future.status for future in not_done]


@program(
    "others",
    dask="not run",
    differs="dask may lose what is let go before its scheduler knows of it",
)
async def what_is_fired_and_forgotten_at_once_runs(client):
    folder = tempfile.mkdtemp()
    fire_and_forget(client.submit(os.rmdir, folder))
    while os.path.exists(folder):
        await client.who_has()


@program("run", gives=(True, [(3, 1), (3, 1)]))
async def a_function_runs_on_every_worker(client):
    results = await client.run(divmod, 7, 2)
    return set(results) == set(await client.nthreads()), list(results.values())


# ---- 12. Command line and processes ----


@pytest.fixture
def scheduler():
    """A scheduler's process with its ``address``."""
    with Process(SCRIPT, "scheduler", "--port", 0) as p:
        assert p.address
        yield p


@pytest.fixture
def home():
    """A socket, and a task that calls there: then the test knows which worker runs it.

    The task tells its pid, and waits to be hung up on.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        address = listener.getsockname()

        def call_home(value):
            with socket.create_connection(address) as line:
                line.sendall(os.getpid().to_bytes(8, "big"))
                line.recv(1)
            return value

        yield listener, call_home


def test_the_synchronous_client_computes_on_processes(scheduler):
    with Process(SCRIPT, "worker", scheduler.address.removeprefix("tcp://"), "--nthreads", 2):
        with Client(scheduler.address) as c:
            futures = c.map(pow, range(10), [2] * 10)
            total = c.submit(sum, futures)
            assert total.result(timeout=30) == 285
            assert c.gather({"squares": futures})["squares"][-1] == 81
            assert wait(futures).not_done == set()
            with pytest.raises(ValueError):
                c.submit(int, "no number").result()
        c.close()
        with pytest.raises(RuntimeError, match="closed"):
            c.submit(abs, 1)


def test_a_killed_worker_costs_time_but_no_result(scheduler, home):
    listener, call_home = home
    worker = [SCRIPT, "worker", scheduler.address, "--nthreads", 1]
    with Process(*worker) as p, Process(*worker) as q, Client(scheduler.address) as c:
        assert p.address and q.address
        early = c.map(pow, range(50), [2] * 50)
        wait(early)
        total = c.submit(sum, [c.submit(call_home, 1000), *early])
        running, _ = listener.accept()
        pid = int.from_bytes(running.recv(8), "big")
        os.kill(pid, signal.SIGKILL)
        again, _ = listener.accept()  # The task runs on the other worker.
        assert int.from_bytes(again.recv(8), "big") in {p.pid, q.pid} - {pid}
        running.close(), again.close()
        assert total.result(30) == 1000 + sum(n * n for n in range(50))
        assert c.gather(early) == [n * n for n in range(50)]


# ---- Faults on real sockets and processes ----
#
# The minds have met every fault in the simulation.  Here it is the bodies that meet a few: each
# time, all results are right.


@on_cluster
async def test_a_connection_that_is_cut_in_the_middle_of_a_frame_costs_no_result(c, a, b):
    class CutsOnce(Worker):
        cut = False

        async def serve(self, connection):
            if self.cut:
                return await super().serve(connection)
            self.cut = True
            await connection.receive()
            value = ["data", "x", 1, "ok", (bytes(100_000),)]
            connection.writer.write(b"".join(pack([value]))[:50_000])

    async with CutsOnce(a.scheduler_address, nthreads=1, name="faulty") as worker:
        x = c.submit(bytes, 100_000, workers="faulty", allow_other_workers=True)
        await wait(x)
        assert x.key in worker.data and not worker.cut
        assert await c.submit(len, x, workers="a") == 100_000
        assert await x == bytes(100_000) and worker.cut


@on_cluster
async def test_a_worker_that_dies_while_it_serves_three_peers_costs_no_result(c, a, b):
    class DiesWhenThreeHaveAsked(Worker):
        asked = 0

        async def serve(self, connection):
            self.asked += 1
            while self.asked < 3 and not self.closed:
                await asyncio.sleep(0)
            if not self.closed:
                await self.close()

    async with DiesWhenThreeHaveAsked(a.scheduler_address, nthreads=1, name="faulty") as worker:
        x = c.submit(bytes, 100_000, workers="faulty", allow_other_workers=True)
        await wait(x)
        assert x.key in worker.data
        lengths = [c.submit(len, x, workers=name, pure=False) for name in "ab"]
        values = [x.result(), *(future.result() for future in lengths)]
        assert await asyncio.gather(*values) == [bytes(100_000), 100_000, 100_000]


@on_cluster
async def test_who_reads_slowly_gets_all_and_keeps_nobody_waiting(c, a, b):
    async with Client(a.scheduler_address, asynchronous=True) as slow:
        slow._scheduler.writer.transport.pause_reading()
        sizes = range(60_000, 60_300)  # In all more than the kernel keeps for who does not read.
        futures = slow.map(bytes, sizes)
        assert await c.gather(c.map(len, [bytes(n) for n in range(200)])) == list(range(200))
        slow._scheduler.writer.transport.resume_reading()
        assert [len(value) for value in await slow.gather(futures)] == list(sizes)


@on_cluster
async def test_what_a_client_that_vanishes_shared_with_another_is_kept(c, a, b):
    async with Client(a.scheduler_address, asynchronous=True) as gone:
        shared, its_own = gone.submit(abs, -1), gone.submit(abs, -2)
        await wait([shared, its_own])
        mine = c.submit(abs, -1)
        await wait(mine)
        gone._scheduler.hang_up()
        while [*a.data, *b.data] != [mine.key]:
            await asyncio.sleep(0)
        assert await mine == 1


def test_a_worker_that_is_frozen_is_dead_and_its_task_runs_elsewhere(home):
    listener, call_home = home
    with Process(SCRIPT, "scheduler", "--port", 0, "--worker-ttl", 2) as s:
        worker = [SCRIPT, "worker", address := s.address, "--nthreads", 1]
        with Process(*worker), Process(*worker), Client(address) as c:
            future = c.submit(call_home, "done")
            frozen, _ = listener.accept()
            os.kill(int.from_bytes(frozen.recv(8), "big"), signal.SIGSTOP)
            again, _ = listener.accept()
            assert again.recv(8) and not again.close()
            assert future.result(30) == "done"
