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

    1. Client.submit                                pickles the call and names it
    2. ClientMind.stimulus_submit                   numbers a new want, and tells the scheduler
    3. Connection.send                              batches messages until the loop's turn ends
    4. Scheduler.serve                              checks the message, calls what its op names
    5. SchedulerMind.stimulus_submit                a task: released, waiting, then queued
    6. SchedulerMind.transition_queued_processing   a worker has room: a numbered attempt is sent
    7. WorkerMind.stimulus_compute_task             the inputs are fetched from other workers
    8. WorkerMind.stimulus_take                     a free thread takes the next ready attempt
    9. Worker.run_task                              unpickles the call and runs it
    10. WorkerMind.stimulus_finished                holds the value, tells the scheduler
    11. SchedulerMind.stimulus_task_finished        wakes dependents, tells the clients
    12. ClientMind.stimulus_key_in_memory           the future is finished
"""

import argparse
import asyncio
import collections
import collections.abc
import concurrent.futures
import contextlib
import functools
import gc
import hashlib
import heapq
import hmac
import json
import logging
import os
import pickle
import queue
import re
import signal
import socket
import struct
import sys
import threading
import time
import types
import uuid
import warnings
from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import islice

import cloudpickle

# ============ Part one, what it decides: no I/O, no clock, no randomness, no callbacks ============

# ---- 1. Vocabulary: LIMITS, MESSAGES, check_message, Queue, Mind ----
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
    "request_bytes": 64 << 20,  # values asked of one holder in one request
    "holders": 8,  # replicas named to whoever fetches, or weighed when a worker is chosen
    "known_durations": 10_000,  # function names whose duration the scheduler remembers
    "story": 10_000,  # transitions that a mind remembers
    "argument_bytes": 10_000_000,  # larger arguments of one call get a warning
    "stall_seconds": 30,  # a peer that takes no byte for so long ...
    "outbox_bytes": 256 << 20,  # ... while more than this waits for it, is dropped
}

MESSAGES = {  # {op: "sender > receiver, field:kind, ..."}; the kinds are defined in KINDS below
    # A client and the scheduler: one ordered stream.
    "register-client": "client > scheduler, id:str wants:names",
    "submit": "client > scheduler, key:key want:int name:str run_spec:frames inputs:names priority:int",
    "release-keys": "client > scheduler, wants:names",
    "fetch-missed": "client > scheduler, key:key want:int attempt:int holders:strs",
    "key-in-memory": "scheduler > client, key:key want:int attempt:int nbytes:int type:str holders:strs value:frames",
    "key-lost": "scheduler > client, key:key want:int",
    "key-erred": "scheduler > client, key:key want:int exception:frames text:str",
    "key-cancelled": "scheduler > client, key:key want:int text:str",
    "warning": "scheduler > client, text:str",
    # A worker and the scheduler: one ordered stream.
    "register-worker": "worker > scheduler, id:str name:str nthreads:int values:names attempts:ints",
    "compute-task": "scheduler > worker, key:key attempt:int name:str run_spec:frames inputs:inputs priority:ints wanted:bool",
    "task-finished": "worker > scheduler, attempt:int nbytes:int type:str duration_us:int value:frames",
    "task-erred": "worker > scheduler, attempt:int exception:frames",
    "task-returned": "worker > scheduler, attempt:int misses:misses",
    "add-keys": "worker > scheduler, values:names",
    "free-keys": "scheduler > worker, values:names",
    # The scheduler to either.
    "registered": "scheduler > client|worker,",
    "refused": "scheduler > client|worker, text:str",
    "worker-left": "scheduler > client|worker, worker:str",
    # A data connection, to any worker.
    "get-data": "client|worker > holder, values:names",
    "data": "holder > client|worker, key:key attempt:int status:str value:frames",
    # A worker's mind to its own body: never on a wire.
    "ready": "mind > body,",
    "drop": "mind > body, values:names",
}


class ProtocolError(Exception):
    """A peer sent what no peer of this version sends; its connection is closed."""


def to_key(value, frames=()):
    """A key as the minds know it: JSON has no tuples, so a tuple travelled as a list."""
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise TypeError(f"{value!r:.80} is no key")
    return tuple([part if type(part) in (str, int, float) else to_key(part) for part in value])


def to_names(value, frames=()):
    """Rows of [key, number] as a list of tuples: values by attempt, or tasks by want."""
    return [(to_key(key), exactly(int, number)) for key, number in value]


def exactly(kind, value):
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value


def to_frames(value, frames):
    """Places in the batch's table of frames, as the frames."""
    return tuple([frames[exactly(int, place)] for place in value if place >= 0])


def list_of(kind):
    return lambda value, frames: [exactly(kind, item) for item in value]


def rows(*kinds):
    """Lists of equal shape as tuples; a list among the parts is one of strings."""

    def convert(value, frames):
        return [
            tuple(part(kind, item) for kind, item in zip(kinds, row, strict=True)) for row in value
        ]

    def part(kind, item):
        if kind is list:
            return [exactly(str, holder) for holder in item]
        return kind(item) if kind is to_key else exactly(kind, item)

    return convert


KINDS = {  # {kind: (types in JSON, how its parts are checked and converted)}
    "int": ((int,), None),
    "str": ((str,), None),
    "bool": ((bool,), None),
    "key": ((str, list), to_key),
    "frames": ((list,), to_frames),
    "names": ((list,), to_names),
    "ints": ((list,), list_of(int)),
    "strs": ((list,), list_of(str)),
    "inputs": ((list,), rows(to_key, int, int, list)),  # [(key, attempt, nbytes, holders)]
    "misses": ((list,), rows(to_key, int, list)),  # [(key, attempt, holders)]
}


class Op:
    """One line of MESSAGES, made ready to check messages quickly."""

    def __init__(self, line):
        route, _, fields = line.partition(",")
        self.senders = set(route.partition(" > ")[0].split("|"))
        self.fields = dict(field.split(":") for field in fields.split())
        self.names = ("op", *self.fields)
        self.conversions = [(f, KINDS[k][1]) for f, k in self.fields.items() if KINDS[k][1]]
        # Shapes that were found good: a message's field names and types, compared in one go.
        # There are few, since each field has one type or two.
        self.shapes = set()

    def learn(self, message, shape):
        """Check names and types one by one, and remember a good shape."""
        if tuple(message) != self.names:
            raise ProtocolError(f"{message['op']} has the fields {list(message)!r:.200}")
        for field, kind in self.fields.items():
            if type(message[field]) not in KINDS[kind][0]:
                raise ProtocolError(
                    f"{message['op']}: {field} is {message[field]!r:.80}, no {kind}"
                )
        self.shapes.add(shape)


OPS = {op: Op(line) for op, line in MESSAGES.items()}


def check_message(message, frames, sender):
    """Check a message against MESSAGES before anything else, and give its fields their types.

    ``sender`` is the kind of peer that it came from.  A ``ProtocolError`` says what is wrong.
    """
    try:
        op = OPS[message["op"]]
        if sender not in op.senders:
            raise ProtocolError(f"a {sender} does not send {message['op']}")
        shape = (*message, *map(type, message.values()))
        if shape not in op.shapes:
            op.learn(message, shape)
        for field, convert in op.conversions:
            message[field] = convert(message[field], frames)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message: {message!r:.200} ({error})") from error
    return message


class Queue:
    """What waits, by priority; the smallest first.

    A heap from which anything may be taken: what was taken out stays in the heap as a dead entry
    until it surfaces, or until the dead are the majority and the heap is built anew.
    """

    __slots__ = ("heap", "live", "serial")

    def __init__(self):
        self.heap = []  # [(priority, serial, item)]
        self.live = {}  # {item: serial of its entry}
        self.serial = 0

    def __len__(self):
        return len(self.live)

    def __iter__(self):
        return iter(self.live)

    def push(self, item):
        self.serial += 1
        self.live[item] = self.serial
        heapq.heappush(self.heap, (item.priority, self.serial, item))

    def discard(self, item):
        self.live.pop(item, None)
        if len(self.heap) > 2 * len(self.live) + 16:
            self.heap = [entry for entry in self.heap if self.live.get(entry[2]) == entry[1]]
            heapq.heapify(self.heap)

    def peek(self):
        """The item that is next, or None."""
        while self.heap:
            _, serial, item = self.heap[0]
            if self.live.get(item) == serial:
                return item
            heapq.heappop(self.heap)
        return None


class Mind:
    """What the three minds have in common: an outbox, and a loop that is *level-triggered*.

    A stimulus changes facts (somebody wants a task, a worker is gone) and marks the records
    concerned.  ``settle`` then asks of each marked record what it should be now (its ``goal``) and
    lets it take the edge there, which marks neighbours, until none is marked.  Nobody carries
    recommendations from one task to the next, and walks along dependents are loops, not recursion.
    The idea to keep decisions free of I/O ("sans-IO") is that of h11 and of dask's worker state.
    """

    TRANSITIONS = {}  # {(start, finish): name of the method}: every edge there is

    def __init__(self):
        self.outbox = []  # [(peer, message)], to be sent by the body
        self.marked = {}  # an ordered set of records that may not be what they should be
        self.story = deque(maxlen=LIMITS["story"])  # (key, start, finish, attempt, worker)

    def send(self, peer, op, *values):
        """Leave a message for a peer: ``values`` are the op's fields, in the order of MESSAGES."""
        self.outbox.append((peer, dict(zip(OPS[op].names, (op, *values), strict=True))))

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
        """Take one edge.  The only place where a state is assigned."""
        start = record.state
        edge = getattr(self, self.TRANSITIONS[start, finish])
        record.state = finish
        edge(record)
        self.story.append(record.line(start))


def edges(**finishes):
    """The table of transitions: each edge ``(start, finish)`` has a method named after it."""
    pairs = [(start, finish) for start, row in finishes.items() for finish in row.split()]
    pairs = [(start.replace("_", "-"), finish) for start, finish in pairs]
    return {pair: "transition_" + "_".join(pair).replace("-", "_") for pair in pairs}


