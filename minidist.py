"""minidist: dask.distributed in one readable Python file.

A *scheduler* decides what runs where, *workers* run tasks and hold the results, *clients* submit
calls and hold *futures*.  All three are processes that talk over asyncio streams:

        Client  ---- submit, release-keys --->  Scheduler  ---- compute-task, free-keys -->  Worker
          ^     <--- key-in-memory, ... ------             <--- task-finished, ... -------     |
          |                                                                                    |
          +------------------------- values, on data connections ------------------------------+

It is the real thing with less of it: processes on several hosts, results that stay where they
were made, peer-to-peer transfers, lost results that are computed again.  Left out is what would
not introduce a new idea (collections, plugins, spilling to disk), and what is not built yet
(README has the list).  Comments that begin with "dask:" tell where it does otherwise.

How to read it.  Part one decides, and is pure: three *minds* that change their tables and leave
messages in an outbox.  Nothing there does I/O, knows the time, or waits; so a student can drive
the scheduler by hand, and a test can run a whole cluster in one thread, in any order of events.
Part two is how messages and objects travel.  Part three runs the minds: bodies that decide
nothing.  A reader who wants to know how such a system works may stop after part one.

The life of one ``submit()``.  Each method opens its docstring with its number in brackets:

    1. Client.submit                          pickles the call and names it
    2. ClientMind.stimulus_submit             numbers a new want, and tells the scheduler
    3. Connection.send                        batches messages until the loop's turn ends
    4. Body.follow                            checks the message, calls what its op names
    5. SchedulerMind.stimulus_submit          a task: released, waiting, then queued
    6. SchedulerMind.enter_processing         a worker has room: a numbered attempt is sent
    7. WorkerMind.stimulus_compute_task       the inputs are fetched from other workers
    8. WorkerMind.stimulus_take               a free thread takes the next ready attempt
    9. Worker.run_task                        unpickles the call and runs it
    10. WorkerMind.stimulus_finished          holds the value, tells the scheduler
    11. SchedulerMind.stimulus_task_finished  wakes dependents, tells the clients
    12. ClientMind.stimulus_key_in_memory     the future is finished
"""

import argparse
import asyncio
import concurrent.futures
import contextlib
import functools
import gc
import hashlib
import heapq
import hmac
import json
import logging
import math
import os
import pickle
import re
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
import warnings
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from itertools import accumulate, count, islice

import cloudpickle

# ============ Part one, what it decides: no I/O, no clock, no randomness, no callbacks ============

# ---- 1. Vocabulary: LIMITS, MESSAGES, check_message, Queue, Mind, FetchingMind ----
#
# The words that the other chapters share.  A *task* is a call with a key.  An *attempt* is one try
# to compute a task on one worker; the scheduler numbers it.  A *want* is a client's wish to have
# a task's result; the client numbers it.  A *value* is named ``(key, attempt)``, so that two
# results for one key can never be taken for each other.

LIMITS = {
    "header_bytes": 64 << 20,  # the JSON of one batch
    "frames": 1 << 18,  # binary frames in one batch
    "frame_bytes": 1 << 36,  # one binary frame
    "batch_messages": 1000,  # messages in one batch: no loop stalls over one
    "handshake_seconds": 10,
    "ride_along_bytes": 64 << 10,  # a result up to this size travels with its notice
    "holders": 8,  # replicas named to whoever fetches, or weighed when a worker is chosen
    "known_durations": 10_000,  # function names whose duration the scheduler remembers
    "story": 10_000,  # transitions that a mind remembers
    "argument_bytes": 10_000_000,  # larger arguments of one call get a warning
    "stall_seconds": 30,  # a peer that takes no byte for so long is dropped
}

SCHEDULER = "scheduler"  # the peer, seen from clients and workers

MESSAGES = {  # {op: "sender > receiver: fields"}; the fields' kinds are in FIELDS below
    # A client and the scheduler: one ordered stream.
    "register-client": "client > scheduler: id wants",
    "submit": "client > scheduler: key want name run_spec inputs priority",
    "release-keys": "client > scheduler: names",
    "fetch-missed": "client > scheduler: key want attempt holders",
    "key-in-memory": "scheduler > client: key want attempt nbytes type holders value",
    "key-lost": "scheduler > client: key want",
    "key-erred": "scheduler > client: key want exception text",
    "key-cancelled": "scheduler > client: key want text",
    "warning": "scheduler > client: text",
    # A worker and the scheduler: one ordered stream.
    "register-worker": "worker > scheduler: id name nthreads values attempts",
    "compute-task": "scheduler > worker: key attempt name run_spec places order wanted",
    "task-finished": "worker > scheduler: attempt nbytes type duration_us value",
    "task-erred": "worker > scheduler: attempt exception",
    "task-returned": "worker > scheduler: attempt misses",
    "add-keys": "worker > scheduler: names",
    "free-keys": "scheduler > worker: names",
    # The scheduler to either.
    "registered": "scheduler > client|worker:",
    "refused": "scheduler > client|worker: text",
    "worker-left": "scheduler > client|worker: worker",
    # A data connection, to any worker.
    "get-data": "client|worker > holder: names",
    "data": "holder > client|worker: key attempt status value",
}


class ProtocolError(Exception):
    """A peer sent what no peer of this version sends; its connection is closed."""


def to_key(value, frames=()):
    """JSON has no tuples, so a key that is one travelled as a list."""
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise TypeError(f"{value!r:.80} is no key")
    return tuple([part if type(part) in (str, int, float) else to_key(part) for part in value])


def to_frames(value, frames):
    """Places in the batch's table of frames, as the frames."""
    return tuple([frames[convert(int, place, ())] for place in value if place >= 0])


FIELDS = {  # {field: its kind}, the same in every message
    field: kind
    for kind, fields in (
        (to_key, "key"),
        (int, "want attempt nbytes nthreads duration_us priority"),
        (str, "id name type status text worker"),
        (bool, "wanted"),
        (to_frames, "run_spec value exception"),
        ([int], "attempts order"),
        ([str], "holders"),
        ([(to_key, int)], "names inputs wants values"),  # values by attempt, tasks by want
        ([(to_key, int, [str])], "places misses"),  # values by attempt, and who has them
    )
    for field in fields.split()
}


def convert(kind, value, frames):
    """What JSON brought, as the minds know it.

    Raises LookupError, TypeError or ValueError for what is not of the kind.
    """
    if type(value) is kind:
        return value
    if type(kind) is list and type(value) is list:
        return [convert(kind[0], item, frames) for item in value]
    if type(kind) is tuple:
        return tuple([convert(k, item, frames) for k, item in zip(kind, value, strict=True)])
    if type(kind) in (type, list):
        raise TypeError(f"{value!r:.80} is no {kind}")
    return kind(value, frames)


def parse_line(line):
    """A line of MESSAGES as (senders, names of the fields)."""
    route, _, fields = line.partition(":")
    return route.partition(" > ")[0].split("|"), ("op", *fields.split())


OPS = {op: parse_line(line) for op, line in MESSAGES.items()}


def check_message(message, frames, sender):
    """Check a message against MESSAGES before anything else, and give its fields their kinds.

    ``sender`` is the kind of peer that it came from.  A ``ProtocolError`` says what is wrong.
    """
    try:
        senders, names = OPS[message["op"]]
        if sender not in senders or tuple(message) != names:
            raise ValueError(f"a {sender} sends {names}, if at all")
        for field in names[1:]:
            message[field] = convert(FIELDS[field], message[field], frames)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message: {message!r:.200} ({error})") from error
    return message


class Queue(dict):
    """What waits, by priority; the smallest first.  Every item's ``priority`` is its own.

    An ordered set, and a heap from which anything may be taken: what was taken out stays in the
    heap until it surfaces, or until the dead are the majority and the heap is built anew.
    """

    __slots__ = ("heap", "worker")

    def __init__(self, worker=None):
        self.heap = []  # [(priority, item)]
        self.worker = worker  # the WorkerState that alone takes from it, if there is one

    def push(self, item):
        self[item] = None
        heapq.heappush(self.heap, (item.priority, item))

    def discard(self, item):
        del self[item]
        if len(self.heap) > 2 * len(self) + 16:
            self.heap = [(item.priority, item) for item in self]
            heapq.heapify(self.heap)

    def peek(self):
        """The item that is next, or None."""
        while self.heap and self.heap[0][1] not in self:
            heapq.heappop(self.heap)
        return self.heap[0][1] if self.heap else None


class Mind:
    """What the three minds have in common: an outbox, and a loop that is *level-triggered*.

    A stimulus changes facts (somebody wants a task, a worker is gone) and marks the records
    concerned.  ``settle`` then asks of each marked record what it should be now (its ``goal``) and
    lets it take the edge there, which marks neighbours, until none is marked.  Nobody carries
    recommendations from one task to the next, and walks along dependents are loops, not recursion.
    The idea to keep decisions free of I/O ("sans-IO") is that of h11 and of dask's worker state.
    """

    TRANSITIONS = {}  # {(start, finish): (method that leaves, method that enters)}: every edge

    def __init__(self):
        self.outbox = []  # [(peer, message)], to be sent by the body
        self.marked = {}  # an ordered set of records that may not be what they should be
        self.story = deque(maxlen=LIMITS["story"])  # (key, start, finish, attempt, worker)

    def send(self, peer, op, *values):
        """Leave a message for a peer: ``values`` are the op's fields, in the order of MESSAGES."""
        self.outbox.append((peer, dict(zip(OPS[op][1], (op, *values), strict=True))))

    def send_name(self, peer, op, name):
        """Send a ``(key, number)``; those that follow each other travel in one message."""
        last, message = self.outbox[-1] if self.outbox else (None, {})
        if last == peer and message["op"] == op:
            message["names"].append(name)
        else:
            self.send(peer, op, [name])

    def mark(self, record):
        self.marked[record] = None

    def settle(self):
        """Let marked records take edges until every one is what it should be."""
        marked, edges = self.marked, 0
        bound = 64 + 16 * self.size()
        while marked:
            record, _ = marked.popitem()
            while (finish := self.goal(record)) != record.state:
                self.transition(record, finish)
                edges += 1
                assert edges < bound, f"{record} does not settle"

    def transition(self, record, finish):
        """Take one edge: leave a state, which clears its fields, and enter the other.

        The only place where a state is assigned.
        """
        # dask: has a method for each edge.  What it means to leave and to enter a state (Harel's
        # statecharts call it exit and entry actions) is said once here, whatever the edge.
        start = record.state
        leave, enter = self.TRANSITIONS[start, finish]
        getattr(self, leave)(record)
        record.state = finish
        getattr(self, enter)(record)
        self.story.append((record.key, start, finish, *record.where()))


def edges(**finishes):
    """The table of transitions: for each edge, the methods named after its two ends."""
    pairs = [(start, finish) for start, row in finishes.items() for finish in row.split()]
    return {
        (start.replace("_", "-"), finish): (f"leave_{start}", "enter_" + finish.replace("-", "_"))
        for start, finish in pairs
    }


class FetchingMind(Mind):
    """What the client's and the worker's mind share: values on their way here.

    A value is asked of one holder after the other until one gives it; who has failed is
    remembered, since it will be reported.  Nothing is concluded here from a broken connection.
    Subclasses say what it means that a value ``arrived``, or that everybody ``missed`` it.
    """

    def __init__(self):
        super().__init__()
        self.wanted = {}  # {(key, attempt): (holders still to be tried, those that missed)}
        self.asked = {}  # {holder: {(key, attempt): None}}: requests that are under way

    def need(self, name, holders):
        """Fetch a value.  To want it no longer, take it out of ``wanted``."""
        if name not in self.wanted:
            self.wanted[name] = (list(holders), [])
            self.ask(name)

    def ask(self, name):
        """Ask the next holder; if there is none, the value is given up."""
        holders, misses = self.wanted[name]
        if not holders:
            del self.wanted[name]
            self.missed(name, misses)
        elif name not in self.asked.setdefault(holders[0], {}):
            # (Otherwise it was dropped and is wanted again: the request under way serves.)
            self.asked[holders[0]][name] = None
            self.send_name(holders[0], "get-data", name)

    def stimulus_data(self, holder, key, attempt, status, value):
        """A holder answers for one value: "ok", "missing", or "error" if nobody can pickle it."""
        name = (key, attempt)
        if name in self.asked.get(holder, ()):
            self.end_request(holder, name, status == "missing")
            if name in self.wanted and status != "missing":  # Else it was dropped meanwhile.
                del self.wanted[name]
                self.arrived(name, status == "ok", value)
        self.settle()

    def stimulus_link_lost(self, holder):
        """The connection to a holder broke: what was asked there is missed there."""
        for name in list(self.asked.get(holder, ())):
            self.end_request(holder, name, missed=True)
        self.settle()

    def stimulus_worker_left(self, peer, worker):
        """The scheduler says that a worker is dead: expect nothing from it any more."""
        self.stimulus_link_lost(worker)
        for holders, _ in self.wanted.values():
            if worker in holders:
                holders.remove(worker)

    def end_request(self, holder, name, missed):
        del self.asked[holder][name]
        if not self.asked[holder]:
            del self.asked[holder]
        holders, misses = self.wanted.get(name, ((), ()))
        if missed and holders and holders[0] == holder:
            misses.append(holders.pop(0))
            self.ask(name)

    def validate(self):
        """Assert every invariant.  Slow by design: a live process does so only when asked to."""
        assert not self.marked
        for name, (holders, misses) in self.wanted.items():
            # F1. A wanted value is asked of the first holder that has not been tried.
            assert name in self.asked[holders[0]] and not set(holders) & set(misses), name
        # F2. No empty request is kept.
        assert all(self.asked.values())