class Fetches:
    """Values on their way here: from each holder one request at a time, many keys in one.

    The client's and the worker's mind both own one.  A value is asked of one holder after the
    other until one gives it; who has failed for it is remembered, since it will be reported.
    """

    __slots__ = ("wanted", "waiting", "asked")

    def __init__(self):
        self.wanted = {}  # {(key, attempt): (nbytes, holders to try, holders that missed)}
        self.waiting = {}  # {holder: {(key, attempt): None}}: what it will be asked for next
        self.asked = {}  # {holder: [(key, attempt)]}: the one request that is under way

    def need(self, name, nbytes, holders):
        """Want a value; return whether somebody is there to be asked for it."""
        if name not in self.wanted and holders:
            self.wanted[name] = (nbytes, list(holders), [])
            self.ask_next(name)
        return name in self.wanted

    def ask_next(self, name):
        """Put the value in the queue of the next holder that may have it, if there is one."""
        _, holders, _ = self.wanted[name]
        if holders:
            self.waiting.setdefault(holders[0], {})[name] = None
        return bool(holders)

    def drop(self, name):
        """Want it no longer.  If it is asked for already, its answer will be ignored."""
        if name in self.wanted:
            _, holders, _ = self.wanted.pop(name)
            if holders and name in self.waiting.get(holders[0], ()):
                self.unqueue(holders[0], name)

    def unqueue(self, holder, name):
        del self.waiting[holder][name]
        if not self.waiting[holder]:
            del self.waiting[holder]

    def requests(self):
        """Yield (holder, values): what is to be asked for now.  Requests are bounded in bytes."""
        for holder in [holder for holder in self.waiting if holder not in self.asked]:
            names, nbytes = [], 0
            for name in list(self.waiting[holder]):
                if names and nbytes + self.wanted[name][0] > LIMITS["request_bytes"]:
                    break
                nbytes += self.wanted[name][0]
                names.append(name)
                self.unqueue(holder, name)
            self.asked[holder] = names
            yield holder, names

    def answered(self, holder, given):
        """A holder answered, or left: return (values that were wanted, [(value, misses)]).

        What was asked and is not in ``given`` is a miss.  The values returned as misses have
        no holder left to be asked; they are not wanted any more.
        """
        arrived, exhausted = [], []
        for name in self.asked.pop(holder, ()):
            if name not in self.wanted:
                continue  # It was dropped while the request was under way.
            if name in given:
                self.drop(name)
                arrived.append(name)
            elif self.wanted[name][1][0] == holder and name not in self.waiting.get(holder, ()):
                # (Otherwise it was dropped and is wanted again: another request will tell.)
                exhausted += self.missed(name)
        return arrived, exhausted

    def missed(self, name):
        """The holder that was asked does not give it: try the next, or give it up."""
        _, holders, misses = self.wanted[name]
        misses.append(holders.pop(0))
        if self.ask_next(name):
            return []
        del self.wanted[name]
        return [(name, misses)]

    def left(self, holder):
        """A holder is dead: what was expected of it is a miss.  Returns like ``answered``."""
        exhausted = []
        for name in self.waiting.pop(holder, ()):
            exhausted += self.missed(name)
        return exhausted + self.answered(holder, ())[1]

    def validate(self):
        for name, (_, holders, misses) in self.wanted.items():
            # F1. A wanted value is asked, or queued to be asked, of the first holder not yet tried.
            assert holders and not set(holders) & set(misses), name
            holder = holders[0]
            assert name in self.waiting.get(holder, ()) or name in self.asked.get(holder, ()), name
        for holder, names in self.waiting.items():
            # F2. Nothing is queued that is not wanted, and no queue is kept empty.
            assert names and all(self.wanted[name][1][0] == holder for name in names), holder


# ---- 2. Client mind: FutureState, ClientMind ----
#
# What one client wants.  It may use chapter 1.  Reference counts, releases and resubmissions are
# where systems of this kind lose futures, so they are decided here, in the order in which the
# client's threads asked for them, and not in ``Future.__del__``.

SCHEDULER = "scheduler"  # the peer, seen from clients and workers
HERE = "here"  # the peer that stands for the mind's own body


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


class ClientMind(Mind):
    """What a client wants, and what it was told of it."""

    def __init__(self):
        super().__init__()
        self.futures = {}  # {key: FutureState}: what is wanted now
        self.wants = 0  # the number of the last want
        self.fetches = Fetches()
        self.fetching = {}  # {(key, attempt): FutureState}: transpose of what fetches want
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
        gone = next((i for i in inputs if self.futures.get(i.key) is not i), None)
        if gone is not None:
            # Cancelled inputs have left the table: nothing can be computed from them.
            text = gone.text or "it is not wanted any more"
            self.become(state, "cancelled", text=f"its input {gone.key!r} was cancelled: {text}")
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
            del self.futures[state.key]
            self.drop_fetch(state)
            name = (state.key, state.want)
            if self.outbox and self.outbox[-1][1]["op"] == "release-keys":
                self.outbox[-1][1]["wants"].append(name)
            else:
                self.send(SCHEDULER, "release-keys", [name])

    def stimulus_ask(self, states):
        """Somebody waits for these values: fetch what did not come along with its notice."""
        for state in states:
            state.asked = True
            self.fetch(state)
        self.settle()

    def stimulus_key_in_memory(self, peer, key, want, attempt, nbytes, type, holders, value):
        """[12] A result exists; small ones are in the message."""
        state = self.current(key, want)
        if state is None or state.final:
            return  # Let go while the notice was under way; or computed again, but here already.
        self.drop_fetch(state)
        state.attempt, state.nbytes, state.type = attempt, nbytes, type
        state.holders, state.value = holders, value
        self.become(state, "finished")
        self.fetch(state)
        self.settle()

    def stimulus_key_lost(self, peer, key, want):
        """Every replica of a result is gone; it is being computed again."""
        state = self.current(key, want)
        if state is not None and not state.final:
            self.drop_fetch(state)
            self.become(state, "pending")

    def stimulus_key_erred(self, peer, key, want, exception, text):
        """The task failed, or will never be computed."""
        state = self.current(key, want)
        if state is not None and not state.final:
            self.drop_fetch(state)
            state.exception = exception
            self.become(state, "error", text=text)

    def stimulus_key_cancelled(self, peer, key, want, text):
        """The scheduler does not know this want any more."""
        state = self.current(key, want)
        if state is not None:
            self.drop_fetch(state)
            del self.futures[key]
            if not state.final:
                self.become(state, "cancelled", text=text)

    def stimulus_data(self, holder, answers):
        """A holder answered a request: [(key, attempt, status, frames)]."""
        given = {(key, attempt): (status, frames) for key, attempt, status, frames in answers}
        given = {name: answer for name, answer in given.items() if answer[0] != "missing"}
        arrived, exhausted = self.fetches.answered(holder, given)
        for name in arrived:
            state = self.fetching.pop(name)
            status, frames = given[name]
            if status == "ok":
                state.value = frames
                self.become(state, "finished")
            else:
                state.exception = frames
                self.become(state, "error")
        self.report(exhausted)
        self.settle()

    def stimulus_worker_left(self, peer, worker):
        """The scheduler says that a worker is dead: expect nothing from it any more."""
        for state in self.futures.values():
            if worker in state.holders:
                state.holders = [holder for holder in state.holders if holder != worker]
        self.report(self.fetches.left(worker))
        self.settle()

    def stimulus_scheduler_left(self, text):
        """The stream ended: nothing that is not here yet will come."""
        for state in list(self.futures.values()):
            self.drop_fetch(state)
            if not state.final:
                del self.futures[state.key]
                self.become(state, "cancelled", text=text)
        self.settle()

    def report(self, exhausted):
        """Tell the scheduler of values that nobody gave; it answers, or its notice is under way."""
        for name, misses in exhausted:
            state = self.fetching.pop(name)
            self.become(state, "pending")
            self.send(SCHEDULER, "fetch-missed", state.key, state.want, name[1], misses)

    def current(self, key, want):
        """The state that a message speaks of.

        None if the message is stale: while it was under way, the last future of its want was let
        go, and perhaps the key was wanted anew, under another number.
        """
        state = self.futures.get(key)
        return state if state is not None and state.want == want else None

    def fetch(self, state):
        if state.asked and state.status == "finished" and not state.value:
            name = (state.key, state.attempt)
            if name not in self.fetching:
                self.fetching[name] = state
                if not self.fetches.need(name, state.nbytes, state.holders):
                    self.report([(name, [])])

    def drop_fetch(self, state):
        name = (state.key, state.attempt)
        if self.fetching.get(name) is state:
            del self.fetching[name]
            self.fetches.drop(name)

    def become(self, state, status, text=""):
        state.status, state.text = status, text
        self.news.append(state)

    def settle(self):
        """A client has no transitions to take; only requests to send."""
        for holder, values in self.fetches.requests():
            self.send(holder, "get-data", values)

    def validate(self):
        """Assert every invariant.  Slow by design."""
        for key, state in self.futures.items():
            # C1. What is wanted has a live Future object, and is not cancelled.
            assert state.key == key and state.count > 0 and state.status != "cancelled", state
            # C2. A value belongs to a finished state, an exception to one that erred.
            assert not state.value or state.status == "finished", state
            assert not state.exception or state.status == "error", state
            # C3. What somebody waits for is on its way when it exists.
            waits = state.asked and state.status == "finished" and not state.value
            assert waits == (self.fetching.get((key, state.attempt)) is state), state
        # C4. What is fetched is wanted, in both directions.
        assert set(self.fetching) == set(self.fetches.wanted)
        for name, state in self.fetching.items():
            assert name == (state.key, state.attempt) and self.futures[state.key] is state, state
        assert len({state.want for state in self.futures.values()}) == len(self.futures)
        self.fetches.validate()


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
    queued_on: "WorkerState | None" = None  # None: in the queue common to all
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

    def line(self, start):
        worker = self.processing_on.id if self.processing_on else ""
        return (self.key, start, self.state, self.attempt, worker)


@dataclass(eq=False, slots=True)
class WorkerState:
    """What the scheduler believes about one worker process."""

    id: str  # address and process: what comes back at an address is another worker
    name: str
    nthreads: int
    # Attempts sent and not ended, abandoned ones too: they occupy its threads all the same.
    processing: dict  # {attempt: (TaskState, duration_us)}
    has_what: dict  # an ordered set of TaskStates; transpose: TaskState.who_has
    queue: Queue  # what waits for this very worker
    nbytes: int = 0  # sum over has_what
    occupancy: int = 0  # microseconds of work, sent or queued
    short_us: int = 0  # of it: sent, and known to be short
    long: int = 0  # how many attempts are not known to be short
    load: int = 0  # which of SchedulerMind.by_load it stands in

    def __repr__(self):
        return f"<WorkerState {self.id}>"


@dataclass(eq=False, slots=True)
class ClientState:
    """What the scheduler believes about one client."""

    id: str
    wants_what: dict  # {TaskState: the number of the want}; transpose: TaskState.who_wants


EMPTY, FREE, ROOM, FULL = range(4)  # how loaded a worker is


class SchedulerMind(Mind):
    """Decides what runs where.  ``first_attempt`` must grow from one scheduler's life to the next."""

    TRANSITIONS = edges(
        released="waiting forgotten",
        waiting="queued no-worker erred released",
        queued="processing waiting no-worker released",
        no_worker="queued waiting released",
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
        self.freed = {}  # {worker id: [(key, attempt)]}: told at the end of the stimulus
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
        dependencies = [self.tasks.get(key) for key, _ in inputs]
        for (input_key, number), ts in zip(inputs, dependencies, strict=True):
            if ts is None or cs.wants_what.get(ts) != number:
                # On one ordered stream that want can only have been cancelled or lost.  What
                # bears the key now may be another call of another client.
                text = f"its input {input_key!r} was cancelled"
                self.send(client, "key-cancelled", key, want, text)
                return
        ts = self.tasks.get(key)
        if ts is None:
            ts = self.new_task(key, name, run_spec, dependencies, priority)
        elif ts.run_spec != run_spec:
            text = f"the key {key!r} is known with another call: that one's result is used"
            self.send(client, "warning", text)
        cs.wants_what[ts] = want
        ts.who_wants = ts.who_wants or {}
        ts.who_wants[cs] = None
        if ts.state in ("memory", "erred"):
            self.tell(cs, ts)
        self.mark(ts)
        self.settle()

    def stimulus_release_keys(self, client, wants):
        """A client has no future of these keys any more."""
        cs = self.clients[client]
        for key, want in wants:
            ts = self.tasks.get(key)
            # Another number: this want was cancelled before its release came, and the client
            # has since made another.
            if ts is not None and cs.wants_what.get(ts) == want:
                self.let_go(cs, ts)
        self.settle()

    def stimulus_client_left(self, client):
        """A client's connection is lost: it wants nothing any more."""
        cs = self.clients.pop(client, None)
        if cs is None:
            return  # It was lost before it had registered.
        for ts in list(cs.wants_what):
            self.let_go(cs, ts)
        self.settle()

    def stimulus_fetch_missed(self, client, key, want, attempt, holders):
        """A client could not get a value from any of its holders."""
        cs = self.clients[client]
        ts = self.tasks.get(key)
        if ts is None or cs.wants_what.get(ts) != want or ts.attempt != attempt:
            return  # Let go meanwhile; or lost or made again, and that notice is under way.
        if ts.state == "memory":
            self.strike(ts, holders)
            if ts.who_has:
                self.tell(cs, ts)
        self.settle()

    # Stimuli: workers.

    def stimulus_register_worker(self, worker, name, nthreads, values, attempts):
        """A worker joins; it holds and runs nothing yet."""
        if any(ws.name == name for ws in self.workers.values()):
            text = f"a worker named {name!r} is there already"
            self.send(worker, "refused", text)
            return
        ws = WorkerState(worker, name, nthreads, processing={}, has_what={}, queue=Queue())
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
        self.changed.pop(ws, None)
        for peer in (*self.workers, *self.clients):
            self.send(peer, "worker-left", worker)
        for attempt, (ts, _) in ws.processing.items():
            if ts.attempt == attempt:
                self.end_processing(ts)
        for ts in list(ws.has_what):
            self.remove_replica(ts, ws)
        for ts in ws.queue:
            ts.queued_on = ts.queue = None
            self.mark(ts)
        if not self.workers:
            for ts in self.queue:
                self.mark(ts)
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
            self.free(ws, (ts.key, attempt))
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
            ts.misses += 1
            if ts.misses > ALLOWED_FAILURES:
                key, _, holders = misses[0]
                ts.text = f"{worker} could not fetch {key!r} from {', '.join(holders)}"
        self.settle()

    def stimulus_add_keys(self, worker, values):
        """A worker says that it has fetched copies of values."""
        ws = self.workers[worker]
        for key, attempt in values:
            ts = self.tasks.get(key)
            if ts is not None and ts.state == "memory" and ts.attempt == attempt:
                self.add_replica(ts, ws)
            else:
                self.free(ws, (key, attempt))  # Let go or lost while the copy was made.
        self.settle()

    # What a task should be.

    def goal(self, ts):
        """What ``ts`` should be, given who wants it and what its neighbours are."""
        if not (ts.who_wants or ts.waiters):
            gone = ts.state in ("released", "forgotten") and not ts.dependents
            return "forgotten" if gone else "released"
        if ts.exception or ts.text:
            return "waiting" if ts.state in ("queued", "no-worker") else "erred"
        if ts.who_has:
            return "memory"
        if ts.processing_on:
            return "processing"  # Only the end of its attempt changes that.
        if ts.state not in ("waiting", "queued", "no-worker") or ts.waiting_on:
            return "waiting"
        if not self.workers:
            return "no-worker"
        # A queue that is gone, with its worker, sends its tasks back to be placed again.
        return "waiting" if ts.state == "queued" and ts.queue is None else "queued"

    def settle(self):
        """Take the edges; then send what waits for as long as there is room; then free."""
        super().settle()
        self.fill()
        for worker, values in self.freed.items():
            self.send(worker, "free-keys", values)
        self.freed.clear()

    def size(self):
        return len(self.tasks)

    def fill(self):
        """Send queued tasks to workers with room, in the order of their priorities."""
        while self.changed:
            ws, _ = self.changed.popitem()
            while (ts := ws.queue.peek()) and self.has_room(ws, ts):
                common = self.queue.peek()
                if common and common.priority < ts.priority and self.has_room(ws, common):
                    ts = common
                self.process(ts, ws)
        while ts := self.queue.peek():
            ws = self.least_loaded(ROOM if self.estimate(ts) <= ROOM_US else FREE)
            if ws is None:
                break
            self.process(ts, ws)
        self.changed.clear()  # What was sent from the common queue left less room, not more.

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

    # Transitions: the edges' actions.  The state has changed already.

    def transition_released_waiting(self, ts):
        """Somebody wants ``ts``: it needs its dependencies, which may have to be made again."""
        ts.waiting_on = {}
        for dependency in ts.dependencies:
            dependency.waiters = dependency.waiters or {}
            dependency.waiters[ts] = None
            if dependency.state == "erred":
                ts.exception, ts.text = dependency.exception, dependency.text
            if not dependency.who_has:
                ts.waiting_on[dependency] = None
            self.mark(dependency)

    def transition_waiting_queued(self, ts):
        """It can run: it waits for room, on the worker that holds its inputs or on any."""
        ts.queue = self.queue
        if ts.dependencies:
            ts.queued_on = ws = self.decide_worker(ts)
            ts.queue = ws.queue
            ts.estimate_us = self.estimate(ts)
            ws.occupancy += ts.estimate_us
            self.changed[ws] = None
        ts.queue.push(ts)

    def transition_waiting_no_worker(self, ts):
        self.unrunnable[ts] = None

    def transition_waiting_erred(self, ts):
        """It failed, or a dependency did and gave it its exception."""
        self.stop_needing(ts)
        ts.waiting_on = ()
        self.spread_exception(ts)

    def transition_waiting_released(self, ts):
        self.stop_needing(ts)
        ts.waiting_on = ()
        self.clear_exception(ts)

    def transition_queued_processing(self, ts):
        """[6] ``processing_on`` has room: a new attempt goes there, and the inputs' places with it."""
        self.leave_queue(ts)
        ws, ts.attempt = ts.processing_on, self.attempts
        self.attempts += 1
        duration_us = self.estimate(ts)
        ws.processing[ts.attempt] = (ts, duration_us)
        self.account(ws, duration_us, +1)
        inputs = [
            (d.key, d.attempt, d.nbytes, [w.id for w in islice(d.who_has, LIMITS["holders"])])
            for d in ts.dependencies
        ]
        self.send(
            ws.id,
            "compute-task",
            ts.key,
            ts.attempt,
            ts.name,
            ts.run_spec,
            inputs,
            ts.priority,
            bool(ts.who_wants),
        )

    def transition_queued_waiting(self, ts):
        """It lost an input, or the worker in whose queue it was."""
        self.leave_queue(ts)

    def transition_queued_no_worker(self, ts):
        self.leave_queue(ts)
        self.unrunnable[ts] = None

    def transition_queued_released(self, ts):
        self.leave_queue(ts)
        self.transition_waiting_released(ts)

    def transition_no_worker_queued(self, ts):
        del self.unrunnable[ts]
        self.transition_waiting_queued(ts)

    def transition_no_worker_waiting(self, ts):
        del self.unrunnable[ts]

    def transition_no_worker_released(self, ts):
        del self.unrunnable[ts]
        self.transition_waiting_released(ts)

    def transition_processing_memory(self, ts):
        """It has a value: wake whoever waited, tell whoever asked."""
        self.stop_needing(ts)
        ts.processing_on = None
        for dependent in ts.waiters:
            # (One that is processing had it already, and did not wait when it was lost.)
            if ts in dependent.waiting_on:
                del dependent.waiting_on[ts]
                self.mark(dependent)
        for cs in ts.who_wants:
            self.tell(cs, ts)
        ts.value = ()  # What rode along was forwarded; the scheduler keeps none.

    def transition_processing_erred(self, ts):
        ts.attempt = 0
        self.transition_waiting_erred(ts)

    def transition_processing_waiting(self, ts):
        """Its attempt ended without an answer.  Inputs may have been lost in the meantime."""
        ts.attempt = 0
        self.transition_released_waiting(ts)

    def transition_processing_released(self, ts):
        """Nobody wants it any more.  The attempt is abandoned, and runs to its end."""
        self.stop_needing(ts)
        self.clear_exception(ts)
        self.end_processing(ts)

    def transition_memory_waiting(self, ts):
        """Its last replica is gone, and it is still needed: compute it again."""
        self.lose(ts)
        self.transition_released_waiting(ts)
        for cs in ts.who_wants:
            self.send(cs.id, "key-lost", ts.key, cs.wants_what[ts])

    def transition_memory_erred(self, ts):
        """Its value was lost again and again."""
        self.lose(ts)
        self.spread_exception(ts)

    def transition_memory_released(self, ts):
        """Nobody needs the value any more: free it everywhere."""
        for ws in list(ts.who_has):
            self.free(ws, (ts.key, ts.attempt))
            self.remove_replica(ts, ws)
        ts.attempt = 0
        self.clear_exception(ts)

    def transition_erred_released(self, ts):
        self.clear_exception(ts)

    def transition_released_forgotten(self, ts):
        """Nothing that is kept might have to be computed from it."""
        for dependency in ts.dependencies:
            del dependency.dependents[ts]
            self.mark(dependency)
        del self.tasks[ts.key]

    # Leaves: each changes a few facts, in both directions of a relation, and marks.

    def new_task(self, key, name, run_spec, dependencies, priority):
        self.submitted += 1
        ts = TaskState(key, name, (-priority, self.submitted), run_spec)
        self.tasks[key] = ts
        if dependencies:
            ts.dependencies = dict.fromkeys(dependencies)
            for dependency in ts.dependencies:
                dependency.dependents = dependency.dependents or {}
                dependency.dependents[ts] = None
        return ts

    def let_go(self, cs, ts):
        del cs.wants_what[ts]
        del ts.who_wants[cs]
        self.mark(ts)

    def stop_needing(self, ts):
        """It leaves the unfinished ones: its dependencies may not be needed any more."""
        for dependency in ts.dependencies:
            del dependency.waiters[ts]
            self.mark(dependency)

    def spread_exception(self, ts):
        """It failed: so does whoever waits for it, and whoever asked is told."""
        for dependent in ts.waiters:
            # (One that is processing has fetched what was lost since, or will return and fail.)
            if dependent.state != "processing":
                dependent.exception, dependent.text = ts.exception, ts.text
                self.mark(dependent)
        for cs in ts.who_wants:
            self.tell(cs, ts)

    def clear_exception(self, ts):
        ts.exception, ts.text, ts.misses = (), "", 0

    def process(self, ts, ws):
        ts.processing_on = ws
        self.transition(ts, "processing")

    def leave_queue(self, ts):
        if ts.queue is not None:
            ts.queue.discard(ts)
        if ts.queued_on is not None:
            ts.queued_on.occupancy -= ts.estimate_us
            self.changed[ts.queued_on] = None  # There may be room for what is next.
        ts.queue, ts.queued_on, ts.estimate_us = None, None, 0

    def end_attempt(self, ws, attempt):
        """An attempt's one end.  Returns its task, and whether the attempt was not abandoned."""
        ts, duration_us = ws.processing.pop(attempt)
        self.account(ws, duration_us, -1)
        current = ts.attempt == attempt
        if current:
            ts.processing_on = None
            self.mark(ts)
        return ts, current

    def end_processing(self, ts):
        ts.processing_on, ts.attempt = None, 0
        self.mark(ts)

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
            ts.who_has = ts.who_has or {}
            ts.who_has[ws] = None
            ws.has_what[ts] = None
            ws.nbytes += ts.nbytes

    def remove_replica(self, ts, ws):
        del ts.who_has[ws]
        del ws.has_what[ts]
        ws.nbytes -= ts.nbytes
        if not ts.who_has:
            self.mark(ts)

    def lose(self, ts):
        """The value is gone: whoever waits for it and is not under way has to wait again."""
        ts.attempt = 0
        for dependent in ts.waiters:
            if dependent.state != "processing":
                dependent.waiting_on[ts] = None
                self.mark(dependent)

    def strike(self, ts, holders):
        """Somebody did not get the value from these holders: free it there, use others.

        If there is no other, it is computed again; but links can stay broken, so not for ever.
        """
        for holder in holders:
            ws = self.workers.get(holder)
            if ws is not None and ws in ts.who_has:
                self.free(ws, (ts.key, ts.attempt))
                self.remove_replica(ts, ws)
        if ts.state == "memory" and not ts.who_has:
            ts.misses += 1
            if ts.misses > ALLOWED_FAILURES:
                ts.text = f"{ts.key!r} could not be fetched from {', '.join(holders)}"

    def free(self, ws, name):
        self.freed.setdefault(ws.id, []).append(name)

    def tell(self, cs, ts):
        """Tell one client how a task of its ended."""
        if ts.state == "erred":
            self.send(cs.id, "key-erred", ts.key, cs.wants_what[ts], ts.exception, ts.text)
            return
        self.send(
            cs.id,
            "key-in-memory",
            ts.key,
            cs.wants_what[ts],
            ts.attempt,
            ts.nbytes,
            ts.type,
            [ws.id for ws in islice(ts.who_has, LIMITS["holders"])],
            ts.value,
        )

    # Invariants.

    def validate(self):
        """Assert every invariant.  Slow by design: a live process does so only when asked to."""
        assert not self.marked and not self.freed and not self.changed
        for key, ts in self.tasks.items():
            assert ts.key == key and ts.state != "forgotten", ts
            self.validate_task(ts)
            self.validate_neighbours(ts)
        for id, ws in self.workers.items():
            assert ws.id == id, ws
            self.validate_worker(ws)
        for id, cs in self.clients.items():
            # S1. who_wants and wants_what are transposes.
            assert cs.id == id, cs
            for ts in cs.wants_what:
                assert self.tasks[ts.key] is ts and cs in ts.who_wants, ts
        # S2. Every table holds what its name says, and nothing else.
        assert set(self.queue) == {ts for ts in self.tasks.values() if ts.queue is self.queue}
        assert set(self.unrunnable) == {t for t in self.tasks.values() if t.state == "no-worker"}
        assert sum(map(len, self.by_load)) == len(self.workers)
        # S3. No worker is free for what waits in the common queue.
        assert not self.queue or not (self.by_load[EMPTY] or self.by_load[FREE])

    def validate_task(self, ts):
        # T1. A field owned by a state is set in exactly that state.
        assert bool(ts.who_has) == (ts.state == "memory"), ts
        assert bool(ts.exception or ts.text) == (ts.state == "erred"), ts
        assert (ts.processing_on is not None) == (ts.state == "processing"), ts
        assert (ts.queue is not None) == (ts.state == "queued"), ts
        assert bool(ts.waiting_on) == (ts.state == "waiting"), ts
        assert bool(ts.attempt) == (ts.state in ("processing", "memory")), ts
        assert not ts.value, ts
        # T2. What nobody needs is not kept; what somebody needs is not left undone.
        assert bool(ts.who_wants or ts.waiters) == (ts.state != "released"), ts
        assert ts.state != "released" or ts.dependents, ts
        # T3. Every relation is known on both sides.
        for cs in ts.who_wants:
            assert self.clients[cs.id] is cs and ts in cs.wants_what, ts
        for ws in ts.who_has:
            assert self.workers[ws.id] is ws and ts in ws.has_what, ts
        if ts.state == "processing":
            assert self.workers[ts.processing_on.id] is ts.processing_on, ts
            assert ts.processing_on.processing[ts.attempt][0] is ts, ts
        if ts.state == "queued":
            assert ts in ts.queue.live, ts
            assert ts.queue is (ts.queued_on.queue if ts.dependencies else self.queue), ts
        # T4. no-worker means that there is none.
        assert ts.state != "no-worker" or not self.workers, ts

    def validate_neighbours(self, ts):
        unfinished = ts.state in ("waiting", "queued", "no-worker", "processing")
        for dependency in ts.dependencies:
            # T5. Links are known on both sides, and no neighbour is forgotten.
            assert self.tasks[dependency.key] is dependency and ts in dependency.dependents, ts
            # T6. A task is a waiter of its dependencies exactly while it is unfinished.
            assert (ts in dependency.waiters) == unfinished, ts
            # T7. It waits on exactly those that have no value.  (One that is processing has
            # fetched what was lost meanwhile, or will return.)
            if unfinished and ts.state != "processing":
                assert (dependency in ts.waiting_on) == (dependency.state != "memory"), ts
        for dependent in ts.dependents:
            assert self.tasks[dependent.key] is dependent and ts in dependent.dependencies, ts
        assert set(ts.waiters) <= set(ts.dependents), ts
        assert set(ts.waiting_on) <= set(ts.dependencies), ts

    def validate_worker(self, ws):
        # W1. Every counter can be recounted.
        durations = [duration_us for _, duration_us in ws.processing.values()]
        assert ws.nbytes == sum(ts.nbytes for ts in ws.has_what), ws
        assert ws.occupancy == sum(durations) + sum(ts.estimate_us for ts in ws.queue), ws
        assert ws.short_us == sum(d for d in durations if d <= ROOM_US), ws
        assert ws.long == sum(d > ROOM_US for d in durations), ws
        assert ws in self.by_load[ws.load], ws
        assert (ws.load == EMPTY) == (not ws.processing), ws
        assert (ws.load <= FREE) == (len(ws.processing) < ws.nthreads), ws
        # W2. Its tables and the tasks' agree.
        for ts in ws.has_what:
            assert self.tasks[ts.key] is ts and ws in ts.who_has, ts
        for ts in ws.queue:
            assert self.tasks[ts.key] is ts and ts.queued_on is ws, ts
        # W3. No thread is idle while something waits for it.  (Room for a further, short one may
        # go unnoticed for a while, when it is another worker that measures how short it is.)
        assert not ws.queue or ws.load > FREE, ws


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
    priority: list
    inputs: "list[tuple]"  # [(key, attempt)]: the values that it is called with
    wanted: bool  # a client waits for the result: it should ride along if it is small
    state: str = "waiting"
    # Non-empty in "waiting" only: the inputs that are not here.
    waiting_for: "dict[tuple, None] | tuple[()]" = ()
    taken: bool = False  # a thread has begun it
    # Set at the end, and then it is gone.  How an attempt ends is one of three:
    returned: bool = False
    misses: tuple = ()  # [(key, attempt, holders)]: the inputs that nobody gave
    finished: "tuple | None" = None  # nbytes, type, duration_us, value
    exception: tuple = ()

    def line(self, start):
        return (self.key, start, self.state, self.number, "")


class WorkerMind(Mind):
    """What one worker has to do, and what it holds."""

    TRANSITIONS = edges(
        waiting="ready returned erred", ready="executing returned", executing="finished erred"
    )

    def __init__(self):
        super().__init__()
        self.attempts = {}  # {number: Attempt}, until its end was told
        self.data = {}  # {(key, attempt): nbytes}: the values held; the body has the objects
        self.needed_by = {}  # {(key, attempt): ordered set of Attempts that have not started}
        self.ready = Queue()  # attempts that a thread can begin
        self.fetches = Fetches()

    def stimulus_compute_task(self, peer, key, attempt, name, run_spec, inputs, priority, wanted):
        """[7] The scheduler sends an attempt: fetch its inputs, then it is ready."""
        values = [(key, number) for key, number, _, _ in inputs]
        new = Attempt(attempt, key, name, run_spec, priority, values, wanted)
        self.attempts[attempt] = new
        new.waiting_for = {value: None for value in values if value not in self.data}
        for value in values:
            self.needed_by.setdefault(value, {})[new] = None
        for key, number, nbytes, holders in inputs:
            if (key, number) in new.waiting_for:
                if not self.fetches.need((key, number), nbytes, holders):
                    self.give_up([((key, number), [])])
        self.mark(new)
        self.settle()

    def stimulus_take(self):
        """[8] A thread is free: the Attempt that it shall run, or None."""
        attempt = self.ready.peek()
        if attempt is not None:
            attempt.taken = True
            self.mark(attempt)
            self.settle()
        return attempt

    def stimulus_finished(self, number, nbytes, type, duration_us, value):
        """[10] A thread has a result.  ``value`` are its frames, if it is to ride along."""
        attempt = self.attempts[number]
        attempt.finished = (nbytes, type, duration_us, value)
        self.mark(attempt)
        self.settle()

    def stimulus_failed(self, number, exception):
        """A thread met an exception."""
        attempt = self.attempts[number]
        attempt.exception = exception
        self.mark(attempt)
        self.settle()

    def stimulus_data(self, holder, answers):
        """A holder answered a request: [(key, attempt, status, frames)].

        The body has stored what was given already; what is not needed any more is dropped.
        """
        given = {(key, attempt): (status, frames) for key, attempt, status, frames in answers}
        given = {name: answer for name, answer in given.items() if answer[0] != "missing"}
        sizes = {
            name: self.fetches.wanted[name][0] for name in given if name in self.fetches.wanted
        }
        arrived, exhausted = self.fetches.answered(holder, given)
        here = []
        for name in arrived:
            status, frames = given[name]
            if status == "ok":
                here.append(name)
                self.data[name] = sizes[name]
            for attempt in self.needed_by.get(name, ()):
                attempt.waiting_for.pop(name, None)
                if status != "ok":
                    attempt.exception = frames  # Its holder cannot pickle it: nobody can use it.
                self.mark(attempt)
        if here:
            self.send(SCHEDULER, "add-keys", here)
        self.give_up(exhausted)
        # Nobody needs these any more: they were dropped while the request was under way.
        unneeded = [n for n, (status, _) in given.items() if status == "ok" and n not in self.data]
        if unneeded:
            self.send(HERE, "drop", unneeded)
        self.settle()

    def stimulus_free_keys(self, peer, values):
        """The scheduler says that nobody needs these values."""
        for name in values:
            del self.data[name]
            # Normal for an attempt that was abandoned, or whose input was struck: without its
            # input it goes back to be placed again.
            for attempt in self.needed_by.get(name, ()):
                attempt.returned = True
                self.mark(attempt)
        self.send(HERE, "drop", values)
        self.settle()

    def stimulus_worker_left(self, peer, worker):
        """The scheduler says that a worker is dead: expect nothing from it any more."""
        self.give_up(self.fetches.left(worker))
        self.settle()

    def give_up(self, exhausted):
        """No holder gave these values: the attempts that need them go back, and say so."""
        for name, holders in exhausted:
            for attempt in self.needed_by.get(name, ()):
                attempt.returned = True
                attempt.misses = (*attempt.misses, (*name, holders))
                self.mark(attempt)

    def goal(self, attempt):
        """What an attempt should be, given its inputs and what its thread said."""
        if attempt.finished is not None:
            return "finished"
        if attempt.exception:
            return "erred"
        if attempt.taken:
            return "executing"
        if attempt.returned:
            return "returned"
        return "waiting" if attempt.waiting_for else "ready"

    def settle(self):
        """Take the edges; then ask for what is missing."""
        super().settle()
        for holder, values in self.fetches.requests():
            self.send(holder, "get-data", values)

    def size(self):
        return len(self.attempts)

    def transition_waiting_ready(self, attempt):
        """All inputs are here."""
        attempt.waiting_for = ()
        self.ready.push(attempt)
        self.send(HERE, "ready")

    def transition_waiting_returned(self, attempt):
        self.end(attempt, "task-returned", attempt.misses)
        self.forget_inputs(attempt)

    def transition_waiting_erred(self, attempt):
        self.end(attempt, "task-erred", attempt.exception)
        self.forget_inputs(attempt)

    def transition_ready_executing(self, attempt):
        """From now on its thread holds the inputs; they may be freed here."""
        self.ready.discard(attempt)
        self.forget_inputs(attempt)

    def transition_ready_returned(self, attempt):
        self.ready.discard(attempt)
        self.transition_waiting_returned(attempt)

    def transition_executing_finished(self, attempt):
        """The value is held until the scheduler says otherwise."""
        self.data[attempt.key, attempt.number] = attempt.finished[0]
        self.end(attempt, "task-finished", *attempt.finished)

    def transition_executing_erred(self, attempt):
        self.end(attempt, "task-erred", attempt.exception)

    def end(self, attempt, op, *values):
        """An attempt ends once, by one message."""
        del self.attempts[attempt.number]
        self.send(SCHEDULER, op, attempt.number, *values)

    def forget_inputs(self, attempt):
        """It needs its inputs no longer; what only it needed is not fetched."""
        for name in dict.fromkeys(attempt.inputs):
            del self.needed_by[name][attempt]
            if not self.needed_by[name]:
                del self.needed_by[name]
                self.fetches.drop(name)

    def validate(self):
        """Assert every invariant.  Slow by design."""
        assert not self.marked
        needed = {}
        for number, attempt in self.attempts.items():
            # A1. What an attempt is follows from what it has.
            assert attempt.number == number and attempt.state == self.goal(attempt), attempt
            assert attempt.state in ("waiting", "ready", "executing"), attempt
            assert (attempt in self.ready.live) == (attempt.state == "ready"), attempt
            if attempt.state == "executing":
                continue
            # A2. It waits for exactly the inputs that are not here, and those are fetched.
            missing = {name for name in attempt.inputs if name not in self.data}
            assert set(attempt.waiting_for) == missing <= set(self.fetches.wanted), attempt
            for name in attempt.inputs:
                needed.setdefault(name, set()).add(attempt)
        # A3. needed_by is the transpose of inputs, for those that have not started.
        assert needed == {name: set(some) for name, some in self.needed_by.items()}
        # A4. Nothing is fetched that nobody needs, or that is here.
        assert set(self.fetches.wanted) <= set(self.needed_by)
        assert not set(self.fetches.wanted) & set(self.data)
        self.fetches.validate()


# ================================ Part two, how it travels ========================================

# ---- 5. Wire: pack, read_batch, Connection, handshake, connect, accept, Peers ----
#
# Nothing else in this file knows bytes.  A batch is a prefix of two integers, a JSON header
# ``[messages, sizes of frames]`` and the binary frames.  JSON, because a reader can watch it go
# by, and because parsing it can run no code.

PREFIX = struct.Struct("!IQ")  # bytes of the header, bytes of all frames
LARGE = 64 << 10  # frames from this size on are read straight into a buffer of their own
CHUNK = 1 << 20


def pack(messages):
    """One batch as buffers to be written one after the other.

    A frame stands in a message as its place in the batch's table of frames; one that several
    messages share (the function of a ``map``) is there once.
    """
    frames, places = [], {}

    def place(frame):
        number = places.setdefault(id(frame), len(frames))
        if number == len(frames):
            frames.append(memoryview(frame))
        return number

    encoder = json.JSONEncoder(default=place, separators=(",", ":"), check_circular=False)
    body = encoder.encode(messages)
    header = f"[{body},{json.dumps([frame.nbytes for frame in frames])}]".encode()
    return [PREFIX.pack(len(header), sum(f.nbytes for f in frames)), header, *frames]


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
    frames = await read_frames(reader, sizes)
    return [check_message(message, frames, sender) for message in messages]


async def read_frames(reader, sizes):
    """The frames of a batch: runs of small ones are read together, large ones one by one."""
    frames, first = [], 0
    while first < len(sizes):
        end, total = first, 0
        while end < len(sizes) and sizes[end] < LARGE and total < CHUNK:
            total += sizes[end]
            end += 1
        if end == first:
            frames.append(await read_large(reader, sizes[first]))
            end += 1
        else:
            run, start = await reader.readexactly(total), 0
            for size in sizes[first:end]:
                frames.append(run[start : start + size])  # A copy: it must not pin the run.
                start += size
        first = end
    return frames


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
    """Batches over one pair of asyncio streams, after the handshake."""

    def __init__(self, reader, writer, peer):
        self.reader, self.writer = reader, writer
        self.peer = peer  # what kind of peer is at the other end
        self.outbox = []
        self.flushing = False
        self.writing = None  # the task that writes what one turn of the loop could not
        self.loop = asyncio.get_running_loop()

    def send(self, message):
        """[3] Append to the outbox; it is flushed at the end of the current turn of the loop.

        No timer: an idle system sends at once, a busy one makes larger batches by itself.
        """
        self.outbox.append(message)
        if not self.flushing:
            self.flushing = True
            self.loop.call_soon(self.flush)

    def flush(self):
        """Write one batch; if there is more, or it is slow, go on in a task."""
        if self.writer.is_closing():
            return
        batch = self.outbox[: LIMITS["batch_messages"]]
        buffers = pack(batch)
        transport = self.writer.transport
        if sum(map(len, buffers)) < CHUNK and transport.get_write_buffer_size() < CHUNK:
            del self.outbox[: len(batch)]
            self.writer.write(b"".join(buffers))
            self.flushing = bool(self.outbox)
            if self.flushing:
                self.loop.call_soon(self.flush)
        else:
            self.writing = self.loop.create_task(self.write_slowly())

    async def write_slowly(self):
        """Write what waits, as fast as the peer takes it.  Slow is not dead, but stalled is."""
        try:
            while self.outbox:
                batch = self.outbox[: LIMITS["batch_messages"]]
                del self.outbox[: len(batch)]
                for buffer in pack(batch):
                    view = memoryview(buffer).cast("B")
                    for start in range(0, len(view), CHUNK):
                        self.writer.write(view[start : start + CHUNK])
                        await asyncio.wait_for(self.writer.drain(), LIMITS["stall_seconds"])
        except (OSError, TimeoutError):
            self.writer.transport.abort()
        self.flushing, self.writing = False, None

    async def receive(self):
        """The messages of the next batch."""
        return await read_batch(self.reader, self.peer)

    async def close(self):
        """Write what waits, then close."""
        while self.flushing and not self.writer.is_closing():
            if self.writing is None:
                await asyncio.sleep(0)  # The flush is due in this turn or the next.
            else:
                await self.writing
        self.writer.close()
        try:
            await asyncio.wait_for(self.writer.wait_closed(), 1)
        except (OSError, TimeoutError):
            self.writer.transport.abort()


# The handshake, before anything else: fixed sizes, and a time limit.  The connector says hello,
# the acceptor says hello, the connector proves that it holds the secret, and names the worker
# process that it means (ports are reused), and the acceptor proves it too.  (HMAC challenge and
# response as in Python's multiprocessing.connection, but in both directions at once.)

HELLO = struct.Struct("!8sHBBB32s")  # magic, protocol, Python's version, role, nonce
MAGIC, PROTOCOL = b"minidist", 1
ROLES = ["client", "worker", "scheduler", "holder"]
WELCOME, WRONG_SECRET, WRONG_WORKER = b"\0", b"\1", b"\2"


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
        draft = f"{path}.{uuid.uuid4().hex}"
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(uuid.uuid4().hex + uuid.uuid4().hex)
        with contextlib.suppress(FileExistsError):  # Another process was first: use its own.
            os.link(draft, path)
        os.unlink(draft)
    if os.stat(path).st_mode & 0o077:
        raise PermissionError(f"{path} can be read by others: chmod 600 {path}")
    with open(path, "rb") as file:
        return file.read()


def hello(role):
    version = sys.version_info[:2]
    return HELLO.pack(MAGIC, PROTOCOL, *version, ROLES.index(role), os.urandom(32))


def check_hello(theirs):
    """What kind of peer says hello.  Raises PermissionError if it is not like us."""
    magic, protocol, major, minor, role, _ = HELLO.unpack(theirs)
    if magic != MAGIC:
        raise PermissionError("the other end does not speak minidist")
    ours = f"protocol {PROTOCOL}, Python {sys.version_info[0]}.{sys.version_info[1]}"
    if ours != f"protocol {protocol}, Python {major}.{minor}":
        text = f"the other end has protocol {protocol}, Python {major}.{minor}, this one {ours}"
        raise PermissionError(f"{text}: they must be equal")
    return ROLES[min(role, 3)]


def prove(side, said):
    return hmac.digest(secret(), side + said, "sha256")


REFUSAL = "wrong secret: set MINIDIST_TOKEN, or copy ~/.minidist/token, so that it is the same"


async def connect(address, role, worker=""):
    """Open a Connection to ``address`` ("tcp://HOST:PORT"), and to that worker process if named.

    Raises OSError if nobody is there, PermissionError if we are refused.
    """
    host, port = split_address(address)
    try:
        async with asyncio.timeout(LIMITS["handshake_seconds"]):
            reader, writer = await asyncio.open_connection(host, port, limit=4 * CHUNK)
            try:
                peer = await introduce(reader, writer, role, worker)
            except BaseException:
                writer.transport.abort()
                raise
    except TimeoutError as error:
        raise ConnectionError(f"no answer from {address}") from error
    return Connection(reader, writer, peer)


async def introduce(reader, writer, role, worker):
    """The connector's part of the handshake."""
    try:
        mine = hello(role)
        writer.write(mine)
        theirs = await reader.readexactly(HELLO.size)
        peer = check_hello(theirs)
        meant = hashlib.sha256(worker.encode()).digest()
        said = mine + theirs + meant
        writer.write(meant + prove(b"connector", said))
        verdict = await reader.readexactly(33)
    except asyncio.IncompleteReadError as error:
        raise ConnectionError("the other end hung up in the handshake") from error
    if verdict[:1] == WRONG_WORKER:
        raise ConnectionError(f"{worker} is not there any more")
    if verdict[:1] != WELCOME or not hmac.compare_digest(verdict[1:], prove(b"acceptor", said)):
        raise PermissionError(REFUSAL)
    return peer


async def accept(reader, writer, role, worker=""):
    """The acceptor's part of the handshake: a Connection, or PermissionError."""
    async with asyncio.timeout(LIMITS["handshake_seconds"]):
        theirs = await reader.readexactly(HELLO.size)
        mine = hello(role)
        writer.write(mine)
        peer = check_hello(theirs)
        meant, proof = await reader.readexactly(32), await reader.readexactly(32)
    said = theirs + mine + meant
    if not hmac.compare_digest(proof, prove(b"connector", said)):
        writer.write(WRONG_SECRET + bytes(32))
        raise PermissionError(f"a {peer} with a {REFUSAL}")
    if meant != hashlib.sha256(worker.encode()).digest():
        writer.write(WRONG_WORKER + bytes(32))
        raise PermissionError(f"a {peer} that means another worker")
    writer.write(WELCOME + prove(b"acceptor", said))
    return Connection(reader, writer, peer)


def split_address(address):
    """("HOST", PORT) of "tcp://HOST:PORT" or "HOST:PORT"; ValueError if it is neither."""
    host, colon, port = str(address).removeprefix("tcp://").rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address: it should look like '127.0.0.1:8786'")
    return host.strip("[]"), int(port)


class Peers:
    """Data connections to holders of values: opened when first needed, one for each holder."""

    def __init__(self, role, answered):
        self.role = role
        self.answered = answered  # called with (holder, answers); none after a broken link
        self.connections = {}  # {worker id: Connection}
        self.tasks = {}  # {asyncio.Task: worker id}: requests that are under way

    def request(self, holder, values):
        """Ask a holder for values.  (A mind makes one request to a holder at a time.)"""
        task = asyncio.get_running_loop().create_task(self.get_data(holder, values))
        self.tasks[task] = holder
        task.add_done_callback(self.tasks.pop)

    async def get_data(self, holder, values):
        answers = []
        try:
            connection = self.connections.get(holder)
            if connection is None:
                connection = await connect(holder.partition("#")[0], self.role, holder)
                self.connections[holder] = connection
            connection.send({"op": "get-data", "values": values})
            while len(answers) < len(values):
                answers += [(*m.values(),)[1:] for m in await connection.receive()]
        except (OSError, EOFError, ProtocolError):
            # Nothing is concluded here; the mind is told which values did not come.
            self.forget(holder)
        self.answered(holder, answers)

    def forget(self, holder):
        connection = self.connections.pop(holder, None)
        if connection is not None:
            connection.writer.transport.abort()

    def left(self, holder):
        """That worker is dead: do not wait for it."""
        for task in [task for task, asked in self.tasks.items() if asked == holder]:
            task.cancel()
        self.forget(holder)

    def close(self):
        for holder in [*self.tasks.values(), *self.connections]:
            self.left(holder)


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


def dump_function(func):
    """(frame, futures in it); the frame is empty if the function has to travel in the call."""
    CONTEXT.collected = {}
    try:
        frames = dump_part(f"the function {name_of(func)!r}", func)
        return (b"" if CONTEXT.collected or len(frames) > 1 else frames[0]), func
    finally:
        CONTEXT.collected = None


def dump_call(function, args, kwargs):
    """Pickle a call: (run_spec, futures in its arguments).

    ``function`` comes from ``dump_function``.  A Future adds itself to the collection in
    ``Future.__reduce__``: so it is found at any depth, and never by equal strings.
    """
    frame, func = function
    CONTEXT.collected = futures = {}
    try:
        call = (args, kwargs) if frame else (func, args, kwargs)
        try:
            data, *buffers = dumps(call)
        except Exception:
            # Which one is it?  At this price only now.
            for place, arg in enumerate(args):
                dump_part(f"argument {place} of {name_of(func)}", arg)
            for name, arg in kwargs.items():
                dump_part(f"argument {name!r} of {name_of(func)}", arg)
            raise
        # Copies: what the caller does to an array after the call must not change the call.
        return (frame, data, *map(bytes, buffers)), list(futures)
    finally:
        CONTEXT.collected = None


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


def check_key(key):
    """A key is a string, or a tuple of strings, numbers and tuples; anything else a TypeError."""
    parts = key if type(key) is tuple else ()
    for part in parts:
        if type(part) not in (int, float):
            check_key(part)
    if type(key) is not str and not parts:
        raise TypeError(f"a key is a string or a tuple, not {key!r:.80}")
    return key


class RemoteError(Exception):
    """Stands for an exception that could not be pickled, or not be unpickled here."""


def pack_exception(error, skip=0):
    """An exception as frames, with its causes and the places of its traceback.

    ``skip`` leaves out that many frames at the start: the worker's own.  Pickle loses causes and
    tracebacks; so each link of the chain travels as a pickle of its own, text, and places.
    """
    links, relation = [], ""
    while error is not None and len(links) < 20:
        places, tb = [], error.__traceback__
        while tb is not None:
            code = tb.tb_frame.f_code
            places.append((code.co_filename, tb.tb_lineno, code.co_name))
            tb = tb.tb_next
        try:
            (data,) = dumps(error)
            pickle.loads(data)  # Many exceptions can be pickled, but not unpickled.
        except Exception:
            data = b""
        text = f"{type_name(error)}: {printed(error)}"
        links.append((relation, data, text, places[skip:]))
        skip, relation = 0, "cause" if error.__cause__ is not None else "context"
        suppressed = error.__suppress_context__ and error.__cause__ is None
        error = None if suppressed else error.__cause__ or error.__context__
    return (pickle.dumps(links, protocol=5),)


def printed(error):
    """The exception's own words, if it has any: even ``str`` may raise."""
    try:
        return str(error)
    except Exception as another:
        return f"(its text raises {type_name(another)})"


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
    traceback = None
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
        traceback = types.TracebackType(traceback, frame, frame.f_lasti, line)
    return traceback


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

logger = logging.getLogger("minidist")
STIMULI = {op: "stimulus_" + op.replace("-", "_") for op in MESSAGES}


async def listen(serve, host, port):
    """A server that calls ``serve(reader, writer)`` for each connection."""
    return await asyncio.start_server(serve, host, port, limit=4 * CHUNK)


# ---- 7. Scheduler: the asyncio-stream server around its mind ----


class Scheduler:
    """Runs a SchedulerMind: checks what comes in, calls its stimulus, sends what goes out.

    ``host`` and ``port`` say where it listens; port 0 is any that is free.  An
    ``async with`` starts and closes it.  ``address`` is what workers and clients connect to,
    ``state`` the mind.
    """

    def __init__(self, host="127.0.0.1", port=0):
        self.host, self.port = host, port
        self.state = SchedulerMind(first_attempt=time.time_ns() // 1000)
        self.connections = {}  # {peer: Connection}
        self.serving = set()  # tasks, one for each connection
        self.validating = bool(os.environ.get("MINIDIST_VALIDATE"))

    async def __aenter__(self):
        self.server = await listen(self.serve, self.host, self.port)
        port = self.server.sockets[0].getsockname()[1]
        self.address = f"tcp://{reachable(self.host)}:{port}"
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def close(self):
        """Hang up on everybody.  Workers end, and clients' pending futures are cancelled."""
        self.server.close()
        await close_all(self.serving)

    async def serve(self, reader, writer):
        """[4] One peer's stream: check each message, call the stimulus that its op names."""
        self.serving.add(asyncio.current_task())
        peer = kind = None
        try:
            connection = await accept(reader, writer, "scheduler")
            kind = connection.peer
            while True:
                for message in await connection.receive():
                    op = message.pop("op")
                    if (peer is None) != op.startswith("register-"):
                        raise ProtocolError(f"{op} at the wrong time")
                    if peer is None:
                        peer = self.join(message.pop("id"), connection)
                    getattr(self.state, STIMULI[op])(peer, **message)
                self.flush()
        except (PermissionError, ProtocolError) as error:
            peername = peer or writer.get_extra_info("peername")
            logger.warning("Refused %s: %s", peername, error)
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            pass  # The peer is gone, or we are; what that means is the mind's business.
        except Exception:
            logger.exception("Dropped %s: what it sent cannot be", peer)
        finally:
            self.serving.discard(asyncio.current_task())
            writer.close()
            if peer is not None:
                logger.info("%s left", peer)
                del self.connections[peer]
                getattr(self.state, f"stimulus_{kind}_left")(peer)
                self.flush()

    def join(self, peer, connection):
        if peer in self.connections:
            raise ProtocolError(f"{peer} is here already")
        logger.info("%s joined", peer)
        self.connections[peer] = connection
        return peer

    def flush(self):
        """Send what the mind has in its outbox."""
        outbox, self.state.outbox = self.state.outbox, []
        for peer, message in outbox:
            self.connections[peer].send(message)
        if self.validating:
            self.state.validate()


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


async def close_all(tasks):
    """Cancel tasks, and wait until they are gone."""
    others = [task for task in tasks if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def keep_connecting(address, role, seconds):
    """Connect; while nobody is there, try again for so many seconds (None: for ever)."""
    start, said = time.monotonic(), False
    while True:
        try:
            return await connect(address, role)
        except PermissionError as error:
            raise PermissionError(f"{address}: {error}") from None
        except OSError as error:
            if seconds is not None and time.monotonic() - start >= seconds:
                text = f"no scheduler at {address} within {seconds} s ({error})"
                raise ConnectionError(text) from error
            if seconds is None and not said:
                logger.warning("No scheduler at %s yet; trying again", address)
                said = True
            await asyncio.sleep(0.1)


# ---- 8. Worker: executor threads, peer-to-peer transfers ----


class Packed:
    """A value as it came over the wire; unpickled by the first thread that needs it."""

    def __init__(self, frames):
        self.frames = frames


class Worker:
    """Runs a WorkerMind: threads that take ready attempts, and a store of values.

    ``nthreads`` tasks run at a time (default: one for each core); ``name`` is its own in the
    cluster (default: its address).  An ``async with`` starts and closes it; ``timeout`` seconds
    are given to the scheduler to answer, None waits for ever.  Raises OSError if there is no
    scheduler, ValueError if the name is in use.
    """

    def __init__(self, scheduler_address, nthreads=None, name=None, timeout=10):
        split_address(scheduler_address)
        self.scheduler_address, self.timeout = scheduler_address, timeout
        self.nthreads, self.name = nthreads or os.cpu_count() or 1, name
        self.state = WorkerMind()
        self.lock = threading.Lock()  # around the mind and the store: threads take attempts
        self.store = {}  # {(key, attempt): value or Packed}
        self.tokens = queue.SimpleQueue()  # one for each attempt that became ready
        self.done = deque()  # (stimulus, its arguments): what threads hand back
        self.waking = False
        self.tasks = set()  # of asyncio: one for the stream, one for each data connection

    async def __aenter__(self):
        """Connect, listen where the scheduler was reached from, register, start the threads."""
        address = self.scheduler_address
        self.loop = asyncio.get_running_loop()
        self.scheduler = await keep_connecting(address, "worker", self.timeout)
        host = self.scheduler.writer.get_extra_info("sockname")[0]
        self.server = await listen(self.serve, host, 0)
        self.address = f"tcp://{host}:{self.server.sockets[0].getsockname()[1]}"
        self.id = f"{self.address}#{uuid.uuid4().hex[:8]}"
        self.name = str(self.name if self.name is not None else self.address)
        self.peers = Peers("worker", self.answered)
        register = {"name": self.name, "nthreads": self.nthreads, "values": [], "attempts": []}
        self.scheduler.send({"op": "register-worker", "id": self.id, **register})
        first, *rest = await self.scheduler.receive()
        if first["op"] == "refused":
            await self.close()
            raise ValueError(f"{address}: {first['text']}")
        for number in range(self.nthreads):
            name = f"minidist-{self.name}-{number}"
            threading.Thread(target=self.run_thread, name=name, daemon=True).start()
        self.finished = self.loop.create_task(self.listen_to_scheduler(rest))
        return self

    async def __aexit__(self, *_):
        await self.close()

    async def close(self):
        """Leave at once.  Running tasks are not waited for; nothing is handed over."""
        self.server.close()
        if hasattr(self, "finished"):
            self.tasks.add(self.finished)
        self.peers.close()
        await close_all(self.tasks)
        await self.scheduler.close()
        for _ in range(self.nthreads):
            self.tokens.put(None)

    @property
    def data(self):
        """{key: value} of what this worker holds."""
        with self.lock:
            return {name[0]: self.unpacked(name) for name in self.store}

    async def listen_to_scheduler(self, batch):
        """The scheduler's stream, until it ends."""
        try:
            while True:
                for message in batch:
                    op = message.pop("op")
                    self.tell_mind(STIMULI[op], SCHEDULER, **message)
                    if op == "worker-left":
                        self.peers.left(message["worker"])
                self.flush()
                batch = await self.scheduler.receive()
        except (OSError, EOFError):
            logger.info("The scheduler at %s is gone", self.scheduler_address)
        except Exception:
            logger.exception("What the scheduler at %s sent cannot be", self.scheduler_address)

    def tell_mind(self, stimulus, *args, **fields):
        with self.lock:
            getattr(self.state, stimulus)(*args, **fields)

    def flush(self):
        """Send what the mind has in its outbox; do what it asks of its own body."""
        with self.lock:
            outbox, self.state.outbox = self.state.outbox, []
        for peer, message in outbox:
            if peer is SCHEDULER:
                self.scheduler.send(message)
            elif message["op"] == "ready":
                self.tokens.put(True)
            elif message["op"] == "drop":
                for name in message["values"]:
                    self.store.pop(name, None)
            else:
                self.peers.request(peer, message["values"])

    # Threads.

    def run_thread(self):
        """Take ready attempts and run them, until the worker closes.

        What they made is handed back by way of a deque: one wake-up of the loop for many.
        """
        while self.tokens.get():
            with self.lock:
                attempt = self.state.stimulus_take()
                if attempt is None:
                    continue  # It was returned after its token was put.
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
            return "stimulus_failed", None, (attempt.number, pack_exception(error, skip=1))
        if attempt.wanted and nbytes <= LIMITS["ride_along_bytes"]:
            with contextlib.suppress(Exception):  # It will fail whoever asks for it.
                value = dumps(result)
                if sum(map(len, value)) > LIMITS["ride_along_bytes"]:
                    value = ()
        told = (attempt.number, nbytes, type_name(result), duration_us, value)
        return "stimulus_finished", ((attempt.key, attempt.number), result), told

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
        while self.done:
            stimulus, stored, told = self.done.popleft()
            with self.lock:
                if stored is not None:
                    self.store[stored[0]] = stored[1]
                getattr(self.state, stimulus)(*told)
            del stored, told
        self.flush()

    # Data connections.

    def answered(self, holder, answers):
        """A peer answered: store what came, then tell the mind, which says what to drop."""
        with self.lock:
            for key, attempt, status, frames in answers:
                if status == "ok" and (key, attempt) not in self.store:
                    self.store[key, attempt] = Packed(frames)
            self.state.stimulus_data(holder, answers)
        self.flush()

    async def serve(self, reader, writer):
        """One peer's or client's data connection: give it the values that it asks for."""
        self.tasks.add(asyncio.current_task())
        try:
            connection = await accept(reader, writer, "holder", self.id)
            while True:
                for message in await connection.receive():
                    for key, attempt in message["values"]:
                        status, value = await self.give((key, attempt))
                        answer = {"key": key, "attempt": attempt, "status": status}
                        connection.send({"op": "data", **answer, "value": value})
        except (PermissionError, ProtocolError) as error:
            logger.warning("Refused %s: %s", writer.get_extra_info("peername"), error)
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            pass
        finally:
            self.tasks.discard(asyncio.current_task())
            writer.close()

    async def give(self, name):
        """("ok", frames), ("missing", ()), or ("error", frames of the exception)."""
        if name not in self.store:
            return "missing", ()
        value = self.store[name]
        if isinstance(value, Packed):
            return "ok", value.frames
        try:
            if self.state.data.get(name, 0) > CHUNK:
                return "ok", await asyncio.to_thread(dumps, value)
            return "ok", dumps(value)
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
DoneAndNotDoneFutures = collections.namedtuple("DoneAndNotDoneFutures", "done not_done")
RESERVED = dict.fromkeys(
    "resources retries workers allow_other_workers actor fifo_timeout batch_size".split()
)


class Future:
    """The result of a task that may not have run yet.  Made by ``Client.submit`` and ``map``.

    The result is kept on the cluster while one of its futures lives.
    """

    __slots__ = ("key", "client", "_state", "_live", "__weakref__")

    def __init__(self, key, client):
        self.key, self.client = key, client
        self._state = None  # the FutureState, as soon as the client's loop has read its inbox
        self._live = [None]  # popped once, by whoever releases it: list.pop is atomic

    def _known(self):
        """The FutureState; a thread that asks too early waits for the loop."""
        if self._state is None:
            self.client._catch_up()
        return self._state

    @property
    def status(self):
        """ "pending", "finished", "error" or "cancelled"."""
        return self._known().status

    def done(self):
        """Whether it is finished, erred or cancelled."""
        return self.status != "pending"

    def result(self, timeout=None):
        """Wait for the result; raise the task's own exception if it failed.

        ``timeout`` is in seconds, or a string like "10 ms".  Raises TimeoutError, and
        CancelledError if there will be no result.
        """
        return self.client._wait_for([self], timeout, lambda: outcome(self._state), value=True)

    def exception(self, timeout=None):
        """Wait; return the exception that the task raised, None if there was none."""
        return self.client._wait_for([self], timeout, lambda: failure(self._state))

    def traceback(self, timeout=None):
        """Wait; return the traceback of ``exception()``: its frames name the worker's code."""
        return self.client._wait_for(
            [self], timeout, lambda: getattr(failure(self._state), "__traceback__", None)
        )

    def release(self):
        """Let the result go, as if this object were deleted.  Twice is harmless."""
        with contextlib.suppress(IndexError):
            self._live.pop()
            self.client._post(lambda: self.client._mind.stimulus_release(self._state))

    def __del__(self):
        # No lock, no I/O: the collector may call this anywhere.  After a fork the parent's
        # futures are none of the child's business.
        try:
            if self._state is not None and self.client._pid == os.getpid():
                self._live.pop()
                self.client._post(self.client._mind.stimulus_release, self._state)
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
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-z]*)\s*", str(timeout))
    units = {"us": 1e-6, "ms": 1e-3, "s": 1, "": 1, "second": 1, "m": 60, "minute": 60, "h": 3600}
    unit = match and match[2] if match and match[2] in units else match and match[2].rstrip("s")
    if not match or unit not in units:
        raise ValueError(f"timeout={timeout!r} is no time: use seconds, or a string like '10 ms'")
    return float(match[1]) * units[unit]


class Client:
    """Submits calls to a cluster.

    ``address`` is the scheduler's ("HOST:PORT"), tried again for ``timeout`` seconds.  As a
    context manager it closes itself.  With ``asynchronous=True`` it lives in the running event
    loop: use ``async with`` (or ``await`` it); methods that wait return awaitables, and futures
    can be awaited.  Otherwise its own loop runs in a thread, so that it works in notebooks.
    Raises OSError if no scheduler is there, PermissionError if it refuses us.
    """

    def __init__(self, address=None, *, timeout=10, asynchronous=False, name=None):
        if address is None:
            raise TypeError("Client needs the scheduler's address, like Client('127.0.0.1:8786')")
        split_address(address)
        self.asynchronous, self.name = asynchronous, name
        self._address, self._timeout = address, seconds(timeout)
        self._mind = ClientMind()
        self._inbox = deque()  # (function, *arguments), to be called in the loop
        self._waking = False
        self._watchers = {}  # {FutureState: [called when it changes]}
        self._ended = None  # the exception type and words that new calls get, once it is over
        self._pid = os.getpid()
        self._started = False
        if not asynchronous:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            self._thread.start()
            try:
                asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
            except BaseException:
                self._stop_loop()
                raise

    # Life.

    async def _start(self):
        if self._started:
            return self
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._connection = await keep_connecting(self._address, "client", self._timeout)
        self.id = f"{self.name or 'client'}-{uuid.uuid4().hex[:8]}"
        self._peers = Peers("client", self._answered)
        self._connection.send({"op": "register-client", "id": self.id, "wants": []})
        await self._connection.receive()
        self._listening = self._loop.create_task(self._listen())
        self._started = True
        return self

    def __await__(self):
        return self._start().__await__()

    async def __aenter__(self):
        return await self._start()

    async def __aexit__(self, *_):
        await self.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self, timeout=None):
        """Let go of everything.  Pending futures are cancelled; twice is harmless."""
        if self.asynchronous:
            return self._close()
        if self._loop.is_running():
            self._refuse_own_thread()
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(seconds(timeout))
            self._stop_loop()

    async def _close(self):
        if self._ended and self._ended[0] is RuntimeError:
            return
        await self._read_inbox()
        self._end(RuntimeError, "this client is closed")
        if self._started:
            self._peers.close()
            await close_all([self._listening])
            await self._connection.close()

    def _stop_loop(self):
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _end(self, kind, text):
        self._ended = (kind, text)
        self._mind.stimulus_scheduler_left(text)
        self._flush()

    async def _listen(self):
        """The scheduler's stream, until it ends."""
        try:
            while True:
                for message in await self._connection.receive():
                    op = message.pop("op")
                    if op == "warning":
                        logger.warning("%s", message["text"])
                        continue
                    getattr(self._mind, STIMULI[op])(SCHEDULER, **message)
                    if op == "worker-left":
                        self._peers.left(message["worker"])
                self._flush()
        except (OSError, EOFError):
            pass
        except Exception:
            logger.exception("What the scheduler at %s sent cannot be", self._address)
        self._end(ConnectionError, f"the scheduler at {self._address} is gone")

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
        for _ in range(LIMITS["batch_messages"]):
            if not self._inbox:
                break
            function, *arguments = self._inbox.popleft()
            function(*arguments)
        else:
            self._waking = True
            self._loop.call_soon(self._drain)
        self._flush()

    async def _read_inbox(self):
        """Go on when all that was posted before has been acted on."""
        while self._inbox:
            self._drain()
            await asyncio.sleep(0)

    def _catch_up(self):
        if self.asynchronous:
            while self._inbox:
                self._drain()
        elif not self._loop.is_closed():
            self._run(self._read_inbox())

    def _flush(self):
        """Send what the mind has in its outbox; wake who waits for what it has news of."""
        outbox, self._mind.outbox = self._mind.outbox, []
        for peer, message in outbox:
            if peer is not SCHEDULER:
                self._peers.request(peer, message["values"])
            elif not self._ended:
                self._connection.send(message)
        news, self._mind.news = self._mind.news, []
        for state in news:
            for watcher in list(self._watchers.get(state, ())):
                watcher(state)

    def _answered(self, holder, answers):
        self._mind.stimulus_data(holder, answers)
        self._flush()

    # Calls that wait.

    def _run(self, coroutine, finish=lambda result: result):
        """Run in the client's loop: here and now, or (asynchronous) when awaited."""
        if self.asynchronous:

            async def both():
                return finish(await coroutine)

            return both()
        try:
            self._refuse_own_thread()
        except RuntimeError:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            result = future.result()
        except BaseException:
            future.cancel()
            raise
        return finish(result)

    def _refuse_own_thread(self):
        if threading.get_ident() == self._loop_thread:
            raise RuntimeError("a synchronous client's own loop cannot wait for it: deadlock")

    def _wait_for(self, futures, timeout, finish, value=False):
        """Wait until futures are settled (and their values here), then call ``finish``."""
        timeout = seconds(timeout)
        if not self.asynchronous and all(
            future._state is not None and settled(future._state, value) for future in futures
        ):
            return finish()
        return self._run(self._settle(futures, timeout, value), lambda _: finish())

    async def _settle(self, futures, timeout=None, value=False, enough=lambda state, left: False):
        """Wait until all are settled, or until ``enough(state, how many are left)``."""
        await self._read_inbox()
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
        for state in left:
            self._watchers.setdefault(state, []).append(changed)
        watched = list(left)
        if value:
            self._mind.stimulus_ask(watched)
            self._flush()
        try:
            async with asyncio.timeout(timeout):
                await ready
        except TimeoutError:
            text = f"{len(left)} of {len(states)} futures are not done after {timeout} s"
            raise TimeoutError(text) from None
        finally:
            for state in watched:
                watchers = self._watchers[state]
                watchers.remove(changed)
                if not watchers:
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
        if key is not None:
            check_key(key)
        return self._submit(dump_function(func), args, kwargs, key, pure, priority)

    def map(self, func, *iterables, key=None, pure=True, priority=0, **kwargs):
        """Submit ``func`` for each tuple of items; return a list of Futures.

        It stops at the shortest iterable.  ``key`` is a prefix, or a list with a key for each;
        ``kwargs`` go to every call.
        """
        self._check(func, kwargs, priority)
        if not iterables:
            raise ValueError("map needs at least one iterable")
        for iterable in iterables:
            if isinstance(iterable, Future):
                raise TypeError("map goes over iterables; gather this Future first")
        function = dump_function(func)
        calls = list(zip(*iterables, strict=False))
        if isinstance(key, list):
            if len(key) != len(calls):
                raise ValueError(f"map got {len(key)} keys for {len(calls)} calls")
            keys = [check_key(k) for k in key]
        elif key is not None:
            prefix = check_key(key)
            join = (lambda i: f"{key}-{i}") if type(key) is str else (lambda i: (*prefix, i))
            keys = [join(i) for i in range(len(calls))]
        else:
            keys = [None] * len(calls)
        return [
            self._submit(function, args, kwargs, key, pure, priority)
            for args, key in zip(calls, keys, strict=True)
        ]

    def _check(self, func, kwargs, priority):
        """What both ``submit`` and ``map`` refuse."""
        if self._ended:
            raise self._ended[0](self._ended[1])
        if self._pid != os.getpid():
            raise RuntimeError("this client belongs to the parent process: make one of your own")
        if not callable(func):
            raise TypeError(f"the first argument must be callable, {func!r:.80} is not")
        if type(priority) is not int:
            raise TypeError(f"priority={priority!r} is no whole number")
        for option in kwargs:
            if option in RESERVED:
                raise TypeError(f"the option {option}= is not built yet")

    def _submit(self, function, args, kwargs, key, pure, priority):
        run_spec, futures = dump_call(function, args, kwargs)
        for future in futures:
            if future.client is not self:
                raise ValueError(f"{future!r} belongs to another client")
            if not future._live:
                raise ValueError(f"{future!r} was released")
        if sum(map(len, run_spec)) > LIMITS["argument_bytes"]:
            text = "a call of more than 10 MB travels through the scheduler"
            warnings.warn(f"{text}: scatter large arguments first", stacklevel=3)
        name = name_of(function[1])
        if key is None:
            key = pure_key(name, run_spec) if pure else f"{name}-{uuid.uuid4().hex}"
        future = Future(key, self)
        self._post(self._begin, future, name, run_spec, futures, priority)
        if self.asynchronous and threading.get_ident() == self._loop_thread:
            self._drain()
        return future

    def _begin(self, future, name, run_spec, futures, priority):
        inputs = [input._state for input in futures]
        future._state = self._mind.stimulus_submit(future.key, name, run_spec, inputs, priority)
        if self._ended:  # The scheduler was lost after the call.
            self._mind.stimulus_scheduler_left(self._ended[1])

    def gather(self, futures, errors="raise"):
        """The results of futures in nested lists, tuples, sets and dicts, in the same shape.

        ``errors="raise"`` raises the first exception; ``errors="skip"`` leaves out failed ones.
        """
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors={errors!r} is neither 'raise' nor 'skip'")
        if isinstance(futures, collections.abc.Iterator):
            futures = list(futures)
        # dask: gathers by way of the scheduler unless direct=True; here always from the workers.
        leaves = list(leaves_of(futures))
        for future in leaves:
            if future.client is not self:
                raise ValueError(f"{future!r} belongs to another client")
        if self._ended and not all(f._state and f._state.final for f in leaves):
            raise self._ended[0](self._ended[1])

        def failed(state, left=None):
            return state.status in ("error", "cancelled") and not state.value

        def finish(_=None):
            if errors == "raise":
                for future in leaves:
                    if failed(future._state):
                        outcome(future._state)
            return rebuild(futures, lambda f: outcome(f._state), lambda f: failed(f._state))

        enough = failed if errors == "raise" else lambda state, left: False
        return self._run(self._settle(leaves, None, True, enough), finish)

    def __repr__(self):
        return f"<Client: {self._ended[1] if self._ended else self._address}>"