# ---- 2. Client mind: FutureState, ClientMind ----
#
# What one client wants.  It may use chapter 1.  Reference counts, releases and resubmissions are
# where systems of this kind lose futures, so they are decided here, in the order in which the
# client's threads asked for them, and not in ``Future.__del__``.


@dataclass(eq=False, slots=True)
class FutureState:
    """One want of this client: what all its ``Future`` objects of one key share."""

    key: "str | tuple"
    want: int
    status: str = "pending"  # or "finished", "error", "cancelled": the words that users see
    count: int = 1  # live Future objects
    asked: bool = False  # somebody waits for the value, not only for its existence

    # Set in "finished" only:
    attempt: int = 0
    nbytes: int = 0
    type: str = ""
    holders: "list[str] | tuple[()]" = ()
    # Frames, from the moment when the value is here.  A value that is here is final.
    value: tuple = ()
    # Set in "error" only: a pickled exception, or words where no exception was ever pickled.
    exception: tuple = ()
    # Set in "error" and "cancelled": why.
    text: str = ""

    @property
    def final(self):
        """What has reached this client stays as it is: a value, or why there is none."""
        return bool(self.value) or self.status == "error"


class ClientMind(FetchingMind):
    """What a client wants, and what it was told of it."""

    def __init__(self):
        super().__init__()
        self.futures = {}  # {key: FutureState}: what is wanted now
        self.wants = 0  # the number of the last want
        self.news = []  # FutureStates that changed, for the body to wake who waits for them

    def stimulus_submit(self, key, name, run_spec, inputs, priority):
        """[2] The user submits a call: a new want, or one more reference to the one there is.

        ``inputs`` are the FutureStates of the futures in its arguments.
        """
        state = self.futures.get(key)
        if state is not None:
            state.count += 1
            return state
        self.wants += 1
        state = FutureState(key, self.wants)
        for i in inputs:
            if self.futures.get(i.key) is not i:
                # Cancelled inputs have left the table: nothing can be computed from them.
                text = f"its input {i.key!r} was cancelled: {i.text or 'it is not wanted any more'}"
                self.become(state, "cancelled", text)
                return state
        self.futures[key] = state
        names = [(i.key, i.want) for i in inputs]
        self.send(SCHEDULER, "submit", key, state.want, name, run_spec, names, priority)
        return state

    def stimulus_release(self, state):
        """One ``Future`` object is gone; with the last one, the want is."""
        state.count -= 1
        # A cancelled state left the table before: it is let go silently, and what bears its key
        # now is another want.
        if not state.count and self.futures.get(state.key) is state:
            self.let_go(state)
            self.send_name(SCHEDULER, "release-keys", (state.key, state.want))

    def stimulus_ask(self, states):
        """Somebody waits for these values: fetch what did not come along with its notice."""
        for state in states:
            state.asked = True
            self.fetch(state)

    def stimulus_key_in_memory(self, peer, key, want, attempt, nbytes, type, holders, value):
        """[12] A result exists; small ones are in the message."""
        if state := self.current(key, want):
            state.attempt, state.nbytes, state.type = attempt, nbytes, type
            state.holders, state.value = holders, value
            self.become(state, "finished")
            self.fetch(state)

    def stimulus_key_lost(self, peer, key, want):
        """Every replica of a result is gone; it is being computed again."""
        if state := self.current(key, want):
            self.become(state, "pending")

    def stimulus_key_erred(self, peer, key, want, exception, text):
        """The task failed, or will never be computed."""
        if state := self.current(key, want):
            state.exception = exception
            self.become(state, "error", text)

    def stimulus_key_cancelled(self, peer, key, want, text):
        """The scheduler does not know this want any more."""
        state = self.futures.get(key)
        if state is not None and state.want == want:
            self.let_go(state)
            if not state.final:
                self.become(state, "cancelled", text)

    def stimulus_worker_left(self, peer, worker):
        super().stimulus_worker_left(peer, worker)
        for state in self.futures.values():
            if worker in state.holders:
                state.holders = [holder for holder in state.holders if holder != worker]

    def stimulus_scheduler_left(self, text):
        """The stream ended: nothing that is not here yet will come."""
        for state in list(self.futures.values()):
            if not state.final:
                self.stimulus_key_cancelled(SCHEDULER, state.key, state.want, text)

    def current(self, key, want):
        """The state that a notice speaks of; what was being fetched for it is not any more.

        None if the notice is stale: while it was under way, the last future of its want was let
        go (and perhaps the key was wanted anew, under another number), or what is computed again
        had reached this client.
        """
        state = self.futures.get(key)
        if state is None or state.want != want or state.final:
            return None
        self.wanted.pop((key, state.attempt), None)
        return state

    def let_go(self, state):
        del self.futures[state.key]
        self.wanted.pop((state.key, state.attempt), None)

    def become(self, state, status, text=""):
        state.status, state.text = status, text
        self.news.append(state)

    def fetch(self, state):
        if state.asked and state.status == "finished" and not state.value:
            self.need((state.key, state.attempt), state.holders)

    def arrived(self, name, ok, value):
        state = self.futures[name[0]]
        if ok:
            state.value = value
        else:
            state.exception = value
        self.become(state, "finished" if ok else "error")

    def missed(self, name, misses):
        """Tell the scheduler of a value that nobody gave; it will answer, or already has."""
        state = self.futures[name[0]]
        self.become(state, "pending")
        self.send(SCHEDULER, "fetch-missed", state.key, state.want, name[1], misses)

    def settle(self):
        """A client's states have no edges to take: its words for users follow the notices."""

    def validate(self):
        super().validate()
        for key, state in self.futures.items():
            # C1. What is wanted has a live Future object, and is not cancelled.
            assert state.key == key and state.count > 0 and state.status != "cancelled", state
            # C2. A value belongs to a finished state, an exception to one that erred.
            assert state.status == "finished" or not state.value, state
            assert state.status == "error" or not state.exception, state
            # C3. What somebody waits for is on its way exactly when it exists and is not here.
            waits = state.asked and state.status == "finished" and not state.value
            assert waits == ((key, state.attempt) in self.wanted), state
        # C4. What is fetched is wanted, and wants differ.
        assert all(name[0] in self.futures for name in self.wanted)
        assert len({state.want for state in self.futures.values()}) == len(self.futures)


# ---- 3. Scheduler mind: TaskState, WorkerState, ClientState, SchedulerMind ----
#
# What runs where, who holds what, what can go.  It may use chapter 1.  By habit of the field
# ``ts``, ``ws``, ``cs`` are a TaskState, a WorkerState, a ClientState.  Times are whole
# microseconds and sizes whole bytes, so that what was added is subtracted exactly.

ROOM_US = 1_000  # known-short work sent ahead of a thread that is busy: it hides a round trip
UNKNOWN_US = 500_000  # what a task of an unmeasured function is taken for
TRANSFER_US = 1_000  # what any transfer costs, ...
BYTES_PER_US = 100  # ... and how much is transferred in a microsecond: 100 MB/s
ALLOWED_FAILURES = 3  # a task may fail so often for reasons that are not its own


@dataclass(eq=False, slots=True)
class TaskState:
    """What the scheduler believes about one task."""

    key: "str | tuple"
    name: str  # of the function: tasks of one name are expected to take equally long
    priority: tuple  # (minus the user's, order of submission): the smallest goes first
    run_spec: tuple  # frames of the pickled call
    state: str = "released"
    dependencies: "dict[TaskState, None] | tuple[()]" = ()  # an ordered set, in all states
    dependents: "dict[TaskState, None] | tuple[()]" = ()  # transpose of dependencies

    # Why it is kept.  ``waiters`` are the dependents in waiting, queued, no-worker, processing.
    who_wants: "dict[ClientState, None] | tuple[()]" = ()  # transpose: ClientState.wants_what
    waiters: "dict[TaskState, None] | tuple[()]" = ()

    # In "waiting", "queued", "no-worker": the dependencies without a value.  No transpose of
    # ``waiters``: a task stays a waiter of a dependency that has its value.
    waiting_on: "dict[TaskState, None] | tuple[()]" = ()
    # In "queued" only: where it waits, and for how long it is expected to run.
    queue: "Queue | None" = None
    estimate_us: int = 0
    # In "processing" only:
    processing_on: "WorkerState | None" = None  # transpose: WorkerState.processing
    # In "processing" and "memory": the attempt that makes, or made, its value.
    attempt: int = 0
    # In "memory" only:
    who_has: "dict[WorkerState, None] | tuple[()]" = ()  # transpose: WorkerState.has_what
    nbytes: int = 0
    type: str = ""
    value: tuple = ()  # frames that came with the news, until the clients were told
    # In "erred" only, or on the way there: frames, or words where nothing was pickled.
    exception: tuple = ()
    text: str = ""
    misses: int = 0  # how often one of its inputs, or its value, could not be had

    def __repr__(self):
        return f"<TaskState {self.key!r} {self.state}>"

    def where(self):
        return self.attempt, self.processing_on.id if self.processing_on else ""


@dataclass(eq=False, slots=True)
class WorkerState:
    """What the scheduler believes about one worker process."""

    id: str  # address and process: what comes back at an address is another worker
    name: str
    nthreads: int
    # Attempts sent and not ended, abandoned ones too: they occupy its threads all the same.
    processing: dict  # {attempt: (TaskState, duration_us)}
    has_what: dict  # an ordered set of TaskStates; transpose: TaskState.who_has
    queue: "Queue | None" = None  # what waits for this very worker
    nbytes: int = 0  # sum over has_what
    occupancy: int = 0  # microseconds of work, sent or queued
    short_us: int = 0  # of it: sent, and known to be short
    long: int = 0  # how many attempts are not known to be short
    load: int = 0  # which of SchedulerMind.by_load it stands in


@dataclass(eq=False, slots=True)
class ClientState:
    """What the scheduler believes about one client."""

    id: str
    wants_what: dict  # {TaskState: the number of the want}; transpose: TaskState.who_wants


EMPTY, FREE, ROOM, FULL = range(4)  # how loaded a worker is
UNFINISHED = ("waiting", "queued", "no-worker", "processing")