def settled(state, value):
    """Whether nothing more will come for it (``value``: and its value is here)."""
    if state.status == "finished" and value:
        return bool(state.value)
    return state.status != "pending"


def leaves_of(obj):
    """The futures in nested containers."""
    if isinstance(obj, Future):
        yield obj
    elif isinstance(obj, (list, tuple, set, frozenset)):
        for item in obj:
            yield from leaves_of(item)
    elif isinstance(obj, dict):
        for item in obj.values():
            yield from leaves_of(item)


def rebuild(obj, value, failed):
    """Nested containers with values in the place of futures, those that failed left out."""

    def keep(item):
        return not (isinstance(item, Future) and failed(item))

    if isinstance(obj, Future):
        return value(obj) if keep(obj) else None
    if isinstance(obj, dict):
        return {k: rebuild(v, value, failed) for k, v in obj.items() if keep(v)}
    if isinstance(obj, (list, tuple, set, frozenset)):
        items = [rebuild(item, value, failed) for item in obj if keep(item)]
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
    if return_when not in (ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION):
        raise ValueError(f"return_when={return_when!r} is unknown")
    futures = list(leaves_of(fs))
    if not futures:
        raise ValueError("wait needs at least one future")
    client = futures[0].client

    def enough(state, left):
        if return_when == FIRST_EXCEPTION:
            return state.status in ("error", "cancelled")
        return return_when == FIRST_COMPLETED

    def finish(_):
        done = {future for future in futures if settled(future._state, False)}
        for future in done:
            if future._state.status == "cancelled":
                failure(future._state)
        return DoneAndNotDoneFutures(done, set(futures) - done)

    return client._run(client._settle(futures, seconds(timeout), False, enough), finish)


# ---- 12. Command line ----

DEFAULT_PORT = 8786


def parse(argv):
    parser = argparse.ArgumentParser(prog="minidist", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    command = commands.add_parser("scheduler", help="start a scheduler", formatter_class=formatter)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all")
    text = f"port to listen on; 0: any that is free; by default {DEFAULT_PORT} or the next"
    command.add_argument("--port", type=int, default=argparse.SUPPRESS, help=text)
    command = commands.add_parser("worker", help="start a worker", formatter_class=formatter)
    command.add_argument("address", metavar="IP:PORT", help="the scheduler's address")
    cores = os.cpu_count() or 1
    command.add_argument("--nthreads", type=int, default=cores, help="tasks run at a time")
    text = "the worker's name in the cluster; its address if not given"
    command.add_argument("--name", default=argparse.SUPPRESS, help=text)
    return parser, parser.parse_args(argv)


def main(argv=None):
    """The command line: ``minidist scheduler`` and ``minidist worker IP:PORT``."""
    parser, options = parse(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # Modules beside the user are importable.
    # Few of our objects are in cycles, and there are many of them: looking for cycles less often
    # saves a quarter of a busy scheduler's time.
    gc.set_threshold(100_000, 50, 50)
    if options.command == "worker" and options.nthreads < 1:
        parser.error("--nthreads must be at least 1")
    run = run_scheduler if options.command == "scheduler" else run_worker
    try:
        return asyncio.run(run(options))
    except (OSError, ValueError) as error:
        print(f"minidist {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def stopped():
    """An event that SIGINT and SIGTERM set."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, event.set)
    return event


async def run_scheduler(options):
    stop = stopped()
    asked = getattr(options, "port", None)
    ports = [asked] if asked is not None else range(DEFAULT_PORT, DEFAULT_PORT + 100)
    for port in ports:
        try:
            scheduler = await Scheduler(options.host, port).__aenter__()
            break
        except OSError as error:
            if port == ports[-1]:
                raise OSError(f"cannot listen on {options.host}:{port}: {error}") from error
    if asked is None and port != DEFAULT_PORT:
        logger.warning("Port %s is in use; listening on %s", DEFAULT_PORT, port)
    print(f"Scheduler at {scheduler.address}", flush=True)
    await stop.wait()
    await scheduler.close()
    return 0


async def run_worker(options):
    stop = asyncio.ensure_future(stopped().wait())
    name = getattr(options, "name", None)
    worker = Worker(options.address, options.nthreads, name, timeout=None)
    starting = asyncio.ensure_future(worker.__aenter__())
    await asyncio.wait([stop, starting], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        return 0
    starting.result()
    print(f"Worker {worker.name} at {worker.address}", flush=True)
    await asyncio.wait([stop, worker.finished], return_when=asyncio.FIRST_COMPLETED)
    left = stop.done()
    await worker.close()
    if not left:
        print(f"minidist worker: the scheduler at {options.address} is gone", file=sys.stderr)
        stop.cancel()
    return 0 if left else 1


if __name__ == "__main__":
    # The classes of this file exist once, as minidist's, also when it is run as a script.
    import minidist

    sys.exit(minidist.main())