class SchedulerMind(Mind):
    """Decides what runs where.

    ``first_attempt`` must grow from one scheduler's life to the next.
    """

    TRANSITIONS = edges(
        released="waiting forgotten",
        waiting="queued no-worker erred released",
        queued="processing waiting no-worker released",
        no_worker="queued released",
        processing="memory erred waiting released",
        memory="waiting erred released",
        erred="released",
    )

    def __init__(self, first_attempt=1):
        super().__init__()
        self.tasks = {}  # {key: TaskState}
        self.workers = {}  # {id: WorkerState}
        self.clients = {}  # {id: ClientState}
        self.queue = Queue()  # runnable tasks that any worker may take
        self.unrunnable = {}  # an ordered set of the tasks in "no-worker"
        # Every worker stands in the set of its load.  (OrderedDict: its first is found at once,
        # however many were taken out before it; in a dict they would be passed over each time.)
        self.by_load = [OrderedDict() for _ in range(4)]
        self.changed = {}  # an ordered set of workers that may have room for their queue's head
        self.durations = {}  # {function name: microseconds}, a moving average
        self.attempts = first_attempt  # the number of the next attempt
        self.submitted = 0

    # Stimuli: clients.

    def stimulus_register_client(self, client, wants):
        """A client joins."""
        self.clients[client] = ClientState(client, {})
        self.send(client, "registered")

    def stimulus_submit(self, client, key, want, name, run_spec, inputs, priority):
        """[5] A client wants the result of a call.

        ``inputs`` are the tasks whose results are among its arguments, as (key, want).
        """
        cs = self.clients[client]
        for input_key, number in inputs:
            if cs.wants_what.get(self.tasks.get(input_key)) != number:
                # On one ordered stream that want can only have been cancelled or lost.  What
                # bears the key now may be another call of another client.
                text = f"its input {input_key!r} was cancelled"
                self.send(client, "key-cancelled", key, want, text)
                return
        ts = self.tasks.get(key)
        if ts is None:
            self.submitted += 1
            ts = TaskState(key, name, (-priority, self.submitted), run_spec)
            self.tasks[key] = ts
            for input_key, _ in inputs:
                link(ts, "dependencies", self.tasks[input_key], "dependents")
        elif ts.run_spec != run_spec:
            text = f"the key {key!r} is known with another call: that one's result is used"
            self.send(client, "warning", text)
        link(ts, "who_wants", cs, "wants_what")
        cs.wants_what[ts] = want
        self.tell(cs, ts)
        self.mark(ts)
        self.settle()

    def stimulus_release_keys(self, client, names):
        """A client has no future of these keys any more."""
        cs = self.clients[client]
        for key, want in names:
            ts = self.tasks.get(key)
            # Another number: this want was cancelled before its release came, and the client
            # has since made another.
            if cs.wants_what.get(ts) == want:
                self.let_go(cs, ts)
        self.settle()

    def stimulus_client_left(self, client):
        """A client's connection is lost: it wants nothing any more."""
        cs = self.clients.pop(client, None)  # None: it was lost before it had registered.
        for ts in list(cs.wants_what) if cs else ():
            self.let_go(cs, ts)
        self.settle()

    def stimulus_fetch_missed(self, client, key, want, attempt, holders):
        """A client could not get a value from any of its holders."""
        cs = self.clients[client]
        ts = self.tasks.get(key)
        # Otherwise it was let go meanwhile; or lost or made again, and that notice is under way.
        if cs.wants_what.get(ts) == want and ts.state == "memory" and ts.attempt == attempt:
            self.strike(ts, holders)
            if ts.who_has:
                self.tell(cs, ts)
        self.settle()

    # Stimuli: workers.

    def stimulus_register_worker(self, worker, name, nthreads, values, attempts):
        """A worker joins; it holds and runs nothing yet."""
        if any(ws.name == name for ws in self.workers.values()):
            self.send(worker, "refused", f"a worker named {name!r} is there already")
            return
        ws = WorkerState(worker, name, nthreads, processing={}, has_what={})
        ws.queue = Queue(ws)
        self.workers[worker] = ws
        self.by_load[EMPTY][ws] = None
        self.send(worker, "registered")
        for ts in self.unrunnable:
            self.mark(ts)
        self.settle()

    def stimulus_worker_left(self, worker):
        """A worker is lost, with its attempts and its data."""
        ws = self.workers.pop(worker, None)
        if ws is None:
            return  # It was refused.
        del self.by_load[ws.load][ws]
        for peer in (*self.workers, *self.clients):
            self.send(peer, "worker-left", worker)
        for attempt, (ts, _) in ws.processing.items():
            if ts.attempt == attempt:
                ts.processing_on = None
                self.mark(ts)
        for ts in list(ws.has_what):
            self.remove_replica(ts, ws)
        for ts in list(ws.queue):
            self.transition(ts, "waiting")
            self.mark(ts)
        if not self.workers:
            for ts in self.queue:
                self.mark(ts)
        self.changed.pop(ws, None)
        self.settle()

    def stimulus_task_finished(self, worker, attempt, nbytes, type, duration_us, value):
        """[11] A worker says that an attempt has made its value, and that it holds it."""
        ws = self.workers[worker]
        ts, current = self.end_attempt(ws, attempt)
        average = self.durations.get(ts.name, duration_us)
        self.durations[ts.name] = (average + duration_us) // 2
        if len(self.durations) > LIMITS["known_durations"]:
            del self.durations[next(iter(self.durations))]
        if current:
            ts.nbytes, ts.type, ts.value = nbytes, type, value
            self.add_replica(ts, ws)
        else:
            # Abandoned: it was released, or lost its place, while this message was under way.
            self.send_name(worker, "free-keys", (ts.key, attempt))
        self.settle()

    def stimulus_task_erred(self, worker, attempt, exception):
        """A worker says that an attempt raised."""
        ts, current = self.end_attempt(self.workers[worker], attempt)
        if current:
            ts.exception = exception
        self.settle()

    def stimulus_task_returned(self, worker, attempt, misses):
        """A worker gives an attempt back: it could not have its inputs.

        ``misses`` says which, and who was asked.  What happens next is ordinary placement.
        """
        ts, current = self.end_attempt(self.workers[worker], attempt)
        for key, number, holders in misses:
            dependency = self.tasks.get(key)
            # Another number: that value was lost or let go, and the miss is no news.
            if dependency is not None and dependency.attempt == number:
                self.strike(dependency, holders)
        if current and misses:
            key, _, holders = misses[0]
            self.miss(ts, f"{worker} could not fetch {key!r} from {', '.join(holders)}")
        self.settle()

    def stimulus_add_keys(self, worker, names):
        """A worker says that it has fetched copies of values."""
        ws = self.workers[worker]
        for key, attempt in names:
            ts = self.tasks.get(key)
            if ts is not None and ts.state == "memory" and ts.attempt == attempt:
                self.add_replica(ts, ws)
            else:
                # Let go or lost while the copy was made.
                self.send_name(worker, "free-keys", (key, attempt))
        self.settle()

    # What a task should be.

    def goal(self, ts):
        """What ``ts`` should be, given who wants it and what its neighbours are."""
        if not (ts.who_wants or ts.waiters):
            gone = ts.state in ("released", "forgotten") and not ts.dependents
            return "forgotten" if gone else "released"
        if ts.exception or ts.text:
            # By way of "waiting", since what waits in a queue has no edge to "erred".
            return "waiting" if ts.state in ("queued", "no-worker") else "erred"
        if ts.who_has:
            return "memory"
        if ts.processing_on:
            return "processing"  # Only the end of its attempt changes that.
        if ts.state not in ("waiting", "queued", "no-worker") or ts.waiting_on:
            return "waiting"
        return "queued" if self.workers else "no-worker"

    def settle(self):
        """Take the edges; then send what waits for as long as there is room."""
        super().settle()
        while self.changed:
            ws, _ = self.changed.popitem()
            while (ts := self.next_for(ws)) and self.has_room(ws, ts):
                self.process(ts, ws)
        while ts := self.queue.peek():
            ws = self.least_loaded(ROOM if self.estimate(ts) <= ROOM_US else FREE)
            if ws is None:
                break
            self.process(ts, ws)
        self.changed.clear()  # What was sent from the common queue left less room, not more.

    def size(self):
        return len(self.tasks)

    def next_for(self, ws):
        """The head of its own queue, or of the common one where that is to go first."""
        ts, common = ws.queue.peek(), self.queue.peek()
        first = ts and common and common.priority < ts.priority and self.has_room(ws, common)
        return common if first else ts

    def has_room(self, ws, ts):
        """Whether ``ts`` may be sent to ``ws`` now.

        Room is measured in time: a task for each thread, and beyond that about a millisecond of
        known-short ones.  So microsecond tasks run hundreds deep, and none waits behind an hour.
        """
        # dask: room is a number of tasks for each thread (worker-saturation), not a time.
        if ws.load <= FREE:
            return True
        if self.estimate(ts) <= ROOM_US:
            return ws.load == ROOM
        # One further task a thread is sent early if its inputs have to be fetched first.
        return len(ws.processing) < 2 * ws.nthreads and self.missing_bytes(ts, ws) is not None

    def least_loaded(self, most):
        """The least loaded of the workers with a load of at most ``most``, or None.

        Only a few are compared: with thousands of workers, deciding must not cost a scan.
        """
        for group in self.by_load[: most + 1]:
            if group:
                some = islice(group, LIMITS["holders"])
                return min(some, key=lambda ws: ws.occupancy // ws.nthreads)
        return None

    def decide_worker(self, ts):
        """The worker on which ``ts``, which has inputs, would start first.

        Weighed are the holders of its inputs and the least loaded worker: what would have to be
        moved there, against the work that waits there.
        """
        candidates = {}
        for dependency in ts.dependencies:
            if len(candidates) < LIMITS["holders"]:
                candidates.update(dict.fromkeys(islice(dependency.who_has, LIMITS["holders"])))
        candidates[self.least_loaded(FULL)] = None

        def start_us(ws):
            missing = self.missing_bytes(ts, ws)
            moving = 0 if missing is None else TRANSFER_US + missing // BYTES_PER_US
            return moving + ws.occupancy // ws.nthreads

        return min(candidates, key=start_us)

    def missing_bytes(self, ts, ws):
        """How much ``ws`` would have to fetch to run ``ts``; None if nothing."""
        missing = [d.nbytes for d in ts.dependencies if ws not in d.who_has]
        return sum(missing) if missing else None

    def estimate(self, ts):
        return self.durations.get(ts.name, UNKNOWN_US)

    # What it means to enter a state, and to leave it.

    def enter_released(self, ts):
        """Nobody needs it.  An attempt that is under way is abandoned, and runs to its end."""
        self.stop_needing(ts)
        ts.attempt = 0
        self.leave_erred(ts)

    def leave_released(self, ts):
        """It owns no field."""

    def enter_waiting(self, ts):
        """Somebody needs it: it needs its dependencies, which may have to be made again."""
        ts.attempt = 0
        ts.waiting_on = {d: None for d in ts.dependencies if not d.who_has}
        for dependency in ts.dependencies:
            dependency.waiters = dependency.waiters or {}
            dependency.waiters[ts] = None
            if dependency.state == "erred":
                ts.exception, ts.text = dependency.exception, dependency.text
            self.mark(dependency)

    def leave_waiting(self, ts):
        ts.waiting_on = ()

    def enter_queued(self, ts):
        """It can run: it waits for room, on the worker that holds its inputs or on any."""
        ts.queue = self.queue
        if ts.dependencies:
            ws = self.decide_worker(ts)
            ts.queue, ts.estimate_us = ws.queue, self.estimate(ts)
            ws.occupancy += ts.estimate_us
            self.changed[ws] = None
        ts.queue.push(ts)

    def leave_queued(self, ts):
        ts.queue.discard(ts)
        if ts.queue.worker:
            ts.queue.worker.occupancy -= ts.estimate_us
            self.changed[ts.queue.worker] = None  # There may be room for what is next.
        ts.queue, ts.estimate_us = None, 0

    def enter_no_worker(self, ts):
        self.unrunnable[ts] = None

    def leave_no_worker(self, ts):
        del self.unrunnable[ts]

    def enter_processing(self, ts):
        """[6] ``processing_on`` has room: a new attempt goes there, with the inputs' places."""
        ws, ts.attempt = ts.processing_on, self.attempts
        self.attempts += 1
        duration_us = self.estimate(ts)
        ws.processing[ts.attempt] = (ts, duration_us)
        self.account(ws, duration_us, +1)
        inputs = [(d.key, d.attempt, self.holders(d)) for d in ts.dependencies]
        call = (ts.key, ts.attempt, ts.name, ts.run_spec, inputs, ts.priority, bool(ts.who_wants))
        self.send(ws.id, "compute-task", *call)

    def leave_processing(self, ts):
        ts.processing_on = None

    def enter_memory(self, ts):
        """It has a value: wake whoever waited, tell whoever asked."""
        self.stop_needing(ts)
        for dependent in ts.waiters:
            # (One that is processing had it already, and did not wait when it was lost.)
            if ts in dependent.waiting_on:
                del dependent.waiting_on[ts]
                self.mark(dependent)
        for cs in ts.who_wants:
            self.tell(cs, ts)
        ts.value = ()  # What rode along was forwarded; the scheduler keeps none.

    def leave_memory(self, ts):
        """Nobody needs the value, and it is freed everywhere; or its last replica is gone.

        Then whoever waits for it, and is not under way with it, has to wait again.
        """
        for ws in list(ts.who_has):
            self.send_name(ws.id, "free-keys", (ts.key, ts.attempt))
            self.remove_replica(ts, ws)
        for dependent in ts.waiters:
            if dependent.state != "processing":
                dependent.waiting_on = {**dict(dependent.waiting_on), ts: None}
                self.mark(dependent)
        for cs in ts.who_wants:
            self.send(cs.id, "key-lost", ts.key, cs.wants_what[ts])

    def enter_erred(self, ts):
        """It failed, or a dependency did and gave it its exception: so does whoever waits."""
        self.stop_needing(ts)
        ts.attempt = 0
        for dependent in ts.waiters:
            # (One that is processing has fetched what was lost since, or will return and fail.)
            if dependent.state != "processing":
                dependent.exception, dependent.text = ts.exception, ts.text
                self.mark(dependent)
        for cs in ts.who_wants:
            self.tell(cs, ts)

    def leave_erred(self, ts):
        ts.exception, ts.text, ts.misses = (), "", 0

    def enter_forgotten(self, ts):
        """Nothing that is kept might have to be computed from it."""
        for dependency in ts.dependencies:
            del dependency.dependents[ts]
            self.mark(dependency)
        del self.tasks[ts.key]

    # Leaves: each changes a few facts, in both directions of a relation, and marks.

    def let_go(self, cs, ts):
        del cs.wants_what[ts]
        del ts.who_wants[cs]
        self.mark(ts)

    def stop_needing(self, ts):
        """It is unfinished no longer: its dependencies may not be needed any more."""
        for dependency in ts.dependencies:
            if ts in dependency.waiters:
                del dependency.waiters[ts]
                self.mark(dependency)

    def process(self, ts, ws):
        ts.processing_on = ws
        self.transition(ts, "processing")

    def end_attempt(self, ws, attempt):
        """An attempt's one end.  Returns its task, and whether the attempt was not abandoned."""
        ts, duration_us = ws.processing.pop(attempt)
        self.account(ws, duration_us, -1)
        current = ts.attempt == attempt
        if current:
            ts.processing_on = None
            self.mark(ts)
        return ts, current

    def account(self, ws, duration_us, sign):
        """Enter an attempt into a worker's books, or strike it out; find the worker's load."""
        ws.occupancy += sign * duration_us
        if duration_us <= ROOM_US:
            ws.short_us += sign * duration_us
        else:
            ws.long += sign
        if len(ws.processing) < ws.nthreads:
            load = FREE if ws.processing else EMPTY
        else:
            room_us = ROOM_US * (ws.nthreads - ws.long)
            load = ROOM if ws.short_us < room_us else FULL
        if load != ws.load:
            del self.by_load[ws.load][ws]
            ws.load = load
            self.by_load[load][ws] = None
        self.changed[ws] = None

    def add_replica(self, ts, ws):
        if ws not in ts.who_has:
            link(ts, "who_has", ws, "has_what")
            ws.nbytes += ts.nbytes

    def remove_replica(self, ts, ws):
        del ts.who_has[ws]
        del ws.has_what[ts]
        ws.nbytes -= ts.nbytes
        if not ts.who_has:
            self.mark(ts)

    def strike(self, ts, holders):
        """Somebody did not get the value from these holders: free it there, use others.

        If there is no other, it is computed again; but links can stay broken, so not for ever.
        """
        for holder in holders:
            ws = self.workers.get(holder)
            if ws is not None and ws in ts.who_has:
                self.send_name(holder, "free-keys", (ts.key, ts.attempt))
                self.remove_replica(ts, ws)
        if ts.state == "memory" and not ts.who_has:
            self.miss(ts, f"{ts.key!r} could not be fetched from {', '.join(holders)}")

    def miss(self, ts, text):
        ts.misses += 1
        if ts.misses > ALLOWED_FAILURES:
            ts.text = text

    def holders(self, ts):
        return [ws.id for ws in islice(ts.who_has, LIMITS["holders"])]

    def tell(self, cs, ts):
        """Tell a client how a task of its ended, if it did."""
        want = cs.wants_what[ts]
        if ts.state == "erred":
            self.send(cs.id, "key-erred", ts.key, want, ts.exception, ts.text)
        elif ts.state == "memory":
            news = (ts.attempt, ts.nbytes, ts.type, self.holders(ts), ts.value)
            self.send(cs.id, "key-in-memory", ts.key, want, *news)

    # Invariants.

    def validate(self):
        """Assert every invariant.  Slow by design: a live process does so only when asked to."""
        assert not self.marked and not self.changed
        tasks, workers = self.tasks.values(), self.workers.values()
        for ts in tasks:
            self.validate_task(ts)
        for ws in workers:
            self.validate_worker(ws)
        # S1. Every relation is known on both sides, and between records that are in the tables.
        check_transposes(tasks, "dependencies", tasks, "dependents")
        check_transposes(tasks, "who_wants", self.clients.values(), "wants_what")
        check_transposes(tasks, "who_has", workers, "has_what")
        # S2. Every table holds what its name says, and nothing else.
        queues = [self.queue, *(ws.queue for ws in workers)]
        assert all(ts.queue is queue for queue in queues for ts in queue)
        assert sum(map(len, queues)) == sum(ts.queue is not None for ts in tasks)
        assert set(self.unrunnable) == {ts for ts in tasks if ts.state == "no-worker"}
        assert all(self.tasks[ts.key] is ts for ts in tasks)
        # S3. No worker is free for what waits in the common queue; no-worker means that.
        assert not self.queue or not (self.by_load[EMPTY] or self.by_load[FREE])
        assert not self.unrunnable or not self.workers

    def validate_task(self, ts):
        # T1. A field owned by a state is set in exactly that state.
        owners = {"who_has": "memory", "processing_on": "processing", "waiting_on": "waiting"}
        for field, state in owners.items():
            assert bool(getattr(ts, field)) == (ts.state == state), ts
        assert (ts.queue is not None) == (ts.state == "queued"), ts
        assert bool(ts.exception or ts.text) == (ts.state == "erred") and not ts.value, ts
        assert bool(ts.attempt) == (ts.state in ("processing", "memory")), ts
        # T2. What nobody needs is not kept; what somebody needs is not left undone.
        assert bool(ts.who_wants or ts.waiters) == (ts.state != "released"), ts
        assert ts.state != "released" or ts.dependents, ts
        # T3. It waits in the queue of a worker exactly if it has inputs.
        assert ts.queue is None or bool(ts.queue.worker) == bool(ts.dependencies), ts
        if ts.state == "processing":
            assert self.workers[ts.processing_on.id].processing[ts.attempt][0] is ts, ts
        for dependency in ts.dependencies:
            # T4. A task is a waiter of its dependencies exactly while it is unfinished.
            assert (ts in dependency.waiters) == (ts.state in UNFINISHED), ts
            # T5. It waits on exactly those that have no value.  (One that is processing has
            # fetched what was lost meanwhile, or will return.)
            if ts.state in ("waiting", "queued", "no-worker"):
                assert (dependency in ts.waiting_on) == (dependency.state != "memory"), ts
        assert {*ts.waiters} <= {*ts.dependents} and {*ts.waiting_on} <= {*ts.dependencies}, ts

    def validate_worker(self, ws):
        # W1. Every counter can be recounted.
        durations = [duration_us for _, duration_us in ws.processing.values()]
        assert ws.nbytes == sum(ts.nbytes for ts in ws.has_what), ws
        assert ws.occupancy == sum(durations) + sum(ts.estimate_us for ts in ws.queue), ws
        assert ws.short_us == sum(d for d in durations if d <= ROOM_US), ws
        assert ws.long == sum(d > ROOM_US for d in durations), ws
        assert (ws.load == EMPTY) == (not ws.processing), ws
        assert (ws.load <= FREE) == (len(ws.processing) < ws.nthreads), ws
        # W2. No thread is idle while something waits for it.  (Room for a further, short one may
        # go unnoticed for a while, when it is another worker that measures how short it is.)
        assert not ws.queue or ws.load > FREE, ws
        assert [ws in group for group in self.by_load] == [i == ws.load for i in range(4)], ws


def link(one, field, other, transpose):
    """Enter a relation on both sides; ordered sets are made when first needed."""
    for record, name, value in ((one, field, other), (other, transpose, one)):
        if not getattr(record, name):
            setattr(record, name, {})
        getattr(record, name)[value] = None


def check_transposes(some, field, others, transpose):
    pairs = {(a, b) for a in some for b in getattr(a, field)}
    assert pairs == {(a, b) for b in others for a in getattr(b, transpose)}, field


# ---- 4. Worker mind: Attempt, WorkerMind ----
#
# Which attempts this worker has, which values it fetches and holds.  It may use chapter 1.


@dataclass(eq=False, slots=True)
class Attempt:
    """One try to compute a task here.  Several may bear one key; their numbers differ."""

    number: int
    key: "str | tuple"
    name: str
    run_spec: tuple
    priority: tuple  # the task's, then the number: no two are alike
    inputs: "list[tuple]"  # [(key, attempt)]: the values that it is called with
    wanted: bool  # a client waits for the result: it should ride along if it is small
    state: str = "waiting"
    # Non-empty in "waiting" only: the inputs that are not here.
    waiting_for: "dict[tuple, None] | tuple[()]" = ()
    # What it has to be whatever its inputs: "executing" when a thread has taken it, and then how
    # it ends ("finished", "erred", "returned"), with the fields of the message that says so.
    fate: str = ""
    told: tuple = ()

    def where(self):
        return self.number, ""


class WorkerMind(FetchingMind):
    """What one worker has to do, and what it holds."""

    TRANSITIONS = edges(
        waiting="ready returned erred", ready="executing returned", executing="finished erred"
    )

    def __init__(self):
        super().__init__()
        self.attempts = {}  # {number: Attempt}, until its end was told
        self.data = {}  # an ordered set of (key, attempt): the values held; the body has them
        self.needed_by = {}  # {(key, attempt): ordered set of Attempts that have not started}
        self.ready = Queue()  # attempts that a thread can begin

    def stimulus_compute_task(self, peer, key, attempt, name, run_spec, places, order, wanted):
        """[7] The scheduler sends an attempt: fetch its inputs, then it is ready."""
        inputs = {(key, number): holders for key, number, holders in places}
        new = Attempt(attempt, key, name, run_spec, (*order, attempt), list(inputs), wanted)
        self.attempts[attempt] = new
        new.waiting_for = {value: None for value in inputs if value not in self.data}
        for value in inputs:
            self.needed_by.setdefault(value, {})[new] = None
        for value in list(new.waiting_for):
            self.need(value, inputs[value])
        self.mark(new)
        self.settle()

    def stimulus_take(self):
        """[8] A thread is free: the Attempt that it shall run, or None."""
        attempt = self.ready.peek()
        if attempt is not None:
            self.decree(attempt, "executing")
            self.settle()
        return attempt

    def stimulus_finished(self, number, nbytes, type, duration_us, value):
        """[10] A thread has a result.  ``value`` are its frames, if it is to ride along."""
        attempt = self.attempts[number]
        self.data[attempt.key, number] = None  # Until the scheduler says otherwise.
        self.decree(attempt, "finished", nbytes, type, duration_us, value)
        self.settle()

    def stimulus_failed(self, number, exception):
        """A thread met an exception."""
        self.decree(self.attempts[number], "erred", exception)
        self.settle()

    def stimulus_free_keys(self, peer, names):
        """The scheduler says that nobody needs these values."""
        for name in names:
            del self.data[name]
            # Normal for an attempt that was abandoned, or whose input was struck: without its
            # input it goes back to be placed again.
            for attempt in self.needed_by.get(name, ()):
                self.decree(attempt, "returned", [])
        self.settle()

    def arrived(self, name, ok, value):
        """A copy of a value is here; or its holder cannot pickle it, and nobody can use it."""
        if ok:
            self.data[name] = None
            self.send_name(SCHEDULER, "add-keys", name)
        for attempt in self.needed_by.get(name, ()):
            attempt.waiting_for.pop(name, None)
            self.mark(attempt)
            if not ok:
                self.decree(attempt, "erred", value)

    def missed(self, name, misses):
        """No holder gave this value: the attempts that need it go back, and say so."""
        for attempt in self.needed_by.get(name, ()):
            self.decree(attempt, "returned", [*(attempt.told or [[]])[0], (*name, misses)])

    def decree(self, attempt, fate, *told):
        attempt.fate, attempt.told = fate, told
        self.mark(attempt)

    def goal(self, attempt):
        """What an attempt should be, given its inputs and what its thread said."""
        return attempt.fate or ("waiting" if attempt.waiting_for else "ready")

    def size(self):
        return len(self.attempts)

    def leave_waiting(self, attempt):
        attempt.waiting_for = ()

    def enter_ready(self, attempt):
        """All inputs are here."""
        self.ready.push(attempt)

    def leave_ready(self, attempt):
        self.ready.discard(attempt)

    def enter_executing(self, attempt):
        """From now on its thread holds the inputs; they may be freed here.

        What only this attempt needed is not fetched any more.
        """
        for name in attempt.inputs:
            needed_by = self.needed_by.get(name, {})
            if needed_by.pop(attempt, 0) is None and not needed_by:
                del self.needed_by[name]
                self.wanted.pop(name, None)

    def leave_executing(self, attempt):
        """It owns no field."""

    def enter_finished(self, attempt):
        """An attempt ends once, by one message."""
        del self.attempts[attempt.number]
        self.enter_executing(attempt)
        self.send(SCHEDULER, f"task-{attempt.fate}", attempt.number, *attempt.told)

    enter_erred = enter_returned = enter_finished

    def validate(self):
        super().validate()
        needed = {}
        for number, attempt in self.attempts.items():
            # A1. What an attempt is follows from what it has.
            assert attempt.number == number and attempt.state == self.goal(attempt), attempt
            assert (attempt in self.ready) == (attempt.state == "ready"), attempt
            if attempt.state != "executing":
                # A2. It waits for exactly the inputs that are not here, and those are fetched.
                missing = {name for name in attempt.inputs if name not in self.data}
                assert set(attempt.waiting_for) == missing <= set(self.wanted), attempt
                for name in attempt.inputs:
                    needed.setdefault(name, {})[attempt] = None
        # A3. needed_by is the transpose of inputs, for those that have not started.
        assert needed == self.needed_by
        # A4. Nothing is fetched that nobody needs, or that is here.
        assert set(self.wanted) <= set(self.needed_by) - set(self.data)


# ================================ Part two, how it travels ========================================

# ---- 5. Wire: pack, read_batch, Connection, the handshake ----
#
# Nothing else in this file knows bytes.  A batch is a prefix of two integers, a JSON header
# ``[messages, sizes of frames]`` and the binary frames.  JSON, because a reader can watch it go
# by, and because parsing it can run no code.

PREFIX = struct.Struct("!IQ")  # bytes of the header, bytes of all frames
LARGE = 256 << 10  # frames of so much together are read straight into buffers of their own
CHUNK = 1 << 20


def pack(messages):
    """One batch as buffers to be written one after the other.

    A frame stands in a message as its place in the batch's table of frames; one that several
    messages share (the function of a ``map``) is there once.
    """
    frames = {}  # {id of a frame: (its place, a view of it)}

    def place(frame):
        return frames.setdefault(id(frame), (len(frames), memoryview(frame)))[0]

    body = json.dumps(messages, default=place, separators=(",", ":"), check_circular=False)
    views = [view for _, view in frames.values()]
    header = f"[{body},{json.dumps([view.nbytes for view in views])}]".encode()
    return [PREFIX.pack(len(header), sum(view.nbytes for view in views)), header, *views]


async def read_batch(reader, sender):
    """Read one batch that a ``sender`` ("client", "worker", ...) wrote: its checked messages.

    Everything is bounded before it is allocated.  Raises ``ProtocolError`` for what no peer
    sends, ``asyncio.IncompleteReadError`` at the end of the stream.
    """
    header_bytes, frames_bytes = PREFIX.unpack(await reader.readexactly(PREFIX.size))
    if header_bytes > LIMITS["header_bytes"]:
        raise ProtocolError(f"a header of {header_bytes} bytes")
    try:
        messages, sizes = json.loads(await reader.readexactly(header_bytes))
        fits = all(type(size) is int and 0 <= size <= LIMITS["frame_bytes"] for size in sizes)
        if not fits or len(sizes) > LIMITS["frames"] or sum(sizes) != frames_bytes:
            raise ValueError("sizes of frames that do not fit")
        messages = list(messages)
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"no header: {error}") from error
    if frames_bytes < LARGE:
        # Read together, then copied: a small frame must not pin the batch that it came in.
        buffer, ends = await reader.readexactly(frames_bytes), accumulate(sizes)
        frames = [buffer[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    else:
        frames = [await read_large(reader, size) for size in sizes]
    return [check_message(message, frames, sender) for message in messages]


async def read_large(reader, size):
    """A large frame, in a writable buffer.  (``readexactly`` would copy it twice.)"""
    frame, start = bytearray(size), 0
    view = memoryview(frame)
    while start < size:
        chunk = await reader.read(min(CHUNK, size - start))
        if not chunk:
            raise asyncio.IncompleteReadError(b"", size - start)
        view[start : start + len(chunk)] = chunk
        start += len(chunk)
    return frame


class Connection:
    """Batches over one pair of asyncio streams.

    What is sent before the streams are there waits for them.
    """

    def __init__(self):
        self.outbox = []
        self.writer = None
        self.writing = None  # the task that writes what one turn of the loop could not
        self.loop = asyncio.get_running_loop()

    async def connect(self, address, role, worker=""):
        """Connect to ``address``, and to that worker process if one is named.

        Raises OSError or EOFError if nobody is there, PermissionError if we are refused.
        """
        opening = asyncio.open_connection(*split_address(address), limit=4 * CHUNK)
        await self.open(*await asyncio.wait_for(opening, LIMITS["handshake_seconds"]), role, worker)

    async def open(self, reader, writer, role, worker="", accepting=False):
        """Shake hands, and then send what waits."""
        try:
            handshake = shake_hands(reader, writer, role, worker, accepting)
            self.peer = await asyncio.wait_for(handshake, LIMITS["handshake_seconds"])
        except BaseException:
            writer.close()
            raise
        self.reader, self.writer = reader, writer
        self.flush()

    def send(self, message):
        """[3] Append to the outbox; it is flushed at the end of the current turn of the loop.

        No timer: an idle system sends at once, a busy one makes larger batches by itself.
        """
        self.outbox.append(message)
        if len(self.outbox) == 1 and self.writer and not self.writing:
            self.loop.call_soon(self.flush)

    def flush(self):
        """Write one batch; if it is large, or the peer is slow, in a task."""
        if not self.outbox or self.writer.is_closing():
            return
        batch = self.outbox[: LIMITS["batch_messages"]]
        del self.outbox[: len(batch)]
        buffers = pack(batch)
        waiting = self.writer.transport.get_write_buffer_size()
        if sum(map(len, buffers)) + waiting < CHUNK:
            self.writer.write(b"".join(buffers))
            if self.outbox:
                self.loop.call_soon(self.flush)
        else:
            self.writing = self.loop.create_task(self.write(buffers))

    async def write(self, buffers):
        """Write a batch as fast as the peer takes it.  Slow is not dead, but stalled is."""
        try:
            for buffer in map(memoryview, buffers):
                for start in range(0, len(buffer), CHUNK):
                    self.writer.write(buffer[start : start + CHUNK])
                    await asyncio.wait_for(self.writer.drain(), LIMITS["stall_seconds"])
        except OSError:
            self.hang_up()
        self.writing = None
        self.flush()

    async def receive(self):
        """The checked messages of the next batch."""
        return await read_batch(self.reader, self.peer)

    def hang_up(self):
        if self.writer:
            self.writer.transport.abort()

    async def close(self):
        """Write what waits, then close."""
        while (self.outbox or self.writing) and not self.writer.is_closing():
            # If it is not being written, the flush is due in this turn of the loop or the next.
            await (self.writing or asyncio.sleep(0))
        self.writer.close()
        with contextlib.suppress(OSError):
            await asyncio.wait_for(self.writer.wait_closed(), 1)
        self.hang_up()


# The handshake, before anything else: fixed sizes, and a time limit.  Both sides say hello, which
# names the worker process that is meant (ports are reused); then both prove that they hold the
# secret, the connector first.  (HMAC challenge and response as in multiprocessing.connection.)

HELLO = struct.Struct("!8sHBBB32s32s")  # magic, protocol, Python's version, role, nonce, worker
MAGIC, PROTOCOL = b"minidist", 1
ROLES = ["client", "worker", "scheduler", "holder"]
REFUSAL = "wrong secret: set MINIDIST_TOKEN, or copy ~/.minidist/token, so that it is the same"


async def shake_hands(reader, writer, role, worker, accepting):
    """Returns the kind of peer at the other end.  Raises PermissionError if it is not like us."""
    version, meant = sys.version_info[:2], hashlib.sha256(worker.encode()).digest()
    mine = HELLO.pack(MAGIC, PROTOCOL, *version, ROLES.index(role), os.urandom(32), meant)
    writer.write(mine)
    theirs = await reader.readexactly(HELLO.size)
    magic, protocol, major, minor, peer, _, their_worker = HELLO.unpack(theirs)
    if magic != MAGIC or peer >= len(ROLES):
        raise PermissionError("the other end does not speak minidist")
    if (protocol, (major, minor)) != (PROTOCOL, version):
        text = f"the other end has protocol {protocol}, Python {major}.{minor}; this one has"
        raise PermissionError(f"{text} {PROTOCOL}, {version[0]}.{version[1]}: they must be equal")
    if their_worker != meant:
        raise ConnectionError(f"{worker or 'the worker that the other end means'} is not there")

    def proof(by_acceptor):
        said = b"acceptor" if by_acceptor else b"connector"
        said += theirs + mine if accepting else mine + theirs
        return hmac.digest(secret(), said, "sha256")

    if not accepting:
        writer.write(proof(by_acceptor=False))
    try:
        if not hmac.compare_digest(await reader.readexactly(32), proof(not accepting)):
            raise PermissionError(f"a {ROLES[peer]} with a {REFUSAL}")
    except (asyncio.IncompleteReadError, ConnectionResetError):
        raise PermissionError(REFUSAL) from None  # It hung up on our proof.
    if accepting:
        writer.write(proof(by_acceptor=True))
    return ROLES[peer]


def secret():
    """The secret that all processes of a cluster share: MINIDIST_TOKEN, or a file made once.

    The model is Erlang's cookie: on one machine everything works for this user and nobody else.
    """
    token = os.environ.get("MINIDIST_TOKEN")
    if token:
        return token.encode()
    path = os.path.expanduser("~/.minidist/token")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        draft = f"{path}.{unique()}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(os.urandom(32).hex())
        with contextlib.suppress(FileExistsError):  # Another process was first: use its own.
            os.link(draft, path)
        os.unlink(draft)
    if os.stat(path).st_mode & 0o077:
        raise PermissionError(f"{path} can be read by others: chmod 600 {path}")
    with open(path, "rb") as file:
        return file.read()


def split_address(address):
    """("HOST", PORT) of "tcp://HOST:PORT" or "HOST:PORT"; ValueError if it is neither."""
    host, colon, port = str(address).removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address: it should look like '127.0.0.1:8786'")
    return host.strip("[]"), int(port)


# ---- 6. Serialization: dumps, loads, dump_call, load_call, exceptions, sizeof, keys ----
#
# Objects become *frames*: a pickle, then its out-of-band buffers (pickle protocol 5, PEP 574).
# The scheduler forwards frames and never opens them.


def dumps(obj):
    """Pickle an object: a tuple of frames.

    The standard pickler is several times faster, but knows nothing of lambdas, and refers to what
    is in ``__main__`` by a name that means something else on a worker: then cloudpickle does it.
    """
    buffers = []
    try:
        data = pickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
    except Exception:
        data = None
    if data is None or b"__main__" in data:
        buffers = []
        data = cloudpickle.dumps(obj, protocol=5, buffer_callback=buffers.append)
    return (data, *[buffer.raw() for buffer in buffers])


def loads(frames):
    """Unpickle frames.  Arrays over small buffers get writable copies; large ones are writable."""
    data, *buffers = frames
    buffers = [bytearray(b) if memoryview(b).readonly else b for b in buffers]
    return pickle.loads(data, buffers=buffers)


class Context(threading.local):
    """What a thread is doing while it pickles or unpickles a call."""

    collected = None  # on clients: {Future: None}, those met in the arguments being pickled
    inputs = None  # on workers: {key: value}, what stands for them in the call being unpickled


CONTEXT = Context()


def resolve(key):
    """On a worker, what a pickled Future becomes: the value."""
    return CONTEXT.inputs[key]


@contextlib.contextmanager
def collecting():
    """A dict in which each Future that is pickled meanwhile adds itself."""
    CONTEXT.collected = {}
    try:
        yield CONTEXT.collected
    finally:
        CONTEXT.collected = None


def dump_function(func):
    """(frame, func); the frame is empty if the function has to travel in the call."""
    with collecting() as futures:
        frames = dump_part(f"the function {name_of(func)!r}", func)
        return (b"" if futures or len(frames) > 1 else frames[0]), func


def dump_call(function, args, kwargs):
    """Pickle a call: (run_spec, futures in its arguments).

    ``function`` comes from ``dump_function``.  A Future adds itself to the collection in
    ``Future.__reduce__``: so it is found at any depth, and never by equal strings.
    """
    frame, func = function
    with collecting() as futures:
        try:
            data, *buffers = dumps((args, kwargs) if frame else (func, args, kwargs))
        except Exception:
            # Which one is it?  At this price only now.
            for place, arg in (*enumerate(args), *kwargs.items()):
                dump_part(f"argument {place!r} of {name_of(func)}", arg)
            raise
        # Copies: what the caller does to an array after the call must not change the call.
        return (frame, data, *map(bytes, buffers)), list(futures)


def dump_part(what, obj):
    try:
        return dumps(obj)
    except Exception as error:
        text = f"{what} ({type(obj).__name__}) cannot be pickled: {error}"
        raise TypeError(text) from error


@functools.lru_cache(maxsize=256)
def load_function(frame):
    return pickle.loads(frame)


def load_call(run_spec, inputs):
    """(func, args, kwargs) of a pickled call, with ``inputs`` ({key: value}) for its futures.

    A plain function is unpickled once; other callables each time, since they may have state.
    """
    frame, *call = run_spec
    CONTEXT.inputs = inputs
    try:
        if not frame:
            return loads(call)
        func = load_function(bytes(frame))
        if not isinstance(func, (types.FunctionType, types.BuiltinFunctionType, type)):
            func = pickle.loads(frame)
        return func, *loads(call)
    finally:
        CONTEXT.inputs = None


def name_of(func):
    """The function's name: the first part of its tasks' keys."""
    func = getattr(func, "func", func)  # functools.partial
    return str(getattr(func, "__name__", type(func).__name__)).strip("<>")


def pure_key(name, frames):
    """Same bytes, same call, same key.  (Equal values with other bytes are computed twice.)"""
    digest = hashlib.blake2b(digest_size=16)
    for frame in frames:
        digest.update(len(frame).to_bytes(8, "big"))
        digest.update(frame)
    return f"{name}-{digest.hexdigest()}"


def unique():
    return os.urandom(16).hex()


def check_key(key):
    """A key is a string, or a tuple of strings, numbers and tuples; anything else a TypeError."""
    try:
        return to_key(json.loads(json.dumps(key if isinstance(key, (str, tuple)) else None)))
    except (TypeError, ValueError, RecursionError):
        raise TypeError(f"a key is a string or a tuple, not {key!r:.80}") from None


class RemoteError(Exception):
    """Stands for an exception that could not be pickled, or not be unpickled here."""


def pack_exception(error, skip=0):
    """An exception as frames, with its causes and the places of its traceback.

    ``skip`` leaves out that many frames at the start: the worker's own.  Pickle loses causes and
    tracebacks; so each link of the chain travels as a pickle of its own, text, and places.
    """
    links, relation = [], ""
    while error is not None and len(links) < 20:
        places = [
            (frame.f_code.co_filename, line, frame.f_code.co_name)
            for frame, line in traceback.walk_tb(error.__traceback__)
        ]
        try:
            (data,) = dumps(error)
            pickle.loads(data)  # Many exceptions can be pickled, but not unpickled.
        except Exception:
            data = b""
        try:
            text = f"{type_name(error)}: {error}"
        except Exception as another:  # Even ``str`` may raise.
            text = f"{type_name(error)}, whose text raises {type_name(another)}"
        links.append((relation, data, text, places[skip:]))
        skip, relation = 0, "cause" if error.__cause__ is not None else "context"
        suppressed = error.__suppress_context__ and error.__cause__ is None
        error = None if suppressed else error.__cause__ or error.__context__
    return (pickle.dumps(links, protocol=5),)


def unpack_exception(frames):
    """The exception, with its causes, and with real tracebacks whose frames name the places."""
    error = previous = None
    for relation, data, text, places in reversed(pickle.loads(frames[0])):
        try:
            error = pickle.loads(data) if data else RemoteError(text)
        except Exception:
            error = RemoteError(text)
        error.__traceback__ = rebuild_traceback(places)
        if previous is not None:
            setattr(error, *previous)
        previous = (f"__{relation}__", error)
    return error


def rebuild_traceback(places):
    """A traceback through [(file, line, function)].

    Tracebacks need frames, and frames come from running code: for each place a line of code that
    carries its names is compiled and run to its exception.  (The idea is that of tblib.)
    """
    tb = None
    for filename, line, name in reversed(places):
        code = compile("raise RuntimeError", filename, "exec")
        units = len(code.co_code) // 2
        # A table of places that says "the first line, no column" for every 8 units of code: with
        # columns, the traceback would underline what stands there in the worker's source.
        table = b"".join(bytes([0xE8 | min(8, units - n) - 1, 0]) for n in range(0, units, 8))
        where = {"co_firstlineno": line, "co_linetable": table}
        try:
            exec(code.replace(co_name=name, co_qualname=name, **where), {"__file__": filename})
        except RuntimeError as error:
            frame = error.__traceback__.tb_next.tb_frame
        tb = types.TracebackType(tb, frame, frame.f_lasti, line)
    return tb


def sizeof(obj, depth=3):
    """About how many bytes an object takes; of large containers a few items are looked at."""
    nbytes = getattr(obj, "nbytes", None)
    if isinstance(nbytes, int):
        return nbytes
    size = sys.getsizeof(obj, 64)
    if depth and isinstance(obj, (list, tuple, set, frozenset, dict)) and obj:
        some = list(islice(obj.items() if isinstance(obj, dict) else obj, 10))
        size += len(obj) * sum(sizeof(item, depth - 1) for item in some) // len(some)
    return size


def type_name(obj):
    kind = type(obj)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


# ================================ Part three, how it runs =========================================
#
# Bodies decide nothing: they check what comes in, call the stimulus that its op names, and send
# what the mind leaves in its outbox.

logger = logging.getLogger("minidist")
STIMULI = {op: "stimulus_" + op.replace("-", "_") for op in MESSAGES}


class Body:
    """What the bodies of the three minds share: links to peers, and the tasks that serve them."""

    role = ""  # as what it introduces itself to a peer that it connects to, ...
    role_when_called = ""  # ... and to one that connects to it
    id = ""  # the worker process that whoever connects has to mean

    def __init__(self, mind):
        self.state = mind
        self.links = {}  # {peer: Connection}
        self.tasks = set()  # of asyncio, cancelled when it ends
        self.lock = contextlib.nullcontext()  # around the mind
        self.validating = bool(os.environ.get("MINIDIST_VALIDATE"))

    async def __aexit__(self, *_):
        await self.close()

    def start(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def stop(self):
        """Cancel its tasks, and wait until they are gone."""
        others = [task for task in self.tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def listen(self, host, port):
        """Serve whoever connects; ``address`` says where."""
        self.server = await asyncio.start_server(self.accept, host, port, limit=4 * CHUNK)
        port = self.server.sockets[0].getsockname()[1]
        self.address = f"tcp://{reachable(host)}:{port}"

    async def accept(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        connection = Connection()
        try:
            await connection.open(reader, writer, self.role_when_called, self.id, accepting=True)
            await self.serve(connection)
        except (PermissionError, ProtocolError) as error:
            logger.warning("Refused %s: %s", writer.get_extra_info("peername"), error)
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # The peer is gone, or we are.
        except Exception:
            logger.exception("Dropped %s: it broke us", writer.get_extra_info("peername"))
        finally:
            self.tasks.discard(asyncio.current_task())
            writer.close()

    async def follow(self, peer, connection, batch=()):
        """[4] A peer's checked messages, until its stream ends: each one's op names a stimulus."""
        self.links[peer] = connection
        try:
            while True:
                with self.lock:
                    for message in batch:
                        self.take(peer, message.pop("op"), message)
                self.flush()
                batch = await connection.receive()
        except ProtocolError as error:
            logger.warning("Dropped %s: %s", peer, error)
        except (OSError, EOFError):
            pass  # What it means that a peer is gone is the mind's business.
        except Exception:
            logger.exception("Dropped %s: what it sent cannot be", peer)
        finally:
            del self.links[peer]
            connection.writer.close()

    def take(self, peer, op, fields):
        getattr(self.state, STIMULI[op])(peer, **fields)
        if op == "worker-left" and fields["worker"] in self.links:
            self.links[fields["worker"]].hang_up()

    def flush(self):
        """Send what the mind has in its outbox."""
        with self.lock:
            outbox, self.state.outbox = self.state.outbox, []
            if self.validating:
                self.state.validate()
        for peer, message in outbox:
            if peer not in self.links and peer != SCHEDULER:
                self.links[peer] = Connection()
                self.start(self.reach(peer, self.links[peer]))
            if peer in self.links:  # (The scheduler may be gone.)
                self.links[peer].send(message)

    async def reach(self, holder, connection):
        """A data connection to a holder of values, from when it is first needed until it breaks."""
        try:
            await connection.connect(holder.partition("#")[0], self.role, holder)
        except (OSError, EOFError):
            del self.links[holder]
        else:
            await self.follow(holder, connection)
        with self.lock:
            self.state.stimulus_link_lost(holder)
        self.flush()


def reachable(host):
    """The address to tell others when listening on ``host``: one of our own for "any"."""
    if host not in ("0.0.0.0", ""):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # Sends nothing; only asks for the route out.
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


async def reach_scheduler(address, role, timeout):
    """A Connection; while nobody is there, it is tried again for ``timeout`` s (None: for ever)."""
    deadline = time.monotonic() + (math.inf if timeout is None else timeout)
    for trial in count():
        connection = Connection()
        try:
            await connection.connect(address, role)
            return connection
        except PermissionError as error:
            raise PermissionError(f"{address}: {error}") from None
        except (OSError, EOFError) as error:
            if time.monotonic() >= deadline:
                text = f"no scheduler at {address} within {timeout} s ({error!r})"
                raise ConnectionError(text) from error
        if timeout is None and trial == 0:
            logger.warning("No scheduler at %s yet; trying again", address)
        await asyncio.sleep(0.1)


# ---- 7. Scheduler: the asyncio-stream server around its mind ----


class Scheduler(Body):
    """Runs a SchedulerMind.

    ``host`` and ``port`` say where it listens; port 0 is any that is free.  An
    ``async with`` starts and closes it.  ``address`` is what workers and clients connect to,
    ``state`` the mind.
    """

    role_when_called = "scheduler"

    def __init__(self, host="127.0.0.1", port=0):
        super().__init__(SchedulerMind(first_attempt=time.time_ns() // 1000))
        self.host, self.port = host, port

    async def __aenter__(self):
        await self.listen(self.host, self.port)
        return self

    async def close(self):
        """Hang up on everybody.  Workers end, and clients' pending futures are cancelled."""
        self.server.close()
        await self.stop()

    async def serve(self, connection):
        """One peer, from when it registers until it leaves."""
        batch = await connection.receive()
        peer = batch[0].pop("id", None) if batch else None  # Only who registers has one.
        if peer is None or peer in self.links:
            raise ProtocolError(f"a {connection.peer} that does not register, or is here already")
        logger.info("%s joined", peer)
        try:
            await self.follow(peer, connection, batch)
        finally:
            logger.info("%s left", peer)
            getattr(self.state, f"stimulus_{connection.peer}_left")(peer)
            self.flush()

    def take(self, peer, op, fields):
        known = peer in self.state.workers or peer in self.state.clients
        if known == op.startswith("register-"):
            raise ProtocolError(f"{op} at the wrong time")
        super().take(peer, op, fields)


# ---- 8. Worker: executor threads, peer-to-peer transfers ----


class Packed:
    """A value as it came over the wire; unpickled by the first thread that needs it."""

    def __init__(self, frames):
        self.frames = frames


class Worker(Body):
    """Runs a WorkerMind: threads that take ready attempts, and a store of values.

    ``nthreads`` tasks run at a time (default: one for each core); ``name`` is its own in the
    cluster (default: its address).  An ``async with`` starts and closes it; ``timeout`` seconds
    are given to the scheduler to answer, None waits for ever.  Raises OSError if there is no
    scheduler, ValueError if the name is in use.
    """

    role, role_when_called = "worker", "holder"

    def __init__(self, scheduler_address, nthreads=None, name=None, timeout=10):
        super().__init__(WorkerMind())
        split_address(scheduler_address)
        self.scheduler_address, self.timeout = scheduler_address, timeout
        self.nthreads, self.name = nthreads or os.cpu_count() or 1, name
        self.lock = threading.Condition()  # Threads take attempts; they wait for a ready one.
        self.store = {}  # {(key, attempt): value or Packed}
        self.done = deque()  # (stimulus, its arguments, result): what threads hand back
        self.waking = self.closed = False

    async def __aenter__(self):
        """Connect, listen where the scheduler was reached from, register, start the threads."""
        self.loop = asyncio.get_running_loop()
        self.scheduler = await reach_scheduler(self.scheduler_address, self.role, self.timeout)
        await self.listen(self.scheduler.writer.get_extra_info("sockname")[0], 0)
        self.id = f"{self.address}#{unique()[:8]}"
        self.name = str(self.name if self.name is not None else self.address)
        register = {"name": self.name, "nthreads": self.nthreads, "values": [], "attempts": []}
        self.scheduler.send({"op": "register-worker", "id": self.id, **register})
        first, *batch = await self.scheduler.receive()
        if first["op"] == "refused":
            await self.close()
            raise ValueError(f"{self.scheduler_address}: {first['text']}")
        for number in range(self.nthreads):
            name = f"minidist-{self.name}-{number}"
            threading.Thread(target=self.run_thread, name=name, daemon=True).start()
        self.finished = self.start(self.follow(SCHEDULER, self.scheduler, batch))
        return self

    async def close(self):
        """Leave at once.  Running tasks are not waited for; nothing is handed over."""
        self.server.close()
        await self.stop()
        await self.scheduler.close()
        with self.lock:
            self.closed = True
            self.lock.notify_all()

    @property
    def data(self):
        """{key: value} of what this worker holds."""
        with self.lock:
            return {name[0]: self.unpacked(name) for name in self.store}

    def take(self, peer, op, fields):
        """What the mind wants to hold is stored, and what it is told to free is not any more."""
        super().take(peer, op, fields)
        if op == "free-keys":
            for name in fields["names"]:
                del self.store[name]
        elif op == "data":
            name = (fields["key"], fields["attempt"])
            if name in self.state.data and name not in self.store:
                self.store[name] = Packed(fields["value"])

    def flush(self):
        super().flush()
        with self.lock:
            self.lock.notify(len(self.state.ready))

    # Threads.

    def run_thread(self):
        """Take ready attempts and run them, until the worker closes.

        What they made is handed back by way of a deque: one wake-up of the loop for many.
        """
        while True:
            with self.lock:
                while not self.closed and not self.state.ready:
                    self.lock.wait()
                if self.closed:
                    return
                attempt = self.state.stimulus_take()
                inputs = {name: self.store[name] for name in attempt.inputs}
            self.done.append(self.run_task(attempt, inputs))
            del attempt, inputs
            if not self.waking:
                self.waking = True
                with contextlib.suppress(RuntimeError):  # The loop is closed.
                    self.loop.call_soon_threadsafe(self.collect)

    def run_task(self, attempt, inputs):
        """[9] Unpickle the call, run it, and pickle what a client is waiting for."""
        try:
            try:
                values = {name[0]: self.unpacked(name, inputs) for name in inputs}
                func, args, kwargs = load_call(attempt.run_spec, values)
            except Exception as error:
                text = f"the call of {attempt.key!r} cannot be unpickled on {self.name}"
                raise RuntimeError(f"{text}: {type(error).__name__}: {error}") from error
            start = time.perf_counter_ns()
            result = func(*args, **kwargs)
            duration_us = (time.perf_counter_ns() - start) // 1000
            nbytes, value = sizeof(result), ()
        except BaseException as error:
            return "stimulus_failed", (attempt.number, pack_exception(error, skip=1)), None
        if attempt.wanted and nbytes <= LIMITS["ride_along_bytes"]:
            with contextlib.suppress(Exception):  # It will fail whoever asks for it.
                value = dumps(result)
                if sum(map(len, value)) > LIMITS["ride_along_bytes"]:
                    value = ()
        told = (attempt.number, nbytes, type_name(result), duration_us, value)
        return "stimulus_finished", told, ((attempt.key, attempt.number), result)

    def unpacked(self, name, inputs=None):
        """A value as an object.  ``inputs`` are a thread's own: the store may have freed them."""
        value = (inputs or self.store)[name]
        if isinstance(value, Packed):
            value = loads(value.frames)
            if name in self.store:
                self.store[name] = value
        return value

    def collect(self):
        """Tell the mind what threads have handed back."""
        self.waking = False
        with self.lock:
            while self.done:
                stimulus, told, stored = self.done.popleft()
                if stored is not None:
                    self.store[stored[0]] = stored[1]
                getattr(self.state, stimulus)(*told)
                del told, stored
        self.flush()

    # Data connections.

    async def serve(self, connection):
        """A peer's or client's data connection: give it the values that it asks for."""
        while True:
            for message in await connection.receive():
                if message["op"] != "get-data":
                    raise ProtocolError(f"{message['op']} on a data connection")
                for name in message["names"]:
                    status, value = await self.give(name)
                    answer = dict(op="data", key=name[0], attempt=name[1], status=status)
                    connection.send(answer | {"value": value})
                    if connection.writing:  # Who asks sets the pace.
                        await connection.writing

    async def give(self, name):
        """("ok", frames), ("missing", ()), or ("error", frames of the exception)."""
        if name not in self.store:
            return "missing", ()
        value = self.store[name]
        if isinstance(value, Packed):
            return "ok", value.frames
        try:
            return "ok", await asyncio.to_thread(dumps, value)
        except Exception as error:
            text = f"the result of {name[0]!r}, a {type_name(value)}, cannot be pickled: {error}"
            return "error", pack_exception(TypeError(text))


# ---- 9. Client: Future, Client, wait ----
#
# A user's thread, and ``Future.__del__`` in any thread at any moment of the garbage collector,
# only append an entry to the client's inbox, and wake its loop if it sleeps; that append is the
# commit.  Counts, tables and the stream change only in the loop, in the inbox's order.


class CancelledError(concurrent.futures.CancelledError):
    """This future will never have a result; the message says why."""


ALL_COMPLETED, FIRST_COMPLETED = "ALL_COMPLETED", "FIRST_COMPLETED"
FIRST_EXCEPTION = "FIRST_EXCEPTION"
DoneAndNotDoneFutures = namedtuple("DoneAndNotDoneFutures", "done not_done")
RESERVED = "resources retries workers allow_other_workers actor fifo_timeout batch_size".split()


class Future:
    """The result of a task that may not have run yet.  Made by ``Client.submit`` and ``map``.

    The result is kept on the cluster while one of its futures lives.
    """

    __slots__ = ("key", "client", "_state", "_live", "__weakref__")

    def __init__(self, key, client):
        self.key, self.client = key, client
        self._state = None  # the FutureState, as soon as the client's loop has read its inbox
        self._live = [None]  # popped once, by whoever releases it: list.pop is atomic

    @property
    def status(self):
        """ "pending", "finished", "error" or "cancelled"."""
        if self._state is None:
            self.client._in_loop(self.client._catch_up())
        return self._state.status

    def done(self):
        """Whether it is finished, erred or cancelled."""
        return self.status != "pending"

    def _get(self, read, timeout, value=False):
        return self.client._wait_for([self], lambda: read(self._state), timeout, value)

    def result(self, timeout=None):
        """Wait for the result; raise the task's own exception if it failed.

        ``timeout`` is in seconds, or a string like "10 ms".  Raises TimeoutError, and
        CancelledError if there will be no result.
        """
        return self._get(outcome, timeout, value=True)

    def exception(self, timeout=None):
        """Wait; return the exception that the task raised, None if there was none."""
        return self._get(failure, timeout)

    def traceback(self, timeout=None):
        """Wait; return the traceback of ``exception()``: its frames name the worker's code."""
        return self._get(lambda state: getattr(failure(state), "__traceback__", None), timeout)

    def release(self):
        """Let the result go, as if this object were deleted.  Twice is harmless."""
        with contextlib.suppress(IndexError):
            self._live.pop()
            self.client._post(lambda: self.client.state.stimulus_release(self._state))

    def __del__(self):
        # No lock, no I/O: the collector may call this anywhere.  After a fork the parent's
        # futures are none of the child's business.
        try:
            if self._state is not None and self.client._pid == os.getpid():
                self._live.pop()
                self.client._post(self.client.state.stimulus_release, self._state)
        except Exception:
            pass  # Released before, or the interpreter is going down.

    def __await__(self):
        return self.result().__await__()

    def __reduce__(self):
        if CONTEXT.collected is None:
            # dask: a Future may be pickled anywhere; it binds itself to its worker's client later.
            text = "a Future can be pickled only inside the arguments of submit or map"
            raise TypeError(f"{text}: pass {self.key!r} as an argument, or gather it first")
        CONTEXT.collected[self] = None
        return resolve, (self.key,)

    def __repr__(self):
        status = self._state.status if self._state else "pending"
        kind = f" type: {self._state.type}," if status == "finished" else ""
        return f"<Future: {status},{kind} key: {self.key}>"


def settled(state, value=False):
    """Whether nothing more will come for it (``value``: and its value is here)."""
    return bool(state.value) if value and state.status == "finished" else state.status != "pending"


def failed(state, *_):
    return state.status in ("error", "cancelled") and not state.value


def outcome(state):
    """What a settled state has come to: its value, or an exception raised."""
    if state.value:
        try:
            return loads(state.value)
        except Exception as error:
            raise RuntimeError(f"the result of {state.key!r} cannot be unpickled here") from error
    error = failure(state)
    try:
        raise error
    finally:
        del error  # An exception refers to the frames that it passed: break the cycle.


def failure(state):
    """The exception of a state that erred or was cancelled (then raised), else None."""
    if state.status == "cancelled":
        raise CancelledError(f"{state.key!r}: {state.text}")
    if state.status != "error":
        return None
    return unpack_exception(state.exception) if state.exception else ConnectionError(state.text)


def seconds(timeout):
    """A timeout in seconds: None, a number, or a string like "10 ms", "0.5s", "2 minutes"."""
    if timeout is None or (isinstance(timeout, (int, float)) and not isinstance(timeout, bool)):
        return timeout
    units = {"us": 1e-6, "ms": 1e-3, "s": 1, "": 1, "second": 1, "m": 60, "minute": 60, "h": 3600}
    match = re.fullmatch(r"\s*([\d.]+)\s*(us|ms|s|m|h|second|minute|)s?\s*", str(timeout))
    if not match:
        raise ValueError(f"timeout={timeout!r} is no time: use seconds, or a string like '10 ms'")
    return float(match[1]) * units[match[2]]


class Client(Body):
    """Submits calls to a cluster.

    ``address`` is the scheduler's ("HOST:PORT"), tried again for ``timeout`` seconds.  As a
    context manager it closes itself.  With ``asynchronous=True`` it lives in the running event
    loop: use ``async with`` (or ``await`` it); methods that wait return awaitables, and futures
    can be awaited.  Otherwise its own loop runs in a thread, so that it works in notebooks.
    Raises OSError if no scheduler is there, PermissionError if it refuses us.
    """

    role = "client"

    def __init__(self, address=None, *, timeout=10, asynchronous=False, name=None):
        if address is None:
            raise TypeError("Client needs the scheduler's address, like Client('127.0.0.1:8786')")
        super().__init__(ClientMind())
        split_address(address)
        self.asynchronous, self.name = asynchronous, name
        self._address, self._timeout = address, seconds(timeout)
        self._inbox = deque()  # (function, *arguments), to be called in the loop
        self._waking = False
        self._watchers = {}  # {FutureState: [called when it changes]}
        self._scheduler = None  # the Connection
        # The exception type and words that new calls get, before it is connected and at its end.
        self._refusal = (RuntimeError, "this client is not connected: await it first")
        self._pid = os.getpid()
        if not asynchronous:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
            try:
                asyncio.run_coroutine_threadsafe(self.__aenter__(), self._loop).result()
            except BaseException:
                self._stop_loop()
                raise

    # Life.

    async def __aenter__(self):
        if self._scheduler is None:
            self._loop, self._loop_thread = asyncio.get_running_loop(), threading.get_ident()
            self._scheduler = await reach_scheduler(self._address, self.role, self._timeout)
            self.id = f"{self.name or 'client'}-{unique()[:8]}"
            self._scheduler.send({"op": "register-client", "id": self.id, "wants": []})
            _, *batch = await self._scheduler.receive()
            self._refusal, self.links[SCHEDULER] = None, self._scheduler
            self.start(self._listen(batch))
        return self

    def __await__(self):
        return self.__aenter__().__await__()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self, timeout=None):
        """Let go of everything.  Pending futures are cancelled; twice is harmless."""
        if self.asynchronous:
            return self._close()
        if self._loop.is_running():
            self._in_loop(self._close(), seconds(timeout))
            self._stop_loop()

    async def _close(self):
        if self._scheduler is not None:
            await self._catch_up()
            self._end(RuntimeError, "this client is closed")
            await self.stop()
            await self._scheduler.close()

    def _stop_loop(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self, batch):
        """The scheduler's stream, until it ends."""
        await self.follow(SCHEDULER, self._scheduler, batch)
        self._end(ConnectionError, f"the scheduler at {self._address} is gone")

    def _end(self, kind, text):
        self._refusal = (kind, text)
        self.state.stimulus_scheduler_left(text)
        self.flush()

    def take(self, peer, op, fields):
        if op == "warning":
            logger.warning("%s", fields["text"])
        else:
            super().take(peer, op, fields)

    def flush(self):
        """Send what the mind has in its outbox; wake who waits for what it has news of."""
        super().flush()
        news, self.state.news = self.state.news, []
        for state in news:
            for watcher in list(self._watchers.get(state, ())):
                watcher(state)

    # The inbox.

    def _post(self, *entry):
        self._inbox.append(entry)
        if not self._waking:
            self._waking = True
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody cares.
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self):
        """Act on what was posted, a bounded number of entries in one turn of the loop."""
        self._waking = False
        for _ in range(min(len(self._inbox), LIMITS["batch_messages"])):
            function, *arguments = self._inbox.popleft()
            function(*arguments)
        if self._inbox:
            self._waking = True
            self._loop.call_soon(self._drain)
        self.flush()

    async def _catch_up(self):
        """Go on when all that was posted before has been acted on."""
        while self._inbox:
            self._drain()

    # Calls that wait.

    def _in_loop(self, coroutine, timeout=None):
        """Run in the loop of a synchronous client, and wait for it here."""
        if threading.get_ident() == self._loop_thread:
            coroutine.close()
            raise RuntimeError("a synchronous client's own loop cannot wait for it: deadlock")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def _wait_for(self, futures, finish, timeout=None, value=False, enough=lambda state, left: 0):
        """Wait until futures are settled (``value``: and are here), or until
        ``enough(state, those that are left)``; then call ``finish()``.

        It is called in the caller's thread, so that errors show little but the caller's frames.
        """
        timeout = seconds(timeout)
        if self.asynchronous:

            async def wait_then_finish():
                await self._settle(futures, timeout, value, enough)
                return finish()

            return wait_then_finish()
        # Without a trip to the loop if nothing is to be waited for.
        if not all(future._state and settled(future._state, value) for future in futures):
            self._in_loop(self._settle(futures, timeout, value, enough))
        return finish()

    async def _settle(self, futures, timeout, value, enough):
        await self._catch_up()
        states = {future._state: None for future in futures}
        left = {state: None for state in states if not settled(state, value)}
        ready = self._loop.create_future()

        def changed(state):
            if state in left and settled(state, value):
                del left[state]
                if (not left or enough(state, left)) and not ready.done():
                    ready.set_result(None)

        if not left or any(enough(state, left) for state in states if state not in left):
            return
        watched = list(left)
        for state in watched:
            self._watchers.setdefault(state, []).append(changed)
        if value:
            self.state.stimulus_ask(watched)
            self.flush()
        try:
            async with asyncio.timeout(timeout):
                await ready
        except TimeoutError:
            text = f"{len(left)} of {len(states)} futures are not done after {timeout} s"
            raise TimeoutError(text) from None
        finally:
            for state in watched:
                self._watchers[state].remove(changed)
                if not self._watchers[state]:
                    del self._watchers[state]

    # The calls of the API.

    def submit(self, func, *args, key=None, pure=True, priority=0, **kwargs):
        """[1] Call ``func(*args, **kwargs)`` on the cluster; return a Future at once.

        Futures at any depth of the arguments become their values.  ``pure`` calls that are equal
        share a key, and run once while a future of theirs lives; ``key`` names the task instead.
        Of two tasks that can run, the one of higher ``priority`` goes first.
        Raises TypeError for what cannot be pickled.
        """
        self._check(func, kwargs, priority)
        key = check_key(key) if key is not None else None
        return self._submit(dump_function(func), args, kwargs, key, pure, priority)

    def map(self, func, *iterables, key=None, pure=True, priority=0, **kwargs):
        """Submit ``func`` for each tuple of items; return a list of Futures.

        It stops at the shortest iterable.  ``key`` is a prefix, or a list with a key for each;
        ``kwargs`` go to every call.
        """
        self._check(func, kwargs, priority)
        if not iterables or any(isinstance(iterable, Future) for iterable in iterables):
            raise TypeError("map needs iterables to go over; gather a Future first")
        function = dump_function(func)
        calls = list(zip(*iterables, strict=False))
        if key is None:
            keys = [None] * len(calls)
        elif isinstance(key, list):
            keys = [check_key(k) for k in key]
        elif type(check_key(key)) is str:
            keys = [f"{key}-{i}" for i in range(len(calls))]
        else:
            keys = [(*key, i) for i in range(len(calls))]
        if len(keys) != len(calls):
            raise ValueError(f"map got {len(keys)} keys for {len(calls)} calls")
        return [
            self._submit(function, args, kwargs, key, pure, priority)
            for args, key in zip(calls, keys, strict=True)
        ]

    def _check(self, func, kwargs, priority):
        """What both ``submit`` and ``map`` refuse."""
        if self._refusal:
            raise self._refusal[0](self._refusal[1])
        if self._pid != os.getpid():
            raise RuntimeError("this client belongs to the parent process: make one of your own")
        if not callable(func):
            raise TypeError(f"the first argument must be callable, {func!r:.80} is not")
        if type(priority) is not int:
            raise TypeError(f"priority={priority!r} is no whole number")
        for option in RESERVED:
            if option in kwargs:
                raise TypeError(f"the option {option}= is not built yet")

    def _submit(self, function, args, kwargs, key, pure, priority):
        run_spec, futures = dump_call(function, args, kwargs)
        self._check_own(futures)
        if not all(future._live for future in futures):
            raise ValueError("a future among the arguments was released")
        if sum(map(len, run_spec)) > LIMITS["argument_bytes"]:
            text = "a call of more than 10 MB travels through the scheduler"
            warnings.warn(f"{text}: scatter large arguments first", stacklevel=3)
        name = name_of(function[1])
        if key is None:
            key = pure_key(name, run_spec) if pure else f"{name}-{unique()}"
        future = Future(key, self)
        self._post(self._begin, future, name, run_spec, futures, priority)
        if self.asynchronous and threading.get_ident() == self._loop_thread:
            self._drain()
        return future

    def _begin(self, future, name, run_spec, futures, priority):
        inputs = [input._state for input in futures]
        future._state = self.state.stimulus_submit(future.key, name, run_spec, inputs, priority)
        if self._refusal:  # The scheduler was lost after the call.
            self.state.stimulus_scheduler_left(self._refusal[1])

    def _check_own(self, futures):
        for future in futures:
            if future.client is not self:
                raise ValueError(f"{future!r} belongs to another client")

    def gather(self, futures, errors="raise"):
        """The results of futures in nested lists, tuples, sets and dicts, in the same shape.

        ``errors="raise"`` raises the first exception; ``errors="skip"`` leaves out failed ones.
        """
        # dask: gathers by way of the scheduler unless direct=True; here always from the workers.
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors={errors!r} is neither 'raise' nor 'skip'")
        if hasattr(futures, "__next__"):
            futures = list(futures)
        leaves = list(leaves_of(futures))
        self._check_own(leaves)
        if self._refusal and not all(f._state and f._state.final for f in leaves):
            raise self._refusal[0](self._refusal[1])

        def finish():
            for future in leaves if errors == "raise" else ():
                if failed(future._state):
                    outcome(future._state)
            return rebuild(futures)

        if errors == "raise":
            return self._wait_for(leaves, finish, value=True, enough=failed)
        return self._wait_for(leaves, finish, value=True)

    def __repr__(self):
        return f"<Client: {self._refusal[1] if self._refusal else self._address}>"


def leaves_of(obj):
    """The futures in nested containers."""
    if isinstance(obj, Future):
        yield obj
    elif isinstance(obj, (list, tuple, set, frozenset, dict)):
        for item in obj.values() if isinstance(obj, dict) else obj:
            yield from leaves_of(item)


def rebuild(obj):
    """Nested containers with values in the place of futures; those that failed are left out."""

    def keep(item):
        return not (isinstance(item, Future) and failed(item._state))

    if isinstance(obj, Future):
        return outcome(obj._state) if keep(obj) else None
    if isinstance(obj, dict):
        return {key: rebuild(value) for key, value in obj.items() if keep(value)}
    if isinstance(obj, (list, tuple, set, frozenset)):
        items = [rebuild(item) for item in obj if keep(item)]
        return type(obj)(*items) if hasattr(obj, "_fields") else type(obj)(items)
    return obj


def wait(fs, timeout=None, return_when=ALL_COMPLETED):
    """Wait for futures: ``(done, not_done)``, two sets.

    ``return_when`` is ALL_COMPLETED, FIRST_COMPLETED or (beyond dask) FIRST_EXCEPTION.
    Raises TimeoutError after ``timeout``, CancelledError if one of them was cancelled; errors of
    tasks are not raised.
    """
    if timeout is not None and not isinstance(timeout, (int, float, str)):
        raise TypeError("wait takes one collection of futures: wait([x, y]), not wait(x, y)")
    # dask: FIRST_EXCEPTION is not implemented there.
    enough = {
        ALL_COMPLETED: lambda state, left: False,
        FIRST_COMPLETED: lambda state, left: True,
        FIRST_EXCEPTION: failed,
    }
    if return_when not in enough:
        raise ValueError(f"return_when={return_when!r} is unknown")
    futures = list(leaves_of(fs))
    if not futures:
        raise ValueError("wait needs at least one future")

    def finish():
        done = {future for future in futures if settled(future._state)}
        for future in done:
            if future._state.status == "cancelled":
                failure(future._state)
        return DoneAndNotDoneFutures(done, set(futures) - done)

    return futures[0].client._wait_for(futures, finish, timeout, enough=enough[return_when])


# ---- 12. Command line ----

DEFAULT_PORT = 8786


def parse(argv):
    parser = argparse.ArgumentParser(prog="minidist", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scheduler = commands.add_parser("scheduler", help="start a scheduler")
    scheduler.set_defaults(run=run_scheduler)
    text = "address to listen on (127.0.0.1); 0.0.0.0: all that this machine has"
    scheduler.add_argument("--host", default="127.0.0.1", help=text)
    text = f"port to listen on ({DEFAULT_PORT}, or the next that is free); 0: any that is free"
    scheduler.add_argument("--port", type=int, help=text)
    worker = commands.add_parser("worker", help="start a worker")
    worker.set_defaults(run=run_worker)
    worker.add_argument("address", metavar="IP:PORT", help="the scheduler's address")
    cores = os.cpu_count() or 1
    text = f"tasks run at a time ({cores}: one for each core)"
    worker.add_argument("--nthreads", type=int, default=cores, help=text)
    worker.add_argument("--name", help="the worker's name in the cluster (its address)")
    options = parser.parse_args(argv)
    if options.command == "worker" and options.nthreads < 1:
        parser.error("--nthreads must be at least 1")
    return options


def main(argv=None):
    """The command line: ``minidist scheduler`` and ``minidist worker IP:PORT``."""
    options = parse(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # Modules beside the user are importable.
    # Few of our objects are in cycles, and there are many of them: looking for cycles less often
    # saves a quarter of a busy scheduler's time.
    gc.set_threshold(100_000, 50, 50)
    try:
        asyncio.run(until_stopped(options.run(options)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        pass  # SIGINT and SIGTERM: leave at once, and in order.
    except (OSError, ValueError) as error:
        print(f"minidist {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


async def until_stopped(coroutine):
    """Run a coroutine; SIGTERM cancels it, as asyncio lets SIGINT do."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    await coroutine


async def run_scheduler(options):
    ports = [options.port]
    if options.port is None:
        ports = range(DEFAULT_PORT, DEFAULT_PORT + 100)
    for port in ports:
        try:
            scheduler = await Scheduler(options.host, port).__aenter__()
            break
        except OSError:
            if port == ports[-1]:
                raise
            logger.warning("Port %s is in use; trying the next", port)
    print(f"Scheduler at {scheduler.address}", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await scheduler.close()


async def run_worker(options):
    async with Worker(options.address, options.nthreads, options.name, timeout=None) as worker:
        print(f"Worker {worker.name} at {worker.address}", flush=True)
        await worker.finished
    raise ConnectionError(f"the scheduler at {options.address} is gone")


if __name__ == "__main__":
    # The classes of this file exist once, as minidist's, also when it is run as a script.
    import minidist

    sys.exit(minidist.main())
