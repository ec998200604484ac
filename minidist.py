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
(README has the list).  Comments and docstrings that say "dask:" compare it, where it differs.

How to read it.  Part one decides, and is pure: three *minds* that change their tables and leave
messages in an outbox.  Nothing there does I/O, has a clock, or waits; so a student can drive
the scheduler by hand, a test can run a whole cluster in one thread, in any order of events, and
what a real scheduler was told can be recorded and replayed.
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
import atexit
import concurrent.futures
import contextlib
import contextvars
import errno
import functools
import gc
import hashlib
import heapq
import hmac
import html
import inspect
import io
import json
import logging
import math
import numbers
import os
import pickle
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import warnings
from collections import Counter, OrderedDict, abc, deque, namedtuple
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, FIRST_EXCEPTION
from dataclasses import dataclass, field, replace
from itertools import count, islice, zip_longest
from pathlib import Path

import cloudpickle

# ============ Part one, what it decides: no I/O, no clock, no randomness, no callbacks ============

# ---- 1. Vocabulary: LIMITS, MESSAGES, check_message, HeapSet, Mind, FetchingMind ----
#
# The words that the other chapters share.  A *task* is a call, or data that was scattered, with a
# key.  An *attempt* is one try to get its value onto one worker, mostly by computing it there; the
# scheduler numbers it.  A *want* is a client's wish to have a task's result; the client numbers it.
# A *value* is named ``(key, attempt)``, so that two results for one key can never be taken for each
# other; a *holder* is a worker that has that value.  A *stimulus* is a method that tells a mind one
# thing that has happened, mostly a message.
#
# Messages cross.  While a client drops its last future of a key and submits the key again, the
# first result may be on its way to it, and the first attempt still running.  Three rules settle
# all such races; whoever looks for the code of a special case will find these instead:
#
#   Numbers.  Whoever makes a thing numbers it, and each message about it echoes the number: the
#       client a want, the scheduler an attempt, a worker process itself (its ``id``).  A number
#       that is not the one in the table is stale: its message is dropped, and a value that it
#       claims is freed.
#   Attempts end once.  What was sent to a worker ends by one answer ("task-finished", "-erred" or
#       "-returned"), or with the worker.  The scheduler may ask for it back, never take it back;
#       what it needs no more is *abandoned*: once begun, it runs to its end, and occupies its
#       thread until then.
#   One stream.  Whatever changes state travels on one ordered stream for each peer.  Large values
#       have connections of their own, and nothing is ever concluded from one that broke: only the
#       scheduler declares a worker dead, and tells the others.

# What one peer can make us allocate or wait for, and how much is kept while weeks go by: a mistake
# at one end, or a long life, must not become a process without memory.

LIMITS = {
    "header_bytes": 1 << 30,  # the JSON of one batch
    "frames": 1 << 18,  # binary frames in one batch
    "frame_bytes": 1 << 36,  # one binary frame
    "batch_messages": 1000,  # messages in one batch: no loop stalls over one
    "handshake_seconds": 10,
    "ride_along_bytes": 64 << 10,  # a result up to this size travels with its notice
    "holders": 8,  # replicas named to whoever fetches, or weighed when a worker is chosen
    "remembered": 10_000,  # durations, wants that ended, digests; workers that are dead
    "story": 10_000,  # transitions that a mind remembers
    "argument_bytes": 10_000_000,  # larger arguments of one call get a warning
    "start_seconds": 60,  # a local cluster's worker processes have to be there
    "close_seconds": 30,  # who closes waits no longer until others are done
    "stall_seconds": 30,  # a peer that takes no byte for so long is dropped (on Linux); ...
    "patience_seconds": 300,  # ... by who accepted the connection, or is on the same host
}

ALLOWED_FAILURES = 3  # a task, or a fetch, may come to nothing so often without having raised

SCHEDULER = "scheduler"  # the peer, seen from clients and workers
ANOTHER_CALL = "the key {!r} is known, perhaps with another call or other data: that one is used"

# All that is ever said.  A message is a list: its op, then its fields in the order of its line
# here, and in that order its stimulus takes them, after the peer from which it came.  So to read a
# stimulus, start from its message's line.  Whatever comes in is checked against that.  (To write
# the names of the fields into each message would more than double the time to pack and read it.)
#
# A ``key`` stands nowhere without a number beside it, but for a query: ``want`` where the client
# counts, ``attempt`` where the scheduler does; ``names`` are such pairs.  ``places`` are an
# attempt's inputs, with their holders; ``misses`` are those of them that no holder gave, with the
# holders that were asked.  ``values``, ``attempts`` and ``wants`` of those who register are empty:
# they are there for a scheduler that comes back and has to learn everything again.

MESSAGES = {  # {op: "sender > receiver: fields"}; the fields' kinds are in FIELDS below
    # A client and the scheduler: one ordered stream.
    "register-client": "client > scheduler: id wants",
    "submit": "client > scheduler: key want name run_spec inputs priority workers loose retries",
    "scatter": "client > scheduler: key want nbytes type workers broadcast",
    "put": "scheduler > client: key want attempt worker",
    "put-failed": "client > scheduler: key attempt",
    "release-keys": "client > scheduler: names",
    "cancel-keys": "client > scheduler: names force",
    "retry": "client > scheduler: key want",
    "fire-and-forget": "client > scheduler: names",
    "fetch-missed": "client > scheduler: key want attempt holders again",
    "key-in-memory": "scheduler > client: key want attempt nbytes type holders value",
    "key-lost": "scheduler > client: key want",
    "key-retried": "scheduler > client: key want",
    "key-erred": "scheduler > client: key want exception type text",
    "key-cancelled": "scheduler > client: key want text",
    "warning": "scheduler > client: text",
    "query": "client > scheduler: number what keys",
    "answer": "scheduler > client: number facts",
    "shutdown": "client > scheduler:",
    # A worker and the scheduler: one ordered stream.
    "register-worker": "worker > scheduler: id name nthreads values attempts",
    "compute-task": "scheduler > worker: key attempt name run_spec places order wanted",
    "task-finished": "worker > scheduler: attempt nbytes type duration_us value",
    "task-erred": "worker > scheduler: attempt exception",
    "task-returned": "worker > scheduler: attempt misses",
    "give-back": "scheduler > worker: attempts",
    "add-keys": "worker > scheduler: names",
    "free-keys": "scheduler > worker: names",
    "heartbeat": "worker > scheduler:",
    "refused": "scheduler > worker: text",
    # The scheduler and either.
    "goodbye": "scheduler > client|worker:",
    "leave": "client|worker > scheduler:",
    "registered": "scheduler > client|worker: ttl_us",
    "worker-left": "scheduler > client|worker: worker",
    # A data connection, to any worker.
    "get-data": "client|worker > holder: names",
    "data": "holder > client|worker: key attempt status value",
    "put-data": "client > holder: key attempt value",
    "run": "client > holder: number run_spec",
    "ran": "holder > client: number status value",
}


class ProtocolError(Exception):
    """A peer sent what no peer of this version sends; its connection is closed."""


def to_key(value, frames=()):
    """JSON has no tuples, so a key that is one travelled as a list.

    Its parts are only what JSON gives back equal: one key has to be the same in every process.
    """
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise TypeError(f"{value!r:.80} is no key")
    return tuple([part if type(part) in (str, int, float) else to_key(part) for part in value])


class Packed(tuple):
    """The frames of an object that came over the wire.

    The thread that needs the object unpickles it: so a worker's loop need not, and what is only
    passed on to somebody else is not unpickled.
    """


def to_frames(value, frames):
    """Places in the batch's table of frames, as the frames.

    (A negative place is dropped: Python would count it from the table's end.)
    """
    return Packed([frames[place] for place in value if place >= 0])


FIELDS = {  # {field: its kind}, the same in every message
    field: kind
    for kind, fields in (
        (to_key, "key"),
        (int, "want attempt nbytes nthreads duration_us ttl_us order retries number"),
        (float, "priority"),
        (str, "id name type status text worker what"),
        (bool, "wanted loose broadcast force again"),
        (to_frames, "run_spec value exception"),
        ([int], "attempts"),
        ([str], "holders workers"),
        ([to_key], "keys"),
        (list, "facts"),  # whatever is in it
        ([(to_key, int)], "names inputs wants values"),  # values by attempt, tasks by want
        ([(to_key, int, [str])], "places misses"),  # values by attempt, and who has them
    )
    for field in fields.split()
}


def convert(kind, value, frames):
    """What JSON brought, as the minds know it.

    A kind is a type (by identity: for Python, ``True`` is an ``int``), a function that converts, a
    tuple of kinds for a list of just so many, or ``[kind]`` for a list of any length.
    Raises LookupError, TypeError or ValueError for what is not of the kind.
    """
    if type(value) is kind:
        return value
    if type(kind) is type(convert):
        return kind(value, frames)
    if type(kind) is tuple:
        return tuple([convert(k, item, frames) for k, item in zip(kind, value, strict=True)])
    if type(kind) is list and type(value) is list:
        return [convert(kind[0], item, frames) for item in value]
    raise TypeError(f"{value!r:.80} is no {kind}")


OPS = {  # {op: (senders, names of the fields, their kinds)}
    op: (route.split(" > ")[0].split("|"), names.split(), [FIELDS[n] for n in names.split()])
    for op, line in MESSAGES.items()
    for route, names in [line.split(":")]
}


def check_message(message, frames, sender):
    """Check a message against MESSAGES before anything else, and give its fields their kinds.

    ``sender`` is the kind of peer that it came from.  A ``ProtocolError`` says what is wrong.

    Exactly these fields: to skip what is not known would be of use between versions, but the
    handshake lets only one version in.  A mind may rely on the kinds, not on the sense: the end of
    an attempt that was never sent passes here.  Then the mind raises, and its body drops the peer.
    """
    try:
        senders, names, kinds = OPS[message[0]]
        if sender not in senders or len(message) != 1 + len(names):
            raise ValueError(f"a {sender} sends {names}, if at all")
        for place, kind in enumerate(kinds, 1):
            if type(message[place]) is not kind:  # Else, as mostly, there is nothing to convert.
                message[place] = convert(kind, message[place], frames)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message: {message!r:.200} ({error})") from error
    return message


class HeapSet(dict):
    """What waits, by priority: the smallest comes first.

    An ordered set, with what is known of each item while it waits, and a heap from which anything
    may be taken: what was taken out stays in the heap until it surfaces, or until the dead are the
    majority and the heap is built anew.  (To look for it in the heap would cost a scan, and a
    cancel of 100,000 tasks as many scans.)

    No two items have equal priorities: else the heap would compare the items, which have no order.
    An item that is put in again while its dead entry is still there has two: that does no harm.
    """

    __slots__ = ("heap", "worker")

    def __init__(self, worker=None):
        self.heap = []  # [(priority, item)]
        self.worker = worker  # whose queue it is, a WorkerState; None: that of all

    def push(self, item, value=0):
        self[item] = value
        heapq.heappush(self.heap, (item.priority, item))

    def discard(self, item):
        del self[item]
        if not self or len(self.heap) > 2 * len(self) + 16:  # (Who is idle keeps nothing.)
            self.heap = sorted((item.priority, item) for item in self)  # (That is a heap, too.)

    def peek(self):
        """The item that is next, or None."""
        while self.heap and self.heap[0][1] not in self:
            heapq.heappop(self.heap)
        return self.heap[0][1] if self.heap else None


class Mind:
    """What the minds share: an outbox, and (but for the client's) a loop that is *level-triggered*.

    A stimulus changes facts (somebody wants a task, a worker is gone) and marks the records
    concerned.  ``settle`` then asks of each marked record what it should be now (its ``goal``) and
    lets it take the edge there, which marks neighbours, until none is marked.  Nobody carries
    recommendations from one task to the next, and walks along dependents are loops, not recursion.
    The idea to keep decisions free of I/O ("sans-IO") is that of h11 and of dask's worker state.

    Level-triggered: what a record should be follows from the facts as they are, not from the event
    that changed them.  So facts may change in any order, and several before one ``settle``; to mark
    too much costs a look, while a mark that is missing leaves a task waiting for ever: ``validate``
    exists to find those.  Dicts stand for sets that are iterated: a set of records would be so in
    the order of their addresses, which is another in each run, and no run could be replayed.

    dask: a transition returns recommendations for other tasks, which a loop carries out.
    """

    TRANSITIONS = {}  # {(start, finish): (method that leaves, method that enters)}: every edge

    def __init__(self, first_number=1):
        self.records = {}  # a client's futures, the scheduler's tasks, a worker's attempts
        self.number = first_number  # of the next thing that it makes
        self.outbox = []  # [(peer, message)], to be sent by the body
        self.marked = {}  # an ordered set of records that may not be what they should be
        self.story = deque(maxlen=LIMITS["story"])  # (key, start, finish, attempt, worker)
        self.actions = {
            edge: (getattr(self, leave, None), getattr(self, enter))
            for edge, (leave, enter) in self.TRANSITIONS.items()
        }

    def next_number(self):
        """Whoever makes a thing numbers it: the client a want, the scheduler an attempt."""
        self.number += 1
        return self.number - 1

    def send(self, peer, op, *values):
        """Leave a message for a peer: ``values`` are the op's fields, in the order of MESSAGES."""
        self.outbox.append((peer, [op, *values]))

    def send_name(self, peer, op, name):
        """Send a ``(key, number)``; those that follow each other travel in one message.

        Only with the very last message: in an earlier one, it would overtake what was said since.
        """
        last, message = self.outbox[-1] if self.outbox else (None, [])
        if last == peer and message[0] == op:
            message[1].append(name)
        else:
            self.send(peer, op, [name])

    def mark(self, record):
        self.marked[record] = None

    def settle(self):
        """Let marked records take edges, in order of the marks, until each is what it should be.

        So what was told first is acted on first, and said first to others.
        """
        # Each takes a few edges at most.  Two goals that contradict each other would go on for
        # ever, and with them the whole cluster would stand still: rather let it be said.
        taken, bound = 0, 64 + 16 * len(self.records)
        while self.marked:
            marked, self.marked = self.marked, {}
            for record in marked:
                while (finish := self.goal(record)) != record.state:
                    self.transition(record, finish)
                    taken += 1
                    assert taken < bound, f"{record} does not settle"

    def transition(self, record, finish):
        """Take one edge: leave a state, which clears its fields, and enter the other.

        The only place where a state is assigned.
        """
        # dask: has a method for each edge.  What it means to leave and to enter a state (Harel's
        # statecharts call it exit and entry actions) is said once here, whatever the edge.
        start = record.state
        leave, enter = self.actions[start, finish]
        if leave:  # Else there is nothing to clear.
            leave(record)
        record.state = finish
        enter(record)
        self.story.append((record.key, start, finish, record.attempt, record.processing_on))


def edges(**finishes):
    """The table of transitions: for each edge, the methods named after its two ends."""
    pairs = [(start, finish) for start, row in finishes.items() for finish in row.split()]
    return {
        (start.replace("_", "-"), finish): (f"leave_{start}", "enter_" + finish.replace("-", "_"))
        for start, finish in pairs
    }


def forget_oldest(memories):
    """Keep a dict of what was learned bounded.  (A dict's first key is the one added first.)"""
    if len(memories) > LIMITS["remembered"]:
        del memories[next(iter(memories))]


class FetchingMind(Mind):
    """What the client's and the worker's mind share: values on their way here.

    A value is asked of one holder after the other until one gives it; who has failed is
    remembered, to be reported if all have.  Nothing is concluded here from a broken connection.
    (To ask all at once would be faster when one is dead, and cost every transfer several times.)

    What is being fetched and what was requested are two tables, since a request cannot be taken
    back: a value may be let go, and be needed again, while it is under way.
    Subclasses say what it means that a value ``arrived``, or that everybody ``missed`` it.
    """

    def __init__(self):
        super().__init__()
        self.fetching = {}  # {(key, attempt): (holders still to be tried, those that missed)}
        self.requests = {}  # {holder: {(key, attempt): None}}: requests that are under way
        self.dead = {}  # an ordered set of workers that are dead: they are not asked

    def need(self, name, holders):
        """Fetch a value.  To want it no longer, take it out of ``fetching``.

        ``holders`` are ids of workers, in the order in which they are to be asked.
        """
        if name not in self.fetching:
            self.fetching[name] = (list(holders), [])
            self.ask(name)

    def ask(self, name):
        """Ask the next holder; if there is none, the value is given up."""
        holders, misses = self.fetching[name]
        while holders and holders[0] in self.dead:
            del holders[0]
        if not holders:
            del self.fetching[name]
            self.missed(name, misses)
        elif name not in self.requests.setdefault(holders[0], {}):
            # (Otherwise it was dropped and is wanted again: the request under way serves.)
            self.requests[holders[0]][name] = None
            self.send_name(holders[0], "get-data", name)

    def stimulus_data(self, holder, key, attempt, status, value):
        """A holder answers for one value: "ok", "missing", or "error" if nobody can pickle it.

        ``value`` are its frames; with "error", those of an exception.  Of a value that was let go
        and wanted again there may be two requests: who answers first will do, since all replicas
        of a ``(key, attempt)`` are one value.
        """
        name = (key, attempt)
        if name in self.requests.get(holder, ()):
            self.end_request(holder, name, status == "missing")
            if name in self.fetching and status != "missing":  # Else it was dropped meanwhile.
                del self.fetching[name]
                self.arrived(name, status == "ok", value)
        self.settle()

    def stimulus_link_lost(self, holder):
        """The connection to a holder broke: what was asked there is missed there.

        A fault between two that are both alive looks just like a dead holder from here; so the next
        one is asked, and the scheduler hears of it if none has the value.
        """
        for name in list(self.requests.get(holder, ())):
            self.end_request(holder, name, missed=True)
        self.settle()

    def stimulus_worker_left(self, peer, worker):
        """The scheduler says that a worker is dead: expect nothing from it any more.

        It may be alive, and its answers be under way: they answer no request of ours by then.
        Where it is named as a holder is not looked for, which could be in 100,000 futures: it is
        passed over when its turn comes.
        """
        self.dead[worker] = None
        forget_oldest(self.dead)
        self.stimulus_link_lost(worker)

    def end_request(self, holder, name, missed):
        """A request is over; if it was missed by the holder that we wait for, ask the next."""
        del self.requests[holder][name]
        if not self.requests[holder]:
            del self.requests[holder]
        holders, misses = self.fetching.get(name, ((), ()))
        if missed and holders and holders[0] == holder:
            misses.append(holders.pop(0))
            self.ask(name)

    def validate(self):
        """Assert every invariant.  Slow by design: a live process does so only when asked to."""
        assert not self.marked
        for name, (holders, misses) in self.fetching.items():
            # F1. A wanted value is asked of the first holder that has not been tried.
            assert name in self.requests[holders[0]] and not set(holders) & set(misses), name
        # F2. No empty request is kept.
        assert all(self.requests.values())


# ---- 2. Client mind: FutureState, ClientMind ----
#
# What one client wants.  It may use chapter 1.  Reference counts, releases and resubmissions are
# where systems of this kind lose futures, so they are decided here, in the order in which the
# client's threads asked for them, and not in ``Future.__del__``.
#
# A user can hold several ``Future`` objects of one key.  They share one FutureState, which counts
# them; with the last one the want ends, and the next submit of that key is another want, with
# another number.  Two things travel separately: the *notice* that a result exists, which every
# want gets, and the *value*, which only who asks for it gets, from a worker that holds it (unless
# it was so small that it came along).  Who waits for 1,000 tasks has no use for 1,000 results.
#
#   pending > finished    "key-in-memory"
#   finished > pending    "key-lost"; or nobody gave the value that was asked for; or its user
#                         scatters it once more, with ``broadcast``
#   pending > error       "key-erred"; also from finished, if its value cannot be had
#   error > pending       "key-retried", or a retry by this client
#   any > cancelled       it leaves the table at once, so that its key is free for a new want
#
# A value that is here is final: it stays readable, whatever comes later, until it is released.


@dataclass(eq=False, slots=True)
class FutureState:
    """One want of this client: what all its ``Future`` objects of one key share."""

    key: "str | tuple"
    want: int  # its number: another each time that the key is wanted anew, retried, or broadcast
    call: "int | None" = None  # a hash of what came first; None: others are not compared with it
    status: str = "pending"  # or "finished", "error", "cancelled": the words that users see
    count: int = 1  # live Future objects
    asked: bool = False  # somebody waits for the value, not only for its existence

    # What "key-in-memory" told; true while "finished":
    attempt: int = 0
    nbytes: int = 0
    type: str = ""
    holders: "list[str] | tuple[()]" = ()
    misses: int = 0  # how often none of its holders gave this value
    # Frames, from the moment when the value is here.  A value that is here is final.
    value: tuple = ()
    # Set in "error" only: a pickled exception; where none was ever pickled, ``type`` is its kind.
    exception: tuple = ()
    # Set in "cancelled", and in "error" if there is no exception: why.  (And, whatever the status,
    # when it was cancelled after its value or exception was here: why nothing is made from it.)
    text: str = ""

    # Of scattered data: its frames, until it is where it was to be put.
    data: tuple = ()

    @property
    def final(self):
        """What has reached this client stays as it is: a value, or why there is none."""
        return bool(self.value) or self.status == "error"


class ClientMind(FetchingMind):
    """What a client wants, and what it was told of it.

    There is no table of transitions: the scheduler decides what becomes of a task, and a notice
    says what its state is from now on.  What is decided here is whom a notice concerns.
    So nothing is marked, and nothing has to settle.
    """

    def __init__(self):
        super().__init__()
        self.futures = self.records  # {key: FutureState}: what is wanted now
        self.puts = {}  # {FutureState: (worker, attempt)}: where its data is being put
        self.news = []  # FutureStates that changed: its body wakes those who wait for them
        self.warnings = []  # texts, for the user

    def stimulus_submit(
        self, key, name, run_spec, inputs, priority, workers=(), loose=False, retries=0
    ):
        """[2] The user submits a call: a new want, or one more reference to the one there is.

        ``inputs`` are the FutureStates of the futures in its arguments.  Returns the FutureState.
        A key that is wanted here keeps the call that it came with, also if that has failed: to try
        once more is for ``retry``.

        A cancelled input is not sent, even if its key is wanted anew: the user gave us that very
        future.  One that the scheduler is just cancelling looks wanted here; the scheduler finds
        that by the want's number, and cancels this task too.
        """
        call = hash(run_spec)
        if state := self.known(key, call):
            return state
        state = FutureState(key, self.next_number(), call)
        for i in inputs:
            if self.futures.get(i.key) is not i:
                # Cancelled inputs have left the table: nothing can be computed from them.
                self.become(state, "cancelled", f"its input {i.key!r} was cancelled: {i.text}")
                return state
        self.futures[key] = state
        names = [(i.key, i.want) for i in inputs]
        options = (priority, workers, loose, retries)
        self.send(SCHEDULER, "submit", key, state.want, name, run_spec, names, *options)
        return state

    def stimulus_scatter(self, key, data, nbytes, type, workers, broadcast):
        """The user scatters data: it is kept here until the scheduler says that it has a place.

        ``data`` are its frames, ``nbytes`` its size as an object, ``type`` its type's name.  The
        bytes do not travel with this message: they go to a worker, and the scheduler's stream
        stays short.  Returns the FutureState.
        """
        call = hash(data[:1])  # (Large buffers, which are beside the pickle, are not compared.)
        if state := self.known(key, call):
            if broadcast and state.status != "error":
                # It may be on one worker only.  That is a new want: should it have been lost or
                # cancelled meanwhile, then this client gives it once more; of what is here, the
                # very value that users have seen.
                self.fetching.pop((key, state.attempt), None)
                state.want, state.data = self.next_number(), state.value or data
                self.become(state, "pending")
                self.send(SCHEDULER, "scatter", key, state.want, nbytes, type, workers, True)
            return state
        self.futures[key] = state = FutureState(key, self.next_number(), call, data=data)
        self.send(SCHEDULER, "scatter", key, state.want, nbytes, type, workers, broadcast)
        return state

    def stimulus_put(self, peer, key, want, attempt, worker):
        """The scheduler says where data shall go, by a data connection.

        It may say so again, with another attempt, after the worker is lost or the put has failed.
        """
        # Whatever the number of the want: if the scheduler has let go of that attempt, it will have
        # the value freed where it was put.
        if (state := self.futures.get(key)) and state.data:
            self.puts[state] = (worker, attempt)
            self.send(worker, "put-data", key, attempt, state.data)

    def stimulus_link_lost(self, holder):
        """The connection to a worker broke: what was asked or put there may not have come.

        If it has come after all, the worker's claim and our "put-failed" cross.  The scheduler
        believes the first of them: the claim makes the task finished; or "put-failed" has ended
        that attempt, and the claim is answered by "free-keys".
        """
        super().stimulus_link_lost(holder)
        for state, (worker, attempt) in self.puts.items():
            if worker == holder:
                self.send(SCHEDULER, "put-failed", state.key, attempt)

    def stimulus_cancel(self, states, force):
        """The user cancels: these states leave the table at once.

        The scheduler answers with "key-cancelled", for these (that one is stale when it comes)
        and for what depends on them.  Until that is here, dependents look as before; what is
        submitted on them meanwhile is cancelled by the scheduler.
        """
        mine = {state: None for state in states if self.futures.get(state.key) is state}
        for state in mine:
            self.let_go(state, "it was cancelled here")
        if mine:  # In one message: then the scheduler goes over what depends on them once.
            self.send(SCHEDULER, "cancel-keys", [(s.key, s.want) for s in mine], force)

    def stimulus_retry(self, states):
        """The user wants tasks that failed once more: each is a new want.

        Another client may have retried such a task before, and news of that be under way to us
        under the old number: it is stale then, and the scheduler says all of it again.
        """
        for state in states:
            if self.futures.get(state.key) is state and state.status == "error":
                state.want, state.misses = self.next_number(), 0
                self.send(SCHEDULER, "retry", state.key, state.want)
                self.become(state, "pending")

    def stimulus_fire_and_forget(self, states):
        """The user wants tasks to run even if nobody waits for them.

        The want is handed to the scheduler, since this client may be gone before they have run.
        On one stream that is before the release of the futures, which often follows at once.
        """
        self.send(SCHEDULER, "fire-and-forget", [(state.key, state.want) for state in states])

    def stimulus_release(self, state):
        """One ``Future`` object is gone, or released; with the last one, the want and value are.

        (Who keeps what he has released would keep the value, too.)
        """
        state.count -= 1
        if state.count:
            return
        state.value, text = (), "its last future was released"
        if self.futures.get(state.key) is state:
            self.let_go(state, text, kept="error")
            self.send_name(SCHEDULER, "release-keys", (state.key, state.want))
        elif state.status == "finished":
            # It was cancelled when its value was here, and left the table: it is let go silently,
            # and what bears its key now is another want.
            self.become(state, "cancelled", text)

    def stimulus_ask(self, states):
        """Somebody waits for these values: fetch what did not come along with its notice.

        A state remembers that it was asked for; so a value that is lost and computed again is
        fetched by itself.
        """
        for state in states:
            state.asked = True
            self.fetch(state)

    def stimulus_key_in_memory(self, peer, key, want, attempt, nbytes, type, holders, value):
        """[12] A result exists; a small one may be in the message.

        It may come more than once: for another attempt after a loss, or with other holders after a
        fetch that missed, or a copy.
        """
        if state := self.current(key, want):
            if state.attempt != attempt:
                state.misses = 0  # Those were of a value that is gone.
            state.attempt, state.nbytes, state.type, state.holders = attempt, nbytes, type, holders
            self.become(state, "finished")
            state.value = state.value or value
            self.fetch(state)

    def stimulus_key_lost(self, peer, key, want):
        """Every replica of a result is gone; it is being computed again (or, of data, given up).

        Users see it: what was finished is pending.  Unless its value is here: to them, all is well.
        """
        if state := self.current(key, want):
            self.become(state, "pending")

    def stimulus_key_retried(self, peer, key, want):
        """It had failed, and is tried again: it, an input or a dependent of it was retried.

        The one notice that undoes an error, which is final for all others (see ``current``).
        """
        if (state := self.futures.get(key)) and state.want == want and state.status == "error":
            self.become(state, "pending")

    def stimulus_key_erred(self, peer, key, want, exception, type, text):
        """The task failed, or will never be computed.

        ``exception`` are the frames of what was raised, by this task or one of its inputs.  There
        are none where no task raised (``KilledWorker``, ``ConnectionError``): then ``type`` and
        ``text`` say what happened.
        """
        if state := self.current(key, want):
            state.type = type
            self.become(state, "error", text, exception)

    def stimulus_key_cancelled(self, peer, key, want, text):
        """The scheduler does not know this want any more.

        So it leaves the table; but what is final stays what it is for the user.
        """
        if (state := self.futures.get(key)) and state.want == want:
            self.let_go(state, text, kept="error")

    def stimulus_scheduler_left(self, text):
        """The stream ended: nothing that is not here yet will come.

        Not even values whose holders still live: workers end when their scheduler does.
        """
        for state in list(self.futures.values()):
            self.stimulus_key_cancelled(SCHEDULER, state.key, state.want, text)

    def current(self, key, want):
        """The state that a notice speaks of; what was being fetched for it is not any more.

        None if the notice is stale: while it was under way, its want ended (and perhaps the key is
        wanted anew, or retried, under another number), or what is computed again had reached this
        client.  (But who scatters once more what is here, waits for the notice.)
        """
        state = self.futures.get(key)
        if state and state.want == want and (state.data or not state.final):
            self.fetching.pop((key, state.attempt), None)
            return state

    def known(self, key, call):
        """The state of a key that is wanted already, with one more reference; or None."""
        if state := self.futures.get(key):
            state.count += 1
            if state.call not in (call, None):
                self.warnings.append(ANOTHER_CALL.format(key))
                state.call = None  # Once is enough.
        return state

    def let_go(self, state, text, kept=""):
        """It is not wanted any more; if its value is under way, that comes in vain.

        Unless its status is one to be ``kept``, it is cancelled from now on; ``text`` says why.
        """
        del self.futures[state.key]
        self.fetching.pop((state.key, state.attempt), None)
        if state.status != kept:
            self.become(state, "cancelled", text)
        state.text = state.text or text  # Also of what is here: why nothing is made from it.

    def become(self, state, status, text="", exception=()):
        """What users see changes, unless its value is here: that is final.

        Data that has a place by now, or needs none any more, is not kept here.
        """
        if not state.value:
            state.status, state.text, state.exception = status, text, exception
        if state.data and status != "pending":
            state.data = ()
            self.puts.pop(state, None)
        self.news.append(state)

    def fetch(self, state):
        if state.asked and state.status == "finished" and not state.value:
            self.need((state.key, state.attempt), state.holders)

    def arrived(self, name, ok, value):
        """A value is here; or the exception that says why its holder cannot pickle it.

        It is the value of the attempt that the state names: a fetch ends when its state leaves the
        table (``let_go``) or hears of another attempt (``current``).
        """
        state = self.futures[name[0]]
        if ok:
            state.value = value
            self.news.append(state)
        else:
            self.become(state, "error", exception=value)

    def missed(self, name, misses):
        """Tell the scheduler of a value that nobody gave; it will answer, or already has.

        Already, if the value was lost: then "key-lost" and this message cross.  Whom to ask next is
        for the scheduler to say.  After some such rounds the fetch errs: this client cannot reach
        who has the value, which is nobody else's business.
        """
        state = self.futures[name[0]]
        state.misses += bool(misses)  # (None, if all had died before they were asked.)
        if state.misses > ALLOWED_FAILURES:
            state.type = "ConnectionError"
            text = f"{state.key!r} could not be fetched from {', '.join(misses)}"
            self.become(state, "error", text)
        else:
            self.become(state, "pending")
            again = state.misses > 1
            self.send(SCHEDULER, "fetch-missed", state.key, state.want, name[1], misses, again)

    def validate(self):
        super().validate()
        for key, state in self.futures.items():
            # C1. What is wanted has a live Future object, and is not cancelled.
            assert state.key == key and state.count > 0 and 0 < state.want < self.number, state
            assert state.status in ("pending", "finished", "error"), state
            # C2. A value belongs to a finished state, a reason to one that erred.
            assert state.status == "finished" or not state.value, state
            assert state.status != "finished" or state.attempt, state
            assert (state.status == "error") == bool(state.exception or state.text), state
            assert state.status != "error" or not state.data, state
            # C3. What somebody waits for is on its way exactly when it exists and is not here.
            waits = state.asked and state.status == "finished" and not state.value
            assert waits == ((key, state.attempt) in self.fetching), state
        # C4. What is fetched, or put, is wanted, and wants differ.
        assert all(name[0] in self.futures for name in self.fetching)
        assert all(self.futures.get(state.key) is state and state.data for state in self.puts)
        assert len({state.want for state in self.futures.values()}) == len(self.futures)


# ---- 3. Scheduler mind: TaskState, WorkerState, ClientState, SchedulerMind ----
#
# What runs where, who holds what, what can go.  It may use chapter 1.  By habit of the field
# ``ts``, ``ws``, ``cs`` are a TaskState, a WorkerState, a ClientState.  Times are whole
# microseconds and sizes whole bytes, so that what was added is subtracted exactly.
#
#   Where.  Every task that can run waits here, on the scheduler: in the queue common to all, or
#       (with inputs or restrictions) in that of the worker where it would start first.  It is sent
#       when that worker has room; so priorities count until the last moment, and no worker has to
#       be asked when what waits is cancelled, or stolen by an idle one.
#   How long.  A result stays while a client wants it or an unfinished task needs it.  The call
#       that made it stays known while something that is kept might have to be computed from it
#       again: that is all there is to recovery (Spark calls the same idea lineage).
#   What if.  A lost worker takes along its attempts, which are placed again, and its values, which
#       are computed again as far as they are needed.  What was on two of them is suspected of
#       having killed both.  Scattered data has no call: it is lost for good, and who needs it is
#       told so.
#   Data.  Two kinds of attempt compute nothing, and take no thread.  A *put* brings scattered data
#       from a client that gives it to a worker; meanwhile its task is in "processing".  A *copy*
#       brings a value from one worker to another: for a broadcast, off a worker that leaves, around
#       a broken link.  Its task is in "memory", and stays there.  What a worker is to get in either
#       way is its ``arriving``.  And since no call makes data, its only replica is not freed when
#       somebody could not fetch it: it is *stuck* there, and who needs it goes there.
#
# How much a worker is sent is its *room*.  Say that it has two threads, so a room of 10,000 us.  Of
# tasks known to take 1,000 us it is sent ten, which keep it busy while the next are on their way.
# Of tasks that take a second it is sent two, one for each thread; and two of a function that nobody
# has measured yet, since it might take an hour, with others waiting behind it.

# The costs are guesses, and are only compared with each other: a wrong one makes a task start
# somewhat later than it could, never a result wrong.

# Work, known to be short, that a thread is sent early.  It hides a round trip of some hundred us,
# which would cost tasks of 1,000 us a third of the time.  Of more, more would have to wait behind
# a long one; and it is at stake when a worker dies.
ROOM_US = 5_000
UNKNOWN_US = 500_000  # what a task of an unmeasured function is taken for
CALL_US = 20  # what any call costs its worker: so of those that take no time, 250 fill that room
# dask: measures how fast workers transfer.
TRANSFER_US = 1_000  # what any transfer costs, ...
BYTES_PER_US = 100  # ... and how much is transferred in a microsecond: 100 MB/s
MANY = 1 << 50  # more tasks than are ever submitted


@dataclass(eq=False, slots=True)
class TaskState:
    """What the scheduler believes about one task.

    A task is a call; or it is *data* that a client scattered, which nobody can compute.  Then its
    ``run_spec`` is empty, and its attempts are those to put it on a worker.

    There may be a million of them: so a record has slots, and a container only from when there is
    something to put into it.  Until then ``()`` does as an empty one.
    """

    key: "str | tuple"
    name: str  # of the function: tasks of one name are expected to take equally long
    priority: int  # the smallest goes first: see ``new_task``
    run_spec: tuple  # frames of the pickled call
    restrictions: tuple = ()  # names of the workers that may run it; (): any
    loose: bool = False  # others may, too, while there is none of these
    retries: int = 0  # how often it may still raise
    state: str = "released"
    dependencies: "dict[TaskState, None] | tuple[()]" = ()  # an ordered set, in all states
    dependents: "dict[TaskState, None] | tuple[()]" = ()  # transpose of dependencies

    # Why it is kept.  ``waiters`` are the dependents in waiting, queued, no-worker, processing.
    who_wants: "dict[ClientState, None] | tuple[()]" = ()  # transpose: ClientState.wants_what
    waiters: "dict[TaskState, None] | tuple[()]" = ()

    # In "waiting" only: the dependencies without a value.  (What loses one in "queued" or
    # "no-worker" goes back to "waiting".)  No transpose of ``waiters``: a task stays a waiter of a
    # dependency that has its value.
    waiting_on: "dict[TaskState, None] | tuple[()]" = ()
    # In "queued" only: where it waits.
    queue: "HeapSet | None" = None
    # In "processing" only.  Transpose: WorkerState.processing, but for data, which takes no thread.
    processing_on: "WorkerState | None" = None
    # In "processing" and "memory": the attempt that makes, or made, its value.  Elsewhere 0, so
    # that no attempt that is still under way can be taken for the current one.
    attempt: int = 0
    # In "processing", the attempt to put data on a worker; in "memory", those to copy a value.
    arriving: "dict[int, WorkerState] | tuple[()]" = ()  # transpose: WorkerState.arriving
    # In "memory" only:
    who_has: "dict[WorkerState, None] | tuple[()]" = ()  # transpose: WorkerState.has_what
    targets: "list[WorkerState] | tuple[()]" = ()  # which workers will be sent copies after those
    nbytes: int = 0  # (both are known of data before, and are kept when a value is lost)
    type: str = ""
    value: tuple = ()  # frames that came with the news, until the clients were told
    # In "erred" only, or on the way there: (frames, or none where nothing was pickled; kind; words)
    error: tuple = ()

    # What has gone wrong without its raising.  (The scheduler's mind explains these words in
    # ``strike`` and ``suspect``.)
    misses: int = 0  # how often one of its inputs could not be had, or its data not be put
    strikes: int = 0  # how often it was computed in vain, since nobody could fetch its value
    witness: bool = False  # it was on a worker that died, and has not ended since
    suspect: bool = False  # once more, or it was alone there
    deaths: tuple = ()  # the workers that died while it was alone there, and how
    stuck: bool = False  # the only copy could not be fetched, or not be pickled
    # Of data only:
    givers: "dict[ClientState, bool] | tuple[()]" = ()  # who has it until it is in memory, and
    #                                                     whether all workers should get it
    lost: str = ""  # that it was, and with whom (known of calls, too, which have no use for it)
    why: str = ""  # why it cannot be computed again, though once it was

    def __repr__(self):
        return f"<TaskState {self.key!r} {self.state}>"


@dataclass(eq=False, slots=True)
class WorkerState:
    """What the scheduler believes about one worker process."""

    id: str  # address and process: what comes back at an address is another worker
    name: str
    nthreads: int
    seen_us: int  # when it gave its last sign of life
    # Attempts sent and not ended, abandoned ones too: they occupy its threads all the same.
    processing: dict = field(default_factory=dict)  # {attempt: (TaskState, duration_us)}
    # {attempt: TaskState}: puts and copies; transpose: TaskState.arriving
    arriving: dict = field(default_factory=dict)
    # An ordered set of TaskStates; transpose: TaskState.who_has
    has_what: dict = field(default_factory=dict)
    # Before it goes (see ``may_go``): a list of TaskStates that are being copied; and to whom each
    # was to be, {TaskState: ordered set of WorkerStates}
    leaving: list = field(default_factory=list)
    tried: dict = field(default_factory=dict)
    queue: "HeapSet | None" = None  # {what waits for this very worker: its expected duration_us}
    nbytes: int = 0  # sum over has_what
    occupancy: int = 0  # microseconds of work, sent or queued
    taken_us: int = 0  # how much of its room is taken: by each attempt, ROOM_US at most
    load: int = 0  # which of SchedulerMind.by_load it stands in
    # Why it is sent less, or nothing:
    alone: bool = False  # what runs there is a suspect, beside which nothing is sent
    late: bool = False  # it gave back what had waited too long behind something that still runs

    @property
    def address(self):
        return self.id.partition("#")[0]

    def aliases(self):
        """What a user may call it."""
        short = self.address.removeprefix("tcp://")
        return self.id, self.name, self.address, short, short.rpartition(":")[0]


@dataclass(eq=False, slots=True)
class ClientState:
    """What the scheduler believes about one client."""

    id: str
    # {TaskState: the number of the want}; transpose: TaskState.who_wants
    wants_what: dict = field(default_factory=dict)
    # An ordered set of restrictions: its user knows that none of these is there.
    warned: dict = field(default_factory=dict)


# How loaded a worker is: it runs nothing; it has a free thread; its threads are busy, but with so
# little that more may be sent; it has enough; it takes no more.
EMPTY, FREE, ROOM, FULL, LEAVING = range(5)
GIVEN_UP = "CancelledError"  # the kind of an error that is a cancel: data was lost
LONG_AGO = "{!r} was cancelled, or lost, so long ago that nobody knows why"
WAITING = ("waiting", "queued", "no-worker")  # for inputs; for room; for a worker that may run it


class SchedulerMind(Mind):
    """Decides what runs where.

        released ---> waiting ------> queued ---> processing ---> memory
            |          |    |           ^              |
            v          |    v           |              v
        forgotten      |   no-worker ---+            erred
                       |                               ^
                       +-------------------------------+  (an input has failed)

    That is a task's way forward; data, which waits in no queue, goes from "waiting" or "no-worker"
    to "processing".  It comes back to "waiting" when what it has, or needs, is lost, when it is to
    be placed again, and when it is retried; from everywhere to "released" when nobody needs it.
    From there it is forgotten, if nothing that is kept might have to be computed from it again.
    The table has each edge.

    ``first_attempt`` must grow from one scheduler's life to the next.  A worker that gives no
    sign of life for ``ttl_us`` is dead.
    """

    TRANSITIONS = edges(
        released="waiting forgotten",
        waiting="queued no-worker processing erred released",
        queued="processing waiting no-worker released",
        no_worker="queued waiting processing released",
        processing="memory erred waiting released",
        memory="waiting released",
        erred="waiting released",
    )

    def __init__(self, first_attempt=1, ttl_us=30_000_000):
        super().__init__(first_attempt)
        self.tasks = self.records  # {key: TaskState}
        self.workers = {}  # {id: WorkerState}
        self.clients = {}  # {id: ClientState}
        self.queue = HeapSet()  # runnable tasks that any worker may take
        self.unrunnable = {}  # an ordered set of the tasks in "no-worker"
        self.passed = {}  # {(task, restrictions)}: whose clients are warned in this moment
        # Every worker stands in the set of its load.  (OrderedDict: its first is found at once,
        # however many were taken out before it; in a dict they would be passed over each time.)
        self.by_load = [OrderedDict() for _ in range(5)]
        # Those that do not leave, in the order in which they are given values to hold.
        self.staying = OrderedDict()
        self.crowded = OrderedDict()  # an ordered set of workers with something in their queue
        self.called = {}  # {name, address or host: ordered set of the WorkerStates called so}
        # An ordered set of workers that may have room for something.  What makes room puts them
        # here, so that no stimulus has to look through all of them.
        self.changed = {}
        self.durations = {}  # {function name: microseconds}, a moving average
        self.submitted = 0
        self.now_us, self.ttl_us = 0, ttl_us
        # {(client, key): why its want has ended}, for what it sent before it heard of that.
        self.endings = OrderedDict()
        self.news = []  # who came and went, and why, in words: for the body to log
        # Wants what no user waits for, and lets go when it has ended.
        self.keeper = ClientState("fire-and-forget")

    # Stimuli: clients.

    def stimulus_register_client(self, client, wants):
        """A client joins.  (It gets a worker's answer, but its own silence never counts.)"""
        self.clients[client] = ClientState(client)
        self.news.append(f"Client {client} joined")
        self.send(client, "registered", self.ttl_us)

    def stimulus_submit(self, client, key, want, name, run_spec, inputs, priority, *options):
        """[5] A client wants the result of a call.

        ``inputs`` are the tasks whose results are among its arguments, as (key, want);
        ``options`` are ``workers``, ``loose`` and ``retries``.

        A key may be known, from another client or as what something else is made from: then this is
        one more want of that task, which keeps its first call, priority and restrictions.  Whoever
        submits another call under that key is warned.
        """
        cs, ts = self.clients[client], self.tasks.get(key)
        for input_key, number in inputs:
            if self.wanted_by(cs, input_key, number) is None:
                # On one ordered stream that want can only have been cancelled or lost.  What
                # bears the key now may be another call of another client.
                text = self.endings.get((client, input_key), LONG_AGO.format(input_key))
                return self.end_want(client, key, want, text)
        if ts is None:
            dependencies = {self.tasks[input_key]: None for input_key, _ in inputs}
            ts = self.new_task(key, name, run_spec, dependencies, priority, *options)
        elif ts.run_spec != run_spec and not ts.why:  # (Else its call is not known any more.)
            self.send(client, "warning", ANOTHER_CALL.format(key))
        self.want(cs, ts, want)
        self.settle()

    def stimulus_scatter(self, client, key, want, nbytes, type, workers, broadcast):
        """A client has data, and gives it until it is in memory.

        ``nbytes`` is its size as an object; ``broadcast``: each worker shall have a copy.  Others
        may have scattered the same (keys are made from the data): while it is not in memory, this
        client is one more that can give it; afterwards it has nothing to do.
        """
        cs, ts = self.clients[client], self.tasks.get(key)
        if ts is None:
            ts = self.new_task(key, "scatter", (), (), 0, workers)
            ts.nbytes, ts.type = nbytes, type
        elif ts.run_spec:
            self.send(client, "warning", f"{key!r} is known as a call: its result is used")
        if ts.state == "memory" and broadcast:
            ts.targets = list(self.allowed(ts))
            self.copy_further(ts)
        elif ts.state not in ("memory", "erred") and not ts.run_spec:
            ts.givers = dict(ts.givers) | {cs: broadcast}
        self.want(cs, ts, want)
        self.settle()

    def stimulus_put_failed(self, client, key, attempt):
        """A client could not put its data where it was asked to.

        Stale if the worker has claimed it before (the connection broke only then), or is dead.
        Else another attempt asks for it again; after some, the next client that has the data.
        """
        if (ts := self.tasks.get(key)) and attempt in ts.arriving:
            ts.misses += 1
            if ts.misses > ALLOWED_FAILURES:
                ts.misses = 0
                del ts.givers[self.clients[client]]
            self.end_arrival(ts, attempt)
        self.settle()

    def stimulus_release_keys(self, client, names):
        """A client has no future of these keys any more.

        What runs for them is abandoned; what waits for room goes without a message to anybody.
        """
        cs = self.clients[client]
        for key, want in names:
            # None: this want was cancelled before its release came; perhaps there is another.
            if ts := self.wanted_by(cs, key, want):
                self.let_go(cs, ts)
        self.settle()

    def stimulus_cancel_keys(self, client, names, force):
        """A client cancels tasks, and with them those that depend on them.

        Another client's wants are left alone, unless ``force``.  A cancel is no more than that:
        wants end, and who had them is told.  What nobody needs then goes by itself.
        """
        cs, seen = self.clients[client], set()  # (however many ways lead to a dependent)
        for key, want in names:
            ts = self.wanted_by(cs, key, want)
            found = [ts] if ts else []
            for each in found:  # It grows meanwhile, by what is made from it.
                for wanting in [other for other in each.who_wants if force or other is cs]:
                    number, text = wanting.wants_what[each], f"{key!r} was cancelled by {client}"
                    self.end_want(wanting.id, each.key, number, text)
                    self.let_go(wanting, each)
                more = [dependent for dependent in each.dependents if dependent not in seen]
                seen.update(more)
                found += more
        self.settle()

    def stimulus_retry(self, client, key, want):
        """A client wants a task that failed once more, and its failed inputs if need be.

        ``want`` is the new number of its want.  If another client was first, the task may be
        running again, or be in memory: then this client is told so under the new number.
        """
        cs, ts = self.clients[client], self.tasks.get(key)
        if ts not in cs.wants_what:
            # It was cancelled, or lost, while the retry was under way.
            text = self.endings.get((client, key), LONG_AGO.format(key))
            return self.end_want(client, key, want, text)
        self.want(cs, ts, want, tell=ts.state != "erred")
        found, seen = [ts], {ts}
        for each in found:  # It grows meanwhile, by the inputs of what failed, or was released.
            more = each.dependencies if each.error or each.state == "released" else ()
            found += [other for other in more if other not in seen]
            seen.update(more)
        for each in found:  # It grows by what failed because they did, but not by its other inputs.
            if error := each.error:
                found += [other for other in each.dependents if other.error == error]
                each.error = ()
                self.mark(each)
                for wanting in each.who_wants:
                    self.send(wanting.id, "key-retried", each.key, wanting.wants_what[each])
        self.settle()

    def stimulus_fire_and_forget(self, client, names):
        """A client wants tasks to run, even if it lets go of them.

        The want of one more client, the keeper, which lets go when the task has ended (``tell``).
        """
        for key, want in names:
            if ts := self.wanted_by(self.clients[client], key, want):
                self.want(self.keeper, ts, 0)
        self.settle()

    def stimulus_client_left(self, client, how="connection lost"):
        """A client's connection is lost, or it has said that it goes: it wants nothing any more.

        If its process lives, all its futures are cancelled there: it cannot come back as this one.
        """
        if not (cs := self.clients.pop(client, None)):
            return  # It had said so before; or it was lost before it had registered.
        self.news.append(f"Client {client} left: {how}; it wanted {len(cs.wants_what)} results")
        for ts in list(cs.wants_what):
            self.let_go(cs, ts)
        self.settle()

    def stimulus_fetch_missed(self, client, key, want, attempt, holders, again):
        """A client could not get a value from any of its holders.

        It always gets an answer: who holds the value now, or the notice of a loss, which may cross
        this message.  If those are all who have it, they are sent a copy of what they have, to see
        whether they live: from who does, it comes back at once; if one is dead, we hear of that
        instead.  If this happens ``again``, and no link was broken for once, a copy is made where
        this client perhaps can reach it.  Nothing is freed because a client missed it; that who is
        to have the copy misses it too is another matter (``strike``).
        """
        cs = self.clients[client]
        ts = self.wanted_by(cs, key, want)
        # Otherwise it was let go meanwhile; or lost or made again, and that notice is under way.
        if ts is not None and ts.state == "memory" and ts.attempt == attempt:
            for ws in [ws for ws in map(self.workers.get, holders[1:]) if ws in ts.who_has]:
                ts.who_has[ws] = ts.who_has.pop(ws)  # Others come first.  (See ``holders``.)
            if not ts.arriving and all(ws.id in holders for ws in ts.who_has):
                for ws in list(ts.who_has):
                    self.copy(ts, ws)
                if again:
                    self.copy_elsewhere(ts)
            self.tell(ts, cs)  # While copies are under way, after the last of them.

    def stimulus_query(self, client, number, what, keys):
        """A client looks inside: rows of what is known of tasks, or of the workers so called.

        ``what`` names one of the methods below; ``keys`` are tasks' keys, or workers' names.
        (Pairs, and no dict of them: its keys would have to be strings in JSON.)
        """
        self.send(client, "answer", number, getattr(self, f"facts_{what}")(keys))

    def stimulus_shutdown(self, client):
        """The cluster ends: workers do not complain, and clients wait no longer."""
        self.news.append(f"The cluster is shut down by {client}")
        for peer in (*self.workers, *self.clients):
            self.send(peer, "goodbye")

    def facts_who_has(self, keys):
        tasks = [self.tasks[key] for key in keys or self.tasks if key in self.tasks]
        return [(ts.key, [ws.address for ws in ts.who_has]) for ts in tasks]

    def facts_nbytes(self, keys):
        return [(key, self.tasks[key].nbytes) for key, some in self.facts_who_has(keys) if some]

    def facts_has_what(self, names):
        return [(ws.address, [ts.key for ts in ws.has_what]) for ws in self.named(names)]

    def facts_processing(self, names):
        tasks = {ws: [ts.key for ts, _ in ws.processing.values()] for ws in self.named(names)}
        return [(ws.address, keys) for ws, keys in tasks.items()]

    def facts_workers(self, names):
        fields = ("id", "name", "nthreads", "nbytes")
        return [(ws.address, {f: getattr(ws, f) for f in fields}) for ws in self.named(names)]

    def facts_story(self, keys):
        keys = {*keys}
        lines = [(*line, ws.id if ws else "") for *line, ws in self.story if line[0] in keys]
        return list(enumerate(lines))

    def named(self, names):
        return [ws for ws in self.workers.values() if not names or {*names} & {*ws.aliases()}]

    # Stimuli: workers.

    def stimulus_register_worker(self, worker, name, nthreads, values, attempts):
        """A worker joins; it holds and runs nothing yet.

        Names differ, since tasks can be restricted to one, and reports of deaths speak of them.
        (One that is leaving is called nothing any more: its successor may bear its name.)

        What is still known at its address is taken for this very process, cut off before it could
        hear that it had joined.  It lives: so nobody is blamed.
        """
        if nthreads < 1:
            raise ProtocolError(f"a worker with {nthreads} threads")
        ws = WorkerState(worker, name, nthreads, self.now_us)
        for old in [old for old in self.called.get(ws.address, ()) if old.address == ws.address]:
            self.withdraw(old)
            self.dismiss(old, "cut off, and has registered again")
        if any(other.name == name for other in self.called.get(name, ())):
            text = f"a worker named {name!r} is there already"
            text += ": choose another name, or try again soon if it has died"
            self.news.append(f"Worker {worker} was refused: {text}")
            self.send(worker, "refused", text)
            return self.settle()
        self.workers[worker], ws.queue = ws, HeapSet(ws)
        self.news.append(f"Worker {worker} ({name}) joined, threads: {nthreads}")
        self.by_load[EMPTY][ws] = self.staying[ws] = self.changed[ws] = None
        for alias in ws.aliases():
            self.called.setdefault(alias, {})[ws] = None
        self.send(worker, "registered", self.ttl_us)
        self.marked |= self.unrunnable
        for cs in [*self.clients.values(), self.keeper]:
            cs.warned.clear()
        self.settle()

    def stimulus_heartbeat(self, worker):
        """A worker gives a sign of life."""
        self.workers[worker].seen_us = self.now_us

    def stimulus_time_passes(self, now_us):
        """What the time is, every now and then: who was silent for too long is dead."""
        self.now_us = now_us
        for ws in list(self.workers.values()):
            if now_us - ws.seen_us > self.ttl_us:
                self.dismiss(ws, f"silent for more than {self.ttl_us / 1_000_000:g} s")
        self.settle()  # Only now: nothing must be sent to the next one that is dead.

    def stimulus_leave(self, peer):
        """A peer wants to go.  A client may; what only a worker holds is first copied to others.

        From now on it is sent nothing to run.  What it has not begun comes back by itself, in
        messages that follow this one; what was sent to it meanwhile does, too.
        """
        if peer in self.clients:
            return self.stimulus_client_left(peer, "closed")
        ws = self.workers[peer]
        self.withdraw(ws)
        self.account(ws, 0, 0)
        self.settle()

    def stimulus_worker_left(self, worker, how="connection lost"):
        """A worker is lost.  ``how`` goes into the reports: an exit code, or a signal."""
        self.lose(worker, how)
        self.settle()

    def dismiss(self, ws, how):
        """Lose a worker that may be alive: then it hears that it is taken for dead, and ends."""
        self.send(ws.id, "refused", f"this worker was {how}")
        self.lose(ws.id, how)

    def lose(self, worker, how):
        """A worker takes its attempts and its data with it.

        Facts are changed here, and tasks marked; ``settle`` finds what follows.  A task that
        was sent there is placed again.  One whose only value was there is computed again if
        somebody needs it; for that it needs its inputs, which are computed again as far as they are
        gone, and so on: nobody walks through the graph to plan a recovery.

        Peers learn of the death from here alone.  Those that find a connection broken conclude
        nothing from it.
        """
        if not (ws := self.workers.pop(worker, None)):
            return  # It was refused, or declared dead before its connection was lost.
        departed = f"{worker} ({ws.name}): {how}"
        self.news.append(f"Worker {worker} ({ws.name}) left: {how}")
        for peer in (*self.workers, *self.clients):
            self.send(peer, "worker-left", worker)
        alone = len(ws.processing) == 1
        for attempt in list(ws.processing):
            ts, current = self.end_attempt(ws, attempt)
            if current and ws in self.staying:
                self.suspect(ts, departed, blamed=alone)
        self.withdraw(ws)
        for ts in list(ws.has_what):
            self.remove_replica(ts, ws)
            ts.lost = "" if ts.who_has else f"was lost with {departed}"
        for attempt, ts in list(ws.arriving.items()):
            self.end_arrival(ts, attempt)
        del self.by_load[ws.load][ws]
        self.changed.pop(ws, None)

    def suspect(self, ts, departed, blamed):
        """``ts`` was on a worker that died; ``departed`` says which one, and how.

        Which of several did it, nobody knows, and mostly none did.  So each is a *witness*, and is
        placed again like any other, mostly apart from the others.  A witness of two deaths is a
        *suspect*, and from now on runs alone.  Only one that was alone is blamed, so that no
        innocent one fails with it.

        Were all of them blamed, a long task that shares its worker with a killer, and is placed
        again beside it each time, would fail with it.  The price is that each suspect waits for a
        worker to run empty: with 16 at once, a cluster would stand still.  A task is neither any
        more when it has a value, or has failed.  The death of a worker that was leaving counts not.
        """
        # dask: whatever was on the worker is blamed, also what had not started.
        ts.suspect, ts.witness = ts.witness or blamed, True
        ts.deaths += (departed,) if blamed else ()
        if len(ts.deaths) > ALLOWED_FAILURES:
            text = f"{ts.key!r} was alone on each of these when they died: {'; '.join(ts.deaths)}"
            text += ": try that call in a Python of its own, and look at its memory"
            ts.error = ((), "KilledWorker", text)

    def stimulus_task_finished(self, worker, attempt, nbytes, type, duration_us, value):
        """[11] A worker says that an attempt has made its value, and that it holds it.

        ``duration_us`` is how long it took, unpickling included; ``nbytes`` is the size of the
        result as an object; ``value`` are its frames if they are few and a client wants it.  How
        long it took is worth knowing also of an attempt that was abandoned.
        """
        ws = self.workers[worker]
        ts, current = self.end_attempt(ws, attempt)
        average = self.durations.get(ts.name, duration_us)
        self.durations[ts.name] = (average + duration_us) // 2
        forget_oldest(self.durations)
        if current:
            ts.nbytes, ts.type, ts.value = nbytes, type, value
            self.add_replica(ts, ws)
        else:
            # Abandoned, while it ran or this message was under way: it was let go, or is in vain.
            self.send_name(worker, "free-keys", (ts.key, attempt))
        self.settle()

    def stimulus_task_erred(self, worker, attempt, exception):
        """A worker says that an attempt raised.

        While it has retries it has no error, and so is what it was before: a task that can run.  Of
        an attempt that was abandoned, nobody wants to know how it ended.
        """
        ts, current = self.end_attempt(self.workers[worker], attempt)
        if current and ts.retries:
            ts.retries -= 1
        elif current:
            ts.error = (exception, "", "")
        self.settle()

    def stimulus_task_returned(self, worker, attempt, misses):
        """A worker gives an attempt back, which it had not started.

        ``misses`` says which inputs it could not have, and who was asked.  What happens next is
        ordinary placement.  A copy is an attempt that is returned as soon as its input is there.

        Without a miss, an attempt was given back because it would have begun *late*: what runs on
        that worker takes longer than its function did before.  Until something ends there, and we
        know better, that worker gets one task for each thread; else what came back would be sent
        into the same queue again.  (The same if nobody needed it, if it was sent early, or if an
        input was freed there meanwhile: to be careful costs little.)
        """
        ws, missed = self.workers[worker], ""
        for key, number, holders in misses:
            # Another number: that value was lost or let go, and the miss is no news.
            if (ts := self.tasks.get(key)) and ts.attempt == number and ts.state == "memory":
                missed = f"{worker} could not fetch {key!r} from {', '.join(holders)}"
                self.strike(ts, holders)
        if attempt in ws.arriving:
            ts = ws.arriving[attempt]
            # Neither here nor missed: then its holder cannot pickle it.
            ts.stuck = ts.stuck or not (misses or ws in ts.who_has or ws.load == LEAVING)
            self.end_arrival(ts, attempt)
        elif attempt in ws.processing:  # Else a copy that nobody needs any more.
            ts, current = self.end_attempt(ws, attempt, late=ws.late or not misses)
            if current and missed:
                # Counted until it has failed, or nobody needs it.  Were it tried for ever, the user
                # would see a task that is pending, and no reason.
                ts.misses += 1
                if ts.misses > ALLOWED_FAILURES:
                    ts.error = ((), "ConnectionError", missed)
        self.settle()

    def stimulus_add_keys(self, worker, names):
        """A worker says that it holds values that were put there, or that it has fetched.

        It may be asked for them by others from now on.  A put ends here; a copy only when its
        attempt is returned, which is the worker's next message about it.
        """
        ws = self.workers[worker]
        for key, attempt in names:
            ts = self.tasks.get(key)
            if not ts or ts.attempt != attempt or not (ts.who_has or attempt in ws.arriving):
                # It was let go or lost meanwhile; or nobody has asked this worker for it.
                self.send_name(worker, "free-keys", (key, attempt))
                continue
            self.add_replica(ts, ws)
            if attempt in ts.arriving:  # A put.
                ts.targets = list(self.allowed(ts)) if any(ts.givers.values()) else ()
                ts.givers = ()
                self.end_arrival(ts, attempt)
        self.settle()

    # What a task should be, and where.
    #
    # Runnable tasks wait here, and a worker is sent one when it has *room*.  To send each task at
    # once to the worker that seems best then would be simpler: but later tasks of higher priority
    # would stand behind it, a worker that joins would find nothing to do, and to cancel would take
    # a message.  What waits here can be decided anew until the last moment.
    #
    # For a task without inputs all workers are alike: it waits in the common queue.  One with
    # inputs or restrictions, or a suspect, waits for the worker where it would start first; others
    # may steal it.
    # ``settle`` empties both: each worker that may have got room takes from its own queue and the
    # common one, whichever head goes first; then the common queue's head goes to who has room.

    def goal(self, ts):
        """What ``ts`` should be, given who wants it and what its neighbours are.

        The order of the questions matters: is it needed at all, has it failed, has it a value, is
        it under way, has it its inputs, may it run anywhere?
        """
        if not (ts.who_wants or ts.waiters):
            # Data that is let go is forgotten at once: nobody could use it without its value.
            kept = ts.dependents and ts.run_spec
            return "forgotten" if ts.state in ("released", "forgotten") and not kept else "released"
        if ts.error:
            # By way of "waiting", since what waits in a queue has no edge to "erred".
            return "waiting" if ts.state in ("queued", "no-worker") else "erred"
        if ts.who_has:
            return "memory"
        if ts.processing_on:
            return "processing"  # Only the end of its attempt changes that, or an error.
        if ts.state not in WAITING or ts.waiting_on or not (ts.run_spec or ts.givers):
            return "waiting"  # (For nothing, if it is data that nobody gives: see ``give_up``.)
        if not self.allowed(ts):
            return "no-worker"
        return "queued" if ts.run_spec else "processing"

    def settle(self):
        """Take the edges; send what there is room for; let a worker go that leaves; and again.

        Afterwards no thread is idle while something waits for it, unless a suspect goes first
        (``validate`` S3, W3): whatever makes room or brings work ends here, so nothing has to poll.
        """
        super().settle()
        self.fill()
        while ws := self.may_go():
            self.send(ws.id, "goodbye")
            self.lose(ws.id, "it said good-bye")
            super().settle()
            self.fill()
        self.passed.clear()

    def fill(self):
        """Send what waits for as long as there is room."""
        while self.changed:
            ws, _ = self.changed.popitem()
            while ts := self.next_for(ws):
                self.process(ts, ws)
            if ws.queue and (self.by_load[EMPTY] or self.by_load[FREE]):
                for idle in self.candidates(ws.queue.peek(), lambda ws: not ws.queue):
                    if idle and idle.load <= FREE and not idle.queue:
                        self.changed[idle] = None  # It may steal.
        while (ts := self.queue.peek()) and (ws := self.room_for(ts)):
            self.process(ts, ws)

    def may_go(self):
        """A worker that leaves, and has handed over what no worker that stays has; or None.

        ``ws.leaving`` holds what is being copied; when it is empty, and nothing more is found here,
        the worker may go.  A value that is computed, or copied, there meanwhile is found too; and
        one whose copy has failed is found again, and offered to others, but to few: what nobody can
        fetch, or it cannot pickle, must not keep it for ever.  Who leaves, too, or dies before it
        has its copy, does not count.
        """
        for ws in self.by_load[LEAVING]:
            while ws.leaving and not ws.leaving[-1].arriving:
                ws.leaving.pop()  # The copy is there; or it failed, or is not needed any more.
            # Others may have come or gone since it was last looked at what only this one has.
            for ts in () if ws.leaving else ws.has_what:
                if self.staying.keys().isdisjoint(ts.who_has):
                    tried = ws.tried.setdefault(ts, {})
                    few = len(tried.keys() & self.staying.keys()) < ALLOWED_FAILURES
                    if few and not ts.arriving:
                        tried[self.copy_elsewhere(ts, *tried)] = None
                    if ts.arriving:
                        ws.leaving.append(ts)
            if not ws.leaving:
                return ws

    def next_for(self, ws):
        """What ``ws`` has room for: of its own queue, of the common one, or of another worker's.

        Only the first of both heads is looked at.  Behind it may stand what would fit where a
        suspect does not.  But then no worker would ever be empty for it, while others keep coming.
        """
        ts, other = ws.queue.peek(), self.queue.peek()
        if ts is None or (other and other.priority < ts.priority):
            ts = other
        if ts:
            return ts if self.has_room(ws, ts) else None
        return self.steal(ws) if self.crowded and ws.load <= ROOM else None

    def steal(self, ws):
        """What waits for another worker, and would start sooner here, with its inputs moved.

        Only a worker with room and nothing of its own asks; without a free thread, it takes what it
        has the inputs of.  It compares when the task would start here (its inputs have to be moved)
        with the work that it would wait for there.  So tiny tasks on one worker's large data stay
        there, or come back once they are known to be tiny, and slow ones spread.  Nothing was
        sent yet, so the victim need not be asked.  A few victims are looked at, and of each the
        head; one with an input that is *stuck* (``strike``) stays, since that could not be moved.
        """
        # dask: takes back what was sent already, so it has to ask the victim, who may have begun.
        for victim in list(islice(self.crowded, LIMITS["holders"])):
            self.crowded.move_to_end(victim)  # Next time others are looked at.
            ts = victim.queue.peek()
            waiting_us = self.busy_us(victim) - victim.queue[ts] // victim.nthreads
            if ws in self.allowed(ts) and not any(d.stuck for d in ts.dependencies):
                if self.has_room(ws, ts) and self.start_us(ts, ws) < waiting_us:
                    if ws.load <= FREE or not self.moving_us(ts, ws):
                        return ts

    def has_room(self, ws, ts):
        """Whether ``ts`` may be sent to ``ws`` now: it has room, or can fetch in the meantime.

        Room is measured in time: what is not known to be short takes all that one thread has, some
        milliseconds.  So microsecond tasks run hundreds deep, and none waits behind an hour.
        With one task for each thread alone, a thread would wait for a round trip after each, which
        takes many times as long as a tiny task; with much more, a few workers would swallow what
        many could share.

        What is not known to be short does not wait for a free thread: what runs there may be
        wrongly taken to be short, and who is not sent cannot come back late, to go elsewhere.
        """
        # dask: room is a number of tasks for each thread (worker-saturation), not a time.
        if ts.suspect:
            return ws.load == EMPTY
        if ws.load != FULL or ws.alone or ws.late:
            return ws.load <= ROOM
        # One further task a thread is sent early if its inputs have to be fetched first.
        return len(ws.processing) < 2 * ws.nthreads and self.moving_us(ts, ws) > 0

    def room_for(self, ts):
        """A worker with room for ``ts``, and with nothing in its own queue that goes first.

        (It heads the common queue, in which no suspect waits.)
        """

        def before(ws):
            return not ws.queue or ts.priority < ws.queue.peek().priority

        return self.least_loaded(ROOM, before if self.crowded else None)

    def least_loaded(self, most, fits=None):
        """The least loaded of the workers that fit, with a load of at most ``most``, or None.

        Only a few are compared: with thousands of workers, deciding must not cost a scan.  Those
        that are about to go have the highest load of all, which nobody asks for.
        """
        for group in filter(None, self.by_load[: most + 1]):
            some = islice(filter(fits, group), LIMITS["holders"])
            if ws := min(some, key=lambda ws: ws.occupancy // ws.nthreads, default=None):
                return ws

    def next_holder(self, fits=None):
        """The next worker to be given a value: each in its turn, so that no memory fills alone."""
        if ws := next(filter(fits, self.staying), None):
            self.staying.move_to_end(ws)
        return ws

    def allowed(self, ts):
        """The workers that may run ``ts``, as an ordered set: those that it names, or all.

        An empty set says that none may, for now: such a task is in "no-worker".
        """
        if not ts.restrictions:
            return self.staying
        some = {ws: None for name in ts.restrictions for ws in self.called.get(name, ())}
        return self.staying if ts.loose and not some else some

    def decide_worker(self, ts):
        """The worker on which ``ts`` (with inputs or restrictions, or a suspect) would start first.

        An input that could not be fetched from its only holder draws it there, even against its
        restrictions: elsewhere it might never run.  But if there are several such holders, or those
        of its inputs have twice not reached each other, a third worker may reach all.
        """
        stuck = [ws for d in ts.dependencies if d.stuck for ws in d.who_has]
        if ts.misses > 1 and len({*stuck}) != 1:
            holders, allowed = {ws for d in ts.dependencies for ws in d.who_has}, self.allowed(ts)
            if third := self.least_loaded(FULL, lambda ws: ws in allowed and ws not in holders):
                return third
        return min(stuck or self.candidates(ts), key=lambda ws: (self.start_us(ts, ws), ws.nbytes))

    def candidates(self, ts, fits=None):
        """Where ``ts`` might start first, as an ordered set.

        The workers that are allowed; if all are, then the least loaded one that ``fits`` (None, if
        there is none), and holders of inputs.
        """
        some = self.allowed(ts)
        if some is self.staying:
            some = {self.least_loaded(FULL, fits): None}
            for dependency in sorted(ts.dependencies, key=lambda d: -d.nbytes):
                if len(some) <= LIMITS["holders"]:
                    holders = islice(dependency.who_has, LIMITS["holders"])
                    some |= {ws: None for ws in holders if ws.load != LEAVING}
        return some

    def start_us(self, ts, ws):
        """When ``ts`` would start on ``ws``, in microseconds from now.

        The sum of what has to be moved and of the work that waits.  Both go on at once in truth:
        the sum is too long by the shorter, but of two that are equally busy it prefers the holder.
        """
        return self.moving_us(ts, ws) + self.busy_us(ws)

    def busy_us(self, ws):
        """How long ``ws`` has work for.  If late, what runs was taken to be short, and is not.

        (Unless its threads are free again, or all its room was taken by what is not short: then it
        gave back what nobody needed, or was sent early for the sake of its inputs.)
        """
        late = ws.late and ws.load == FULL and ws.taken_us < ws.nthreads * ROOM_US
        return ws.occupancy // ws.nthreads + (UNKNOWN_US if late else 0)

    def moving_us(self, ts, ws):
        """How long ``ws`` would take to fetch the inputs of ``ts`` that it has not; 0 if none."""
        missing = [d.nbytes for d in ts.dependencies if ws not in d.who_has]
        return TRANSFER_US + sum(missing) // BYTES_PER_US if missing else 0

    def estimate(self, ts):
        return max(self.durations.get(ts.name, UNKNOWN_US), CALL_US)

    # What it means to enter a state, and to leave it.
    #
    # What one state owns (TaskState has the list) is cleared when it is left, whatever comes next.
    # Some of it is a fact that came first, and is why the state is entered: ``processing_on``,
    # ``who_has``, ``error``.  A neighbour learns of an edge by a change of one of its own facts,
    # and a mark.

    def enter_released(self, ts):
        """Nobody needs it.  (``leave_processing`` has abandoned an attempt that was under way.)"""
        self.stop_needing(ts)
        ts.attempt = 0
        self.leave_erred(ts)

    def enter_waiting(self, ts):
        """Somebody needs it: it needs its dependencies, which may have to be made again."""
        ts.attempt = 0
        ts.waiting_on = {d: None for d in ts.dependencies if not d.who_has}
        for dependency in ts.dependencies:
            dependency.waiters = dependency.waiters or {}
            dependency.waiters[ts] = None
            ts.error = dependency.error or ts.error
            self.mark(dependency)
        # Nobody makes this data, and nobody gives it any more.
        if not (ts.run_spec or ts.givers):
            self.give_up(ts)

    def leave_waiting(self, ts):
        """All inputs are there; or it has failed, or nobody needs it.  It waits on nothing."""
        ts.waiting_on = ()

    def enter_queued(self, ts):
        """It can run: it waits for room, on the worker where it would start first or on any.

        In a worker's queue it counts as work that waits there (``occupancy``), so that the next one
        is placed elsewhere when that is enough.  The estimate is kept, since the function may be
        measured meanwhile: what was added has to be subtracted exactly.
        A suspect waits for one worker to run empty: at the head of the common queue, it would keep
        all of them from taking anything else.
        """
        ts.queue, estimate_us = self.queue, 0
        if ts.dependencies or ts.suspect or self.allowed(ts) is not self.staying:
            ws = self.decide_worker(ts)
            ts.queue, estimate_us = ws.queue, self.estimate(ts)
            ws.occupancy += estimate_us
            self.by_load[ws.load].move_to_end(ws)  # As in ``account``.
            self.changed[ws] = self.crowded[ws] = None
        ts.queue.push(ts, estimate_us)

    def leave_queued(self, ts):
        """It is sent, or must not be: whatever waited behind it is looked at again."""
        if ws := ts.queue.worker:
            ws.occupancy -= ts.queue[ts]
            self.changed[ws] = None  # There may be room for what is next.
            if len(ws.queue) == 1:
                del self.crowded[ws]
        ts.queue.discard(ts)
        ts.queue = None

    def enter_no_worker(self, ts):
        """No worker that is here may run it.  Its users are warned: it may be a wrong name."""
        self.unrunnable[ts] = None
        found = [ts]
        for wanted in found:  # It grows meanwhile, by what is made from it.
            if (wanted, ts.restrictions) not in self.passed:
                self.passed[wanted, ts.restrictions] = None
                for cs in wanted.who_wants:
                    self.warn(cs, ts)
                found += wanted.waiters

    def leave_no_worker(self, ts):
        del self.unrunnable[ts]

    def enter_processing(self, ts):
        """[6] ``processing_on`` has room: a new attempt goes there, with the inputs' places.

        From now on only the end of the attempt, or of its worker, takes it out of that worker's
        books; the task itself may leave this state before, and even come back with another one.
        """
        ts.attempt = self.next_number()
        if not ts.run_spec:
            return self.ask_giver(ts)
        ws, duration_us = ts.processing_on, self.estimate(ts)
        ws.processing[ts.attempt] = (ts, duration_us)
        ws.alone = ts.suspect
        self.account(ws, duration_us, +1)
        places = [(d.key, d.attempt, self.holders(d)) for d in ts.dependencies]
        call = (ts.key, ts.attempt, ts.name, ts.run_spec, places, ts.priority, bool(ts.who_wants))
        self.send(ws.id, "compute-task", *call)

    def leave_processing(self, ts):
        """Its attempt has ended (and ``processing_on`` is None); or it is not needed, or in vain.

        Then the worker is asked to give it back; if it has begun, it is abandoned, and occupies its
        thread until it ends.  If the task is wanted again before, that is another attempt.
        """
        # dask: such a task is "cancelled" on its worker; wanted again, it is "executing" as before.
        if ts.processing_on:
            self.send(ts.processing_on.id, "give-back", [ts.attempt])  # If it has not started.
        ts.processing_on = None

    def enter_memory(self, ts):
        """It has a value: wake whoever waited, tell whoever asked."""
        self.stop_needing(ts)
        ts.witness, ts.suspect, ts.deaths = False, False, ()
        for dependent in ts.waiters:
            # (One that is processing had it already, and did not wait when it was lost.)
            if ts in dependent.waiting_on:
                del dependent.waiting_on[ts]
                self.mark(dependent)
        self.tell(ts)
        ts.value = ()  # What rode along was forwarded; the scheduler keeps none.

    def leave_memory(self, ts):
        """Nobody needs the value, and it is freed everywhere; or its last replica is gone.

        Then whoever waits for it, and is not under way with it, has to wait again.
        """
        for ws in list(ts.who_has):
            self.send_name(ws.id, "free-keys", (ts.key, ts.attempt))
            self.remove_replica(ts, ws)
        ts.targets = ()
        for attempt in list(ts.arriving):
            self.end_arrival(ts, attempt)
        for dependent in ts.waiters:
            if dependent.state != "processing":
                dependent.waiting_on = dependent.waiting_on or {}
                dependent.waiting_on[ts] = None
                self.mark(dependent)
        for cs in ts.who_wants:
            self.send(cs.id, "key-lost", ts.key, cs.wants_what[ts])

    def enter_erred(self, ts):
        """It failed, or a dependency did and gave it its exception: so does whoever waits.

        One that is processing has fetched what was lost since, or will return and fail.  But if
        it is lost data that was given up, nobody is left waiting for it: so it can be forgotten.
        """
        self.stop_needing(ts)
        ts.attempt = 0
        for dependent in ts.waiters:
            if dependent.state != "processing" or ts.error[1] == GIVEN_UP:
                dependent.error = ts.error
                self.mark(dependent)
        self.tell(ts)

    def leave_erred(self, ts):
        """It is retried, or nobody needs it: what went wrong is forgotten, blame and misses too."""
        ts.error, ts.misses, ts.strikes, ts.deaths = (), 0, 0, ()
        ts.witness = ts.suspect = False

    def enter_forgotten(self, ts):
        """Nothing that is kept might have to be computed from it.

        Or it is data, and what was made from it becomes data itself.

        Say ``y`` was made from the scattered ``x``, and the last future of ``x`` is dropped.  If
        ``x`` were kept because ``y`` might be lost, who drops data would free nothing while any
        result of it lives.  So ``x`` goes, and the call of ``y`` is of no use any more.  Without
        it, ``y`` needs no other inputs either, which may go, too; and what was made from ``y``
        loses its call when ``y`` goes.  If ``y`` is lost, ``why`` says what it was made from.
        """
        del self.tasks[ts.key]
        self.forget_call(ts)
        how = ts.lost or "was let go"
        for dependent in list(ts.dependents):
            dependent.run_spec = ()
            dependent.why = ts.why or f"; it was made from {ts.key!r}, which {how}"
            self.forget_call(dependent)
            self.mark(dependent)

    # What these methods call: most change a few facts, on both sides of a relation, and mark.

    def new_task(self, key, name, run_spec, dependencies, priority, workers=(), *options):
        """A task, which goes by the user's priority, then by when it was begun.

        What needs results that are not there yet counts as begun with the last of those: it goes
        before what was submitted between them and itself.  So of two maps, one of the results of
        the other, the first items have gone through both, and may be freed, when the last ones
        begin.  Were all of the first map computed before, all its results would have to be held.
        But who submits one call after the other on a result that is there must not go first for
        as long as that goes on.
        """
        # dask: to a like effect, only large groups with few or no inputs wait on the scheduler.
        self.submitted += 1
        begun = [d.priority // MANY % MANY for d in dependencies if not d.who_has]
        # In one number, since a heap does little but compare; the fraction of a user's priority is
        # scaled first, and what was begun together goes in the order of submission.
        first = max(begun, default=self.submitted) - int(priority * MANY) * MANY
        order = first * MANY + self.submitted
        ts = self.tasks[key] = TaskState(key, name, order, run_spec, tuple(workers), *options)
        ts.dependencies = dependencies or ()
        for dependency in dependencies:
            dependency.dependents = dependency.dependents or {}
            dependency.dependents[ts] = None
        return ts

    def wanted_by(self, cs, key, want):
        """The task that this client wants under this number, or None.

        None is normal: a cancel, or a loss, was under way to the client while it wrote.  The key
        may be wanted again under another number, which this message does not mean.
        """
        ts = self.tasks.get(key)
        return ts if cs.wants_what.get(ts) == want else None

    def want(self, cs, ts, number, tell=True):
        """A client wants a task; if the task has ended before, it is told so at once."""
        ts.who_wants = ts.who_wants or {}
        ts.who_wants[cs], cs.wants_what[ts] = None, number
        if tell:
            self.tell(ts, cs)
        self.mark(ts)

    def let_go(self, cs, ts):
        """A client wants a task no more; and gives its data no more, if it did."""
        del cs.wants_what[ts], ts.who_wants[cs]
        self.mark(ts)
        if cs in ts.givers:
            if next(iter(ts.givers)) is cs and ts.processing_on:
                self.end_arrival(ts, ts.attempt)
            del ts.givers[cs]

    def end_want(self, client, key, want, text):
        """Tell a client that its want has ended, and why.

        It may have sent more before it hears of that, to be made from this: then that ends for the
        same reason, which is kept for a while.
        """
        self.endings[client, key] = text
        forget_oldest(self.endings)
        self.send(client, "key-cancelled", key, want, text)

    def give_up(self, ts):
        """Data that nobody has is lost for good, and with it whatever waits for it.

        There is no call that makes it, and no client that gives it any more (``givers`` is empty
        from the moment when it was in memory: a client keeps no copy of all that it ever
        scattered).  So it has failed, and that spreads as errors do, and further: to what is
        processing with it.  But no call has raised, and a retry would be of no use: so all wants
        that need it end (``tell``).  What has its value already is not touched by the loss.  When
        nobody wants what waited for it, it has no waiters, and is forgotten like any other data.
        """
        otherwise = "cannot be computed again" if ts.why else "could not be put on any worker"
        ts.error = ((), GIVEN_UP, f"the data {ts.key!r} {ts.lost or otherwise}{ts.why}")

    def stop_needing(self, ts):
        """It is unfinished no longer: its dependencies may not be needed any more."""
        for dependency in ts.dependencies:
            if ts in dependency.waiters:
                del dependency.waiters[ts]
                self.mark(dependency)

    def forget_call(self, ts):
        """It will not be computed (again): its dependencies need not be kept for that."""
        for dependency in ts.dependencies:
            del dependency.dependents[ts]
            self.mark(dependency)
        ts.dependencies = ()

    def process(self, ts, ws):
        """Send a task at once: the next decision has to see how loaded ``ws`` is by then."""
        ts.processing_on = ws
        self.transition(ts, "processing")

    def end_attempt(self, ws, attempt, late=False):
        """An attempt's one end.  Returns its task, and whether the attempt was not abandoned.

        Abandoned: its task was let go, and perhaps wanted again, which makes another attempt.  Its
        value is never adopted for that: the key may bear another call by then.
        """
        ts, duration_us = ws.processing.pop(attempt)
        ws.alone, ws.late = False, late  # If it was alone: nothing was sent beside it.
        self.account(ws, duration_us, -1)
        current = ts.attempt == attempt
        if current:
            ts.processing_on = None
            self.mark(ts)
        return ts, current

    def account(self, ws, duration_us, sign):
        """Enter an attempt into a worker's books, or strike it out; find the worker's load.

        ``sign`` is +1, -1, or 0 where only the load may be another.  An attempt counts with what
        its function was known to take when it was sent, however long it takes in the end.  It takes
        as much of the room; but if it is not short, all that one thread has, ROOM_US.
        """
        ws.occupancy += sign * duration_us
        ws.taken_us += sign * min(duration_us, ROOM_US)
        # To the end, if only of the same set: ``least_loaded`` compares the first few there, and
        # would fill them up before it found the others.
        del self.by_load[ws.load][ws]
        ws.load = self.load_of(ws)
        self.by_load[ws.load][ws] = None
        if sign < 0:
            self.changed[ws] = None

    def load_of(self, ws):
        """How loaded it is.  Beside a suspect, and on a worker that is late, there is no room."""
        if ws not in self.staying:
            return LEAVING
        if len(ws.processing) < ws.nthreads and not ws.alone:
            return FREE if ws.processing else EMPTY
        room_us = 0 if ws.alone or ws.late else ws.nthreads * ROOM_US
        return ROOM if ws.taken_us < room_us else FULL

    def withdraw(self, ws):
        """It takes no work any more: what waits for it is placed again.

        If no worker is left that stays, what is in the common queue has "no-worker", too.
        """
        for alias in ws.aliases():
            if self.called.get(alias, {}).pop(ws, 0) is None and not self.called[alias]:
                del self.called[alias]  # The last that was called so.
        self.staying.pop(ws, None)
        for ts in list(ws.queue):
            self.transition(ts, "waiting")
            self.mark(ts)
        if not self.staying:
            self.marked |= self.queue

    def ask_giver(self, ts):
        """Ask the first client that has the data to put it on a worker.  (Workers take turns.)

        The bytes go straight from the client to the worker, and are not the scheduler's to wait
        for: so the task is in "processing", with an attempt that takes no thread and no place in
        the worker's books but ``arriving``.  It ends by the worker's claim ("add-keys"), by the
        client's "put-failed", by the worker's death, or because this client lets go; then, while
        any client is left that has the data, the task comes by here again, with another attempt
        and perhaps another worker.  So what comes late of the old one is stale, and freed.
        """
        ts.processing_on = ws = self.next_holder(self.allowed(ts).__contains__)
        ts.arriving, ws.arriving[ts.attempt] = {ts.attempt: ws}, ts
        cs = next(iter(ts.givers))
        self.send(cs.id, "put", ts.key, cs.wants_what[ts], ts.attempt, ws.id)

    def copy(self, ts, ws):
        """Let a worker fetch a value: an attempt with an input and without a call.

        For a broadcast, for a worker that leaves, for a client that cannot reach the only holder.
        To the worker it is like any other attempt, so it fetches, misses and returns it with what
        is there for all.  Here it is in no books but ``arriving``: the task is in memory, and stays
        there whether the copy comes or not.
        """
        attempt = self.next_number()
        ts.arriving = ts.arriving or {}
        ts.arriving[attempt], ws.arriving[attempt] = ws, ts
        places = [(ts.key, ts.attempt, self.holders(ts))]
        self.send(ws.id, "compute-task", ts.key, attempt, "copy", (), places, ts.priority, False)

    def copy_elsewhere(self, ts, *tried):
        """Copy a value to a worker that has it not, and is none of those that tried to fetch it.

        Returns that worker, or None.
        """
        if other := self.next_holder(lambda ws: ws not in ts.who_has and ws not in tried):
            self.copy(ts, other)
        return other

    def copy_further(self, ts):
        """Send the next copies of a broadcast; who has the value, or is gone, is passed by.

        It goes to those that were here when it began, or to those that it is tied to.  (Who joins
        later fetches it when needed.)  Not to all at once: the copies under way are no more than
        the holders, so who has got it gives it further, and the first one's network does not have
        to carry them all.
        """
        while ts.targets and len(ts.arriving) < len(ts.who_has):
            ws = ts.targets.pop()
            if ws in self.staying and ws not in ts.who_has:
                self.copy(ts, ws)

    def end_arrival(self, ts, attempt):
        """A put or a copy is there, or failed; or its worker or giver is gone; or it is of no use.

        After the last copy, whoever wants the value is told who holds it now.
        """
        del ts.arriving.pop(attempt).arriving[attempt]
        self.mark(ts)
        ts.processing_on = None  # (It is anyhow, if this was a copy: its task is in memory.)
        self.copy_further(ts)
        self.tell(ts)

    def add_replica(self, ts, ws):
        """``ws`` holds the value, which can be fetched there."""
        if ws not in ts.who_has:
            ts.who_has = ts.who_has or {}
            ts.who_has[ws] = ws.has_what[ts] = None
            ws.nbytes += ts.nbytes
            self.changed[ws] = None  # It may steal what has to move less now.
            if ts.stuck:
                ts.stuck = False
                self.changed |= ts.who_has  # What waits there may be stolen now.

    def remove_replica(self, ts, ws):
        """``ws`` holds the value no more.  The last one gone, it is lost or was let go."""
        del ts.who_has[ws], ws.has_what[ts]
        ws.nbytes -= ts.nbytes
        if not ts.who_has:
            ts.stuck = False
            self.mark(ts)

    def strike(self, ts, holders):
        """A value could not be fetched from these holders: free it there, so that others are used.

        If there is no other, it is computed again; but links can stay broken, so not for ever.
        Then it is kept, as the only copy of data always is: whoever needs it has to go there.  (It
        is kept before who needs it has missed it so often that this one fails.)

        Who is at fault, the holder, the link or the one that asked, cannot be known: the holder may
        just have been told to free it.  To free a replica that is good after all costs a transfer,
        or a computation; to keep one that cannot be had costs everybody who is sent there.  *Stuck*
        is what is not freed: tasks that need it are placed on its holder, and not stolen from
        there.  A second replica, wherever it comes from, ends that.  (Stuck, too, is what a worker
        was to copy, and its holder cannot pickle.)
        """
        again = ts.run_spec and ts.strikes + 1 < ALLOWED_FAILURES
        for ws in [self.workers[holder] for holder in holders if holder in self.workers]:
            if ws in ts.who_has and (again or len(ts.who_has) > 1):
                self.send_name(ws.id, "free-keys", (ts.key, ts.attempt))
                self.remove_replica(ts, ws)
                for attempt in [n for n, to in dict(ts.arriving).items() if to is ws]:
                    self.end_arrival(ts, attempt)  # Else its return would say: cannot be pickled.
            elif ws in ts.who_has:
                ts.stuck = True
        if not ts.who_has:
            ts.strikes += 1

    def holders(self, ts):
        """Where it can be fetched: some of the workers, since a broadcast has thousands.

        They are asked in this order, so another comes first each time.
        """
        if len(ts.who_has) > 1:
            first = next(iter(ts.who_has))
            ts.who_has[first] = ts.who_has.pop(first)
        return [ws.id for ws in islice(ts.who_has, LIMITS["holders"])]

    def tell(self, ts, *some):
        """Tell clients how a task that they want has ended, if so; or that no worker may run it.

        That is all who want it, or ``some``.
        While copies of it are being made, they are waited for: so a scatter with ``broadcast``
        returns when each worker has it, or failed to get it, and who could not fetch it is told of
        the new holder.
        """
        for cs in some or list(ts.who_wants):
            want = cs.wants_what[ts]
            if cs is self.keeper and ts.state in ("memory", "erred"):
                self.let_go(cs, ts)
            elif ts.state == "erred" and ts.error[1] == GIVEN_UP:
                self.end_want(cs.id, ts.key, want, ts.error[2])
                self.let_go(cs, ts)
            elif ts.state == "erred":
                self.send(cs.id, "key-erred", ts.key, want, *ts.error)
            elif ts.state == "memory" and ts.who_has and not ts.arriving:
                news = (ts.attempt, ts.nbytes, ts.type, self.holders(ts), ts.value)
                self.send(cs.id, "key-in-memory", ts.key, want, *news)
            elif ts.state == "no-worker":
                self.warn(cs, ts)

    def warn(self, cs, ts):
        """Until a worker joins, one warning is enough for all that wait for the same."""
        if ts.restrictions not in cs.warned:
            cs.warned[ts.restrictions] = None
            called = f" called {' or '.join(ts.restrictions)}" if ts.restrictions else ""
            self.send(cs.id, "warning", f"{ts.key!r} waits: there is no worker{called} yet")

    # Invariants.

    def validate(self):
        """Assert every invariant.  Slow by design: a live process does so only when asked to."""
        assert not (self.marked or self.changed or self.passed)
        tasks, workers = self.tasks.values(), self.workers.values()
        for ts in tasks:
            self.validate_task(ts)
        for ws in workers:
            self.validate_worker(ws)
        # S1. Every relation is known on both sides, and between records that are in the tables.
        check_transposes(tasks, "dependencies", tasks, "dependents")
        check_transposes(tasks, "who_wants", [*self.clients.values(), self.keeper], "wants_what")
        check_transposes(tasks, "who_has", workers, "has_what")
        arriving = {(attempt, ts, ws) for ws in workers for attempt, ts in ws.arriving.items()}
        assert arriving == {(n, ts, ws) for ts in tasks for n, ws in dict(ts.arriving).items()}
        # S2. Every table holds what its name says, and nothing else.
        queues = [self.queue, *(ws.queue for ws in workers)]
        assert all(ts.queue is queue for queue in queues for ts in queue)
        assert sum(map(len, queues)) == sum(ts.queue is not None for ts in tasks)
        assert not any(self.queue.values())
        assert all({*queue} <= {ts for _, ts in queue.heap} for queue in queues)
        assert [queue.worker for queue in queues] == [None, *workers]
        assert set(self.unrunnable) == {ts for ts in tasks if ts.state == "no-worker"}
        assert set(self.crowded) == {ws for ws in workers if ws.queue}
        assert sum(map(len, self.by_load)) == len(workers)
        assert [ts.key for ts in tasks] == [*self.tasks]
        assert [*self.workers, *self.clients] == [x.id for x in (*workers, *self.clients.values())]
        called = {(alias, ws) for alias, some in self.called.items() for ws in some}
        assert {*self.staying} == {ws for ws in workers if ws.load != LEAVING}
        assert called == {(alias, ws) for ws in self.staying for alias in ws.aliases()}
        # S3. No worker is free for what waits in the common queue, unless for what waits in its own
        # and goes first; and only who may not run anywhere has no worker.
        head = self.queue.peek()
        assert head is None or (self.staying and self.room_for(head) is None), head
        assert not any(self.allowed(ts) for ts in self.unrunnable)

    def validate_task(self, ts):
        # T1. A field owned by a state is set in exactly that state.
        assert bool(ts.waiting_on) == (ts.state == "waiting"), ts
        assert (ts.queue is not None) == (ts.state == "queued"), ts
        assert (ts.processing_on is not None) == (ts.state == "processing"), ts
        assert bool(ts.who_has) == (ts.state == "memory"), ts
        assert bool(ts.error) == (ts.state == "erred") and GIVEN_UP not in ts.error, ts
        assert bool(ts.attempt) == (ts.state in ("processing", "memory")) and not ts.value, ts
        assert (ts.attempt in ts.arriving) == (ts.state == "processing" and not ts.run_spec), ts
        assert ts.state == "memory" or not (ts.stuck or {*ts.arriving} - {ts.attempt}), ts
        assert ts.arriving or not ts.targets, ts
        # T2. What nobody needs is not kept; what somebody needs is not left undone.
        assert bool(ts.who_wants or ts.waiters) == (ts.state != "released"), ts
        assert ts.state != "released" or (ts.dependents and ts.run_spec), ts
        # T3. Data has no inputs; who gives it wants it, and gives it until it is in memory.
        assert ts.run_spec or not ts.dependencies, ts
        if ts.givers:
            assert {*ts.givers} <= {*ts.who_wants} and ts.state in ("processing", "no-worker"), ts
        if ts.state == "processing":
            ws = ts.processing_on
            here = ws.processing[ts.attempt][0] if ts.run_spec else ws.arriving[ts.attempt]
            assert here is ts and self.workers[ws.id] is ws, ts
            assert ts.suspect == ws.alone if ts.run_spec else ts.givers and not ts.suspect, ts
        assert ts.queue is not self.queue or not (ts.dependencies or ts.suspect), ts
        for dependency in ts.dependencies:
            # T4. A task is a waiter of its dependencies exactly while it is unfinished.
            assert (ts in dependency.waiters) == (ts.state in (*WAITING, "processing")), ts
            # T5. It waits on exactly those that have no value.  (One that is processing has
            # fetched what was lost meanwhile, or will return.)
            if ts.state in WAITING:
                assert (dependency in ts.waiting_on) == (dependency.state != "memory"), ts
        assert {*ts.waiters} <= {*ts.dependents} and {*ts.waiting_on} <= {*ts.dependencies}, ts

    def validate_worker(self, ws):
        # W1. Every counter can be recounted.
        durations = [duration_us for _, duration_us in ws.processing.values()]
        assert ws.nbytes == sum(ts.nbytes for ts in ws.has_what), ws
        assert ws.occupancy == sum(durations) + sum(ws.queue.values()), ws
        assert ws.taken_us == sum(min(d, ROOM_US) for d in durations), ws
        assert ws.load == self.load_of(ws), ws
        assert not ws.alone or (ws.load >= FULL and len(ws.processing) == 1), ws
        assert [ws in group for group in self.by_load] == [i == ws.load for i in range(5)], ws
        # W2. Who leaves waits for a copy that is under way.
        assert not ws.leaving or (ws.load == LEAVING and ws.leaving[-1].arriving), ws
        # W3. What waits for it has no room there, but for a suspect, which has to run alone.
        assert not ws.queue or ws.load > ROOM or ws.queue.peek().suspect, ws


def check_transposes(some, field, others, transpose):
    """Assert that ``b in a.field`` exactly if ``a in b.transpose``."""
    pairs = {(a, b) for a in some for b in getattr(a, field)}
    assert pairs == {(a, b) for b in others for a in getattr(b, transpose)}, field


# ---- 4. Worker mind: Attempt, WorkerMind ----
#
# Which attempts this worker has, which values it fetches and holds.  It may use chapter 1.
#
# A worker decides little.  It starts what is ready by priority, gives back what it cannot start,
# and holds each value until it is told to free it.  Several attempts to compute one key may be
# here at once, an abandoned one and the one that is wanted now: their numbers tell them apart.
#
# What comes in is an attempt, what goes out is its one end; in between, the worker waits for inputs
# and threads.  It never asks why something was sent, nor what becomes of what it gives back.  So a
# cancel, a lost input, a good-bye and a queue that does not move are one thing here: "returned".
#
# dask: a worker's state machine knows fetch, flight, missing, cancelled, resumed, rescheduled, ...
# of each key; here an attempt has a few states, and a fetch that is under way is in another table.


# Twice the room that the scheduler fills: what has waited for so long waits behind something that
# was taken to be short, and is not.  (Or it was sent early for the sake of its inputs: they are
# here now, and stay here when it goes back.)

LATE_US = 10_000  # what has been ready for so long, and has not begun, goes back


@dataclass(eq=False, slots=True)
class Attempt:
    """One try to compute a task here.  Several may bear one key; their numbers differ.

    One without a ``run_spec`` is there for its input: to hold a copy of it.
    """

    number: int
    key: "str | tuple"
    name: str
    run_spec: tuple
    priority: tuple  # the task's, then the number: no two are alike
    inputs: "list[tuple]"  # [(key, attempt)]: the values that it is called with
    wanted: bool  # a client wanted it when it was sent: a small result should ride along
    state: str = "waiting"
    # The inputs that are not here; none of them is left when it is ready.
    waiting_for: "dict[tuple, None] | tuple[()]" = ()
    # What it has to be whatever its inputs: "executing" when a thread has taken it, and then how
    # it ends ("finished", "erred", "returned"), with the fields of the message that says so.
    fate: str = ""
    told: tuple = ()

    processing_on = None  # No other worker: for the story, as in a TaskState.

    @property
    def attempt(self):
        return self.number


class WorkerMind(FetchingMind):
    """What one worker has to do, and what it holds.

    What an attempt should be is its ``fate``, once something has sealed it, and before that whether
    an input is missing (``goal``).  So a stimulus only decrees, and the edges do the rest; several
    things that seal it in one stimulus leave one end, and one message.
    """

    TRANSITIONS = edges(
        waiting="ready returned erred", ready="executing returned", executing="finished erred"
    )

    def __init__(self):
        super().__init__()
        self.attempts = self.records  # {number: Attempt}, until its end was told
        self.data = {}  # {(key, attempt): value}: what is held; no value is looked into here
        self.needed_by = {}  # {(key, attempt): ordered set of Attempts that have not started}
        self.ready = HeapSet()  # {attempt that a thread can begin: since when that has been known}
        self.leaving = False

    def stimulus_compute_task(self, peer, key, attempt, name, run_spec, places, order, wanted):
        """[7] The scheduler sends an attempt: fetch its inputs, then it is ready.

        ``places`` are the inputs, (key, attempt, holders); ``order`` is the task's priority.  The
        holders are those of the moment when it was sent: one may have freed the value since, or be
        dead; who does not find it there says so, and the scheduler knows better by then.

        An attempt goes back at once if this worker is about to leave, of which the scheduler had
        not heard; or if it is a copy of what is here already.
        """
        inputs = {(key, number): holders for key, number, holders in places}
        new = Attempt(attempt, key, name, run_spec, (order, attempt), list(inputs), wanted)
        self.attempts[attempt] = new
        new.waiting_for = {value: None for value in inputs if value not in self.data}
        for value in inputs:
            self.needed_by.setdefault(value, {})[new] = None
        for value in new.waiting_for:
            self.need(value, inputs[value])
        if self.leaving or not (run_spec or new.waiting_for):
            self.give_back(new)
        self.mark(new)
        self.settle()

    def stimulus_take(self):
        """[8] A thread is free: the Attempt that it shall run, or None.

        From here on there is no way back: nothing interrupts a thread.
        """
        if attempt := self.ready.peek():
            self.decree(attempt, "executing")
            self.settle()
        return attempt

    def stimulus_give_back(self, peer, attempts):
        """The scheduler does not need these any more; those that have begun run to their end.

        One that is not here has ended: its end and this request cross.
        """
        for number in attempts:
            if number in self.attempts:
                self.give_back(self.attempts[number])
        self.settle()

    def stimulus_time_passes(self, now_us):
        """What has been ready for too long, behind something that takes long, goes back.

        The scheduler took what runs to be short, and would learn otherwise only at its end.  What
        still waits for an input stays, since it would wait for that elsewhere, too.
        """
        for attempt, since_us in self.ready.items():
            self.ready[attempt] = since_us or now_us
        late = [each for each, since_us in self.ready.items() if now_us - since_us >= LATE_US]
        # The first to run comes first: what is placed again first may get the only free thread.
        for attempt in sorted(late, key=lambda attempt: attempt.priority):
            self.give_back(attempt)
        self.settle()

    def stimulus_leave(self):
        """This worker has to go: what has not begun goes back, and nothing new is taken.

        What it holds stays until the scheduler, which has it copied first, says good-bye.
        """
        self.leaving = True
        self.send(SCHEDULER, "leave")  # First: else the scheduler might send it back to us.
        for attempt in self.attempts.values():
            self.give_back(attempt)
        self.settle()

    def stimulus_put_data(self, client, key, attempt, value):
        """A client puts data here.

        It came by a data connection, so nothing follows from it but a claim on the scheduler's
        stream.  If the client has let go of the data meanwhile, the answer is "free-keys".
        """
        self.data[key, attempt] = value
        self.send_name(SCHEDULER, "add-keys", (key, attempt))

    def stimulus_finished(self, number, result, nbytes, type, duration_us, value):
        """[10] A thread has a ``result``.  ``value`` are its frames, if it is to ride along.

        It is held also if nobody needs it any more, as this worker cannot know; then the scheduler
        answers its end with "free-keys".
        """
        attempt = self.attempts[number]
        self.data[attempt.key, number] = result  # Until the scheduler says otherwise.
        self.decree(attempt, "finished", nbytes, type, duration_us, value)
        self.settle()

    def stimulus_failed(self, number, exception):
        """A thread met an exception; ``exception`` are the frames of it."""
        self.decree(self.attempts[number], "erred", exception)
        self.settle()

    def stimulus_free_keys(self, peer, names):
        """The scheduler says that nobody needs these values, or that somebody could not get them.

        They are here: the scheduler frees only what this worker has claimed to hold, each claim
        once.  A thread that runs with one as its input has a reference of its own.
        """
        for name in names:
            del self.data[name]
            # Normal for an attempt that was abandoned, or whose input was struck: without its
            # input it goes back to be placed again.
            for attempt in self.needed_by.get(name, ()):
                self.give_back(attempt)
        self.settle()

    def arrived(self, name, ok, value):
        """A copy of a value is here; or its holder cannot pickle it, and nobody can use it.

        The copy is kept and claimed, since others may need it: each transfer makes the next ones
        spread over one more holder.  What cannot be pickled fails those that need it, with the
        exception that says so: it would be the same wherever they run, but on its holder.
        """
        if ok:
            self.data[name] = value
            self.send_name(SCHEDULER, "add-keys", name)
        for attempt in self.needed_by.get(name, ()):
            attempt.waiting_for.pop(name, None)
            self.mark(attempt)
            if not attempt.run_spec:
                self.give_back(attempt)  # A copy: there is nothing to run.
            elif not ok:
                self.decree(attempt, "erred", value)

    def missed(self, name, misses):
        """No holder gave this value: the attempts that need it go back, and say so.

        One stimulus may tell of several that are missed, say when a link breaks: then each is added
        to those before.  Whether it was worth a strike is for the scheduler to say.
        """
        for attempt in self.needed_by.get(name, ()):
            if not attempt.told:
                self.give_back(attempt)
            attempt.told[0].append((*name, misses))

    def give_back(self, attempt):
        """It goes back, unless it has begun; so far without a miss (``missed`` adds those)."""
        if attempt.state != "executing":
            self.decree(attempt, "returned", [])

    def decree(self, attempt, fate, *told):
        """Seal what becomes of it; ``told`` are the fields of the message that will say so."""
        attempt.fate, attempt.told = fate, told
        self.mark(attempt)

    def goal(self, attempt):
        """What an attempt should be, given its inputs and what its thread said."""
        return attempt.fate or ("waiting" if attempt.waiting_for else "ready")

    def enter_ready(self, attempt):
        """All inputs are here."""
        self.ready.push(attempt)

    def leave_ready(self, attempt):
        """A thread has taken it, or it goes back."""
        self.ready.discard(attempt)

    def enter_executing(self, attempt):
        """From now on its thread holds the inputs; they may be freed here.

        What only this attempt needed is not fetched any more.
        """
        for name in attempt.inputs:
            needed_by = self.needed_by.get(name, {})
            if needed_by.pop(attempt, 0) is None and not needed_by:
                del self.needed_by[name]
                self.fetching.pop(name, None)

    def enter_finished(self, attempt):
        """An attempt ends once, by one message.

        It is out of the table before that is sent; so whatever the scheduler has said about it, and
        comes later, finds nothing here, and is dropped.
        """
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
            assert bool(attempt.waiting_for) == (attempt.state == "waiting"), attempt
            if attempt.state != "executing":
                # A2. It waits for exactly the inputs that are not here.
                assert {*attempt.waiting_for} == {*attempt.inputs} - {*self.data}, attempt
                for name in attempt.inputs:
                    needed.setdefault(name, {})[attempt] = None
        assert {*self.ready} <= {attempt for _, attempt in self.ready.heap}
        # A3. needed_by is the transpose of inputs, for those that have not started.
        assert needed == self.needed_by
        # A4. What is fetched is what is needed, and is not here.
        assert set(self.fetching) == set(self.needed_by) - set(self.data)


# ================================ Part two, how it travels ========================================

# ---- 5. Wire: pack, read_batch, Connection, the handshake ----
#
# Nothing else in this file knows how messages become bytes.  A batch is its header's size, a JSON
# header ``[messages, sizes of frames]`` and the binary frames.  JSON, because a reader can watch it
# go by, and because parsing it can run no code.  (From here on, a *task* that reads, writes or
# serves is one of asyncio's.)
#
#       +--------------+---------------------------+---------+---------+
#       | header bytes | [[["op", ...], ...], [s]] | frame 0 | frame 1 | ...
#       +--------------+---------------------------+---------+---------+
#
# TCP delivers a stream of bytes, not messages: what was written in one call may be read in three,
# or with what follows it.  So each part's size is read before it.  What a peer says of sizes is
# believed only within LIMITS: else we would go on collecting whatever it goes on sending.
#
# dask: packs with msgpack, and has the same split into a small header and large frames.

PREFIX = struct.Struct("!I")  # bytes of the header
LARGE = 256 << 10  # a frame of so many bytes is read into a buffer of its own, in such parts
CHUNK = 1 << 20  # bytes that are written at a time; a stream collects some of them


def pack(messages):
    """One batch as buffers to be written one after the other.

    A frame stands in a message as its place in the batch's table of frames; one that several
    messages share (the function of a ``map``) is there once.  The frames themselves are not copied
    here: a view of an array's memory is what is written.
    """
    table = {}  # {id of a frame: (its place, the frame)}

    def place(frame):
        # By identity: to compare, or hash, megabytes would cost more than to send them.
        return table.setdefault(id(frame), (len(table), frame))[0]

    body = json.dumps(messages, default=place, separators=(",", ":"), check_circular=False)
    frames = [frame for _, frame in table.values()]
    header = f"[{body},{json.dumps(list(map(len, frames)))}]".encode()
    return [PREFIX.pack(len(header)), header, *frames]


async def read_batch(reader, sender):
    """Read one batch that a ``sender`` ("client", "worker", ...) wrote: its checked messages.

    Everything is bounded before it is allocated.  Raises ``ProtocolError`` for what no peer
    sends, ``asyncio.IncompleteReadError`` at the end of the stream, OSError if that breaks.
    """
    (header_bytes,) = PREFIX.unpack(await reader.readexactly(PREFIX.size))
    if header_bytes > LIMITS["header_bytes"]:
        raise ProtocolError(f"a header of {header_bytes} bytes")
    try:
        messages, sizes = map(list, json.loads(await reader.readexactly(header_bytes)))
        fits = all(type(size) is int and 0 <= size <= LIMITS["frame_bytes"] for size in sizes)
        if not fits or len(sizes) > LIMITS["frames"]:
            raise ValueError("sizes of frames that do not fit")
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"no header: {error}") from error
    if sum(sizes) < LARGE:
        # Read together, then copied: a small frame must not pin the batch that it came in.
        frames = list(map(io.BytesIO(await reader.readexactly(sum(sizes))).read, sizes))
    else:
        # A large one in parts, into a writable buffer that grows with what has come.  Read at once
        # it would be far over the stream's limit, which stops and starts the transport at each
        # step, and be copied once more: half as much work again at 100 MB.
        frames = []
        for size in sizes:
            frame = await reader.readexactly(min(size, LARGE))
            frame = frame if size < LARGE else bytearray(frame)
            while len(frame) < size:
                frame += await reader.readexactly(min(size - len(frame), LARGE))
            frames.append(frame)
    return [check_message(message, frames, sender) for message in messages]


class Connection:
    """Batches over one pair of asyncio streams.

    What is sent before the streams are there waits for them, so that who needs a connection can
    use it at once.  Order is kept: this is the "one stream" of chapter 1.
    """

    def __init__(self):
        self.outbox = []  # messages that no batch has taken yet
        self.writer = None  # until hands were shaken
        # The tasks that write what one turn of the loop could not, and that read:
        self.writing = self.following = None
        self.heard = False  # whether a byte has come since somebody last looked
        self.loop = asyncio.get_running_loop()  # (A user may submit while it does not run.)

    async def connect(self, address, role, worker=""):
        """Connect to ``address``, and to that worker process if one is named.

        Raises OSError or EOFError if nobody is there, PermissionError if we are refused.
        """
        async with asyncio.timeout(LIMITS["handshake_seconds"]):
            # A name may have several addresses, and one of them be of no use from here.  (For which
            # uvloop, which many services use, has no option.)
            own = isinstance(self.loop, asyncio.BaseEventLoop)
            options = {"happy_eyeballs_delay": 0.25} if own else {}
            options["limit"] = 4 * CHUNK
            streams = await asyncio.open_connection(*split_address(address), **options)
        await self.open(*streams, role, worker)

    async def open(self, reader, writer, role, worker="", accepting=False):
        """Shake hands, and then send what waits.  Raises what ``shake_hands`` does, TimeoutError.

        Within a time limit: else whoever connects and says nothing would cost us a task for ever.
        (Not by wait_for: in Python 3.11, cancelled just when it is done, it forgets that it was.)
        """
        try:
            async with asyncio.timeout(LIMITS["handshake_seconds"]):
                self.peer = await shake_hands(reader, writer, role, worker, accepting)
        except BaseException:
            writer.close()
            raise
        self.reader, self.writer = reader, writer
        reader.feed_data = functools.partial(self.feed, reader.feed_data)
        # A host that is gone says nothing, and who only waits for it would wait for ever: so the
        # kernel asks whether it is there.  But a process that is frozen, or in a call that keeps
        # the interpreter's lock, takes nothing either, for which the kernel has the same limit.  So
        # whoever can be is more patient: who is on the same host, which is not gone; and who was
        # called, since others depend on it, while it hears of dead workers by their silence.
        here, there = ((writer.get_extra_info(name) or "?")[0] for name in ("sockname", "peername"))
        self.bear(LIMITS["patience_seconds" if accepting or here == there else "stall_seconds"])
        self.flush()

    def bear(self, limit):
        """Have the kernel drop a peer that takes nothing for so many seconds, or is not there."""
        end, ask = self.writer.get_extra_info("socket"), LIMITS["stall_seconds"] // 3
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # (Often, once it has begun: that some packets are lost is not the end.)
        options = {"TCP_KEEPIDLE": ask, "TCP_KEEPINTVL": 2, "TCP_USER_TIMEOUT": limit * 1000}
        for name, value in options.items():
            if hasattr(socket, name):  # macOS has not all of them by these names.
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def feed(self, feed_data, data):
        """The transport brings bytes: maybe a part of a batch, which may take long to be whole."""
        self.heard = True
        feed_data(data)

    def send(self, message):
        """[3] Append to the outbox; it is flushed at the end of the current turn of the loop.

        No timer: an idle system sends at once, a busy one makes larger batches by itself.  (A turn
        handles all that has come in since the last one; the more that is, the more there is to say
        at its end.)  Nor does it wait: a mind that could be held up by one slow peer would hold up
        all others.
        """
        # dask: sends what has gathered, in intervals of a few milliseconds.
        self.outbox.append(message)
        if len(self.outbox) == 1:
            self.loop.call_soon(self.flush)

    def flush(self):
        """Write one batch; if it is large, or its reader slow, in an asyncio task.

        One batch at a time, so that order is kept: while a task writes, what is sent waits in the
        outbox, and the task ends with another flush.
        """
        if not self.outbox or not self.writer or self.writing or self.writer.is_closing():
            return
        batch = self.outbox[: LIMITS["batch_messages"]]
        del self.outbox[: len(batch)]
        buffers = pack(batch)
        # What the peer has not taken counts too: else copies of all that a slow one does not take
        # would pile up in the transport's buffer.  (The outbox refers to frames, and copies none.)
        waiting = self.writer.transport.get_write_buffer_size()
        if sum(map(len, buffers)) + waiting < CHUNK:
            self.writer.write(b"".join(buffers))
            if self.outbox:
                self.loop.call_soon(self.flush)
        else:
            self.writing = self.loop.create_task(self.write(buffers))

    async def write(self, buffers):
        """Write a batch as fast as the peer takes it.

        Slow is not dead, but stalled is: the kernel knows the difference (``TCP_USER_TIMEOUT``).
        """
        with contextlib.suppress(OSError):  # It is lost: who reads it meets its end.
            for buffer in map(memoryview, buffers):
                for start in range(0, len(buffer), CHUNK):
                    if self.writer.is_closing():
                        raise ConnectionResetError  # asyncio itself would break.
                    self.writer.write(buffer[start : start + CHUNK])
                    await self.writer.drain()
        self.writing = None
        self.flush()

    async def receive(self):
        """The checked messages of the next batch.  Raises what ``read_batch`` does."""
        return await read_batch(self.reader, self.peer)

    def hang_up(self):
        """End it now; what has not been written is lost, and who reads it meets its end."""
        if self.writer and not self.writer.is_closing():
            self.writer.transport.abort()

    async def written(self):
        """Wait until what waits is written, or cannot be any more."""
        while (self.outbox or self.writing) and not self.writer.is_closing():
            # If it is not being written, the flush is due in this turn of the loop or the next.
            # (To await the task itself would cancel it, half written, with whoever awaits it.)
            await (asyncio.wait([self.writing]) if self.writing else asyncio.sleep(0))

    async def close(self):
        """Write what waits, then close."""
        await self.written()
        self.writer.close()
        try:
            async with asyncio.timeout(1):
                await self.writer.wait_closed()
        except OSError:  # It takes too long; or the peer was first, and there is nothing to abort.
            self.writer.transport.abort()


# The handshake, before anything else: fixed sizes, and a time limit.  Both sides say hello, which
# names the worker process that is meant (ports are reused); then both prove that they hold the
# secret, the connector first: so nobody gets a proof, to guess the secret from at leisure, by just
# connecting.  (Who listens in a scheduler's place gets one: a secret has to be long, as ours is.)
# This is HMAC challenge and response, as in multiprocessing.connection.
#
# A proof is a digest, with the secret as its key, of both hellos and of who speaks.  The hellos
# contain a random number from each side, so that a proof that was overheard is good for nothing;
# who speaks, so that a proof cannot be sent back to its sender.  It shows who is there when the
# connection begins, no more: what follows is neither encrypted nor signed.
#
# Whoever holds the secret can run any code on every worker: that is what a cluster is for.

HELLO = struct.Struct("!8sHBBB32s32s")  # magic, protocol, Python's version, role, nonce, worker
MAGIC, PROTOCOL = b"minidist", 7
ROLES = ["client", "worker", "scheduler", "holder"]
REFUSAL = "wrong secret: set MINIDIST_TOKEN, or copy ~/.minidist/token, so that it is the same"


async def shake_hands(reader, writer, role, worker, accepting):
    """Returns the kind of peer at the other end.

    Raises PermissionError if that does not speak minidist, or has another secret, protocol or
    version of Python (cloudpickle sends functions as bytecode, which differs), ConnectionError if
    it is another worker process or the connection breaks, EOFError if it hangs up.
    """
    version, meant = sys.version_info[:2], hashlib.sha256(worker.encode()).digest()
    mine = HELLO.pack(MAGIC, PROTOCOL, *version, ROLES.index(role), os.urandom(32), meant)
    writer.write(mine)
    theirs = await reader.readexactly(HELLO.size)
    magic, protocol, major, minor, peer, _, their_worker = HELLO.unpack(theirs)
    if magic != MAGIC or peer >= len(ROLES):
        raise PermissionError("the other end does not speak minidist: is it a scheduler's port?")
    if (protocol, (major, minor)) != (PROTOCOL, version):
        text = f"the other end has protocol {protocol}, Python {major}.{minor}; this one has"
        raise PermissionError(f"{text} {PROTOCOL}, {version[0]}.{version[1]}: they must be equal")
    if their_worker != meant:
        raise ConnectionError(f"{worker} is not there" if worker else "that is a worker's port")

    hellos = theirs + mine if accepting else mine + theirs
    for who in (b"connector", b"acceptor"):
        proof = hmac.digest(secret(), who + hellos, "sha256")
        if accepting == (who == b"acceptor"):
            writer.write(proof)
        elif not hmac.compare_digest(await reader.readexactly(32), proof):
            writer.write(bytes(32))  # No proof: it must not take this for a broken connection.
            raise PermissionError(f"a {ROLES[peer]} with a " * accepting + REFUSAL)
    return ROLES[peer]


def secret():
    """The secret that all processes of a cluster share: MINIDIST_TOKEN, or a file made once.

    The model is Erlang's cookie: on one machine everything works for this user and nobody else.
    Several processes may find that there is no file at the same moment: each writes a draft, and
    the file gets its name by ``link``, which only one of them can do, and which nobody can see
    half done.
    """
    if token := os.environ.get("MINIDIST_TOKEN"):
        return os.fsencode(token)
    try:
        path = Path.home() / ".minidist" / "token"
        if not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, buffering=0) as draft:
                draft.write(os.urandom(32).hex().encode())  # Nobody else can ever read that file.
                # If another process was first: use its own.
                with contextlib.suppress(FileExistsError):
                    path.hardlink_to(draft.name)
        token, mode = path.read_bytes().strip(), path.stat().st_mode
    except (OSError, RuntimeError) as error:
        # No network's error, after which it might be tried again.  (Who has no home: RuntimeError.)
        raise PermissionError(f"no secret ({error}): set MINIDIST_TOKEN") from error
    if mode & 0o077 or not token:
        raise PermissionError(f"{path} can be read by others, or is empty: chmod 600 {path}")
    return token


def split_address(address):
    """("HOST", PORT) of "tcp://HOST:PORT" or "HOST:PORT"; ValueError if it is neither."""
    host, _, port = str(address).removeprefix("tcp://").rpartition(":")
    if not host or "/" in host or ".." in f".{host}" or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is no address: it should look like '127.0.0.1:8786'")
    return host.strip("[]"), int(port)


# ---- 6. Serialization: dumps, loads, dump_call, load_call, exceptions, sizeof, keys ----
#
# Objects become *frames*: a pickle, then its out-of-band buffers (pickle protocol 5, PEP 574).
# The scheduler forwards frames and never opens them.  So it needs none of its users' packages, no
# call can break it, and nothing that a client sends makes it run code: loading a pickle is running
# a program that its author wrote.


def dumps(obj):
    """Pickle an object: a tuple of frames.

    The standard pickler is several times faster for a small call, but knows nothing of lambdas, and
    refers to what is in ``__main__`` by a name that means something else on a worker: then
    ``Pickler`` does it, and sends functions and classes of ``__main__`` by value.  (The word may
    also stand in the user's data: then the slower pickler did no harm.)

    Small buffers stay in the pickle: a frame for each would cost more than the copy that it saves,
    and a batch of calls with some hundred arrays each would have too many of them.
    """
    buffers = []

    def outside(buffer):
        return memoryview(buffer).nbytes < LIMITS["ride_along_bytes"] or buffers.append(buffer)

    try:
        data = pickle.dumps(obj, protocol=5, buffer_callback=outside)
    except Exception:
        data = None
    if data is None or b"_main__" in data or cloudpickle.list_registry_pickle_by_value():
        buffers.clear()
        data = dump_by_value(obj, outside)
    return (data, *map(pickle.PickleBuffer.raw, buffers))


def dump_by_value(obj, buffer_callback=None):
    """One pickle, which has no use for the names of this process's main module."""
    if spawned := sys.modules.get("__mp_main__"):  # What multiprocessing calls a script.
        cloudpickle.register_pickle_by_value(spawned)
    file = io.BytesIO()
    Pickler(file, protocol=5, buffer_callback=buffer_callback).dump(obj)
    return file.getvalue()


class Pickler(cloudpickle.Pickler):
    """cloudpickle, for some objects more."""

    def reducer_override(self, obj):
        """(function, arguments) that make ``obj`` again, and its state; or what cloudpickle says.

        It would send code without the name of its file, so that a traceback could not show the
        lines; classes without their slots; no more than the names of what a script has cached, and
        of some of its types; and an exception whose ``__init__`` takes other arguments than it
        gives to ``Exception`` could not be unpickled.  (tblib helps it likewise.)
        """
        if isinstance(obj, types.CodeType):
            make, args = self.dispatch_table[types.CodeType](obj)
            # (To compare each with the name would fail under ``python -bb``: some are bytes.)
            return make, tuple({"<dynamic-code>": obj.co_filename}.get(a, a) for a in args)
        if isinstance(obj, BY_NAME) and str(obj.__module__).endswith("_main__"):
            if isinstance(obj, MEMOIZED):
                return memoized, (obj.__wrapped__, obj.cache_parameters()), vars(obj)
            if isinstance(obj, ALIAS):
                return typing.cast, (None, obj.__value__)  # (It returns the second.)
            more = [obj.__supertype__] if isinstance(obj, typing.NewType) else []
            return type(obj), (obj.__name__, *more), (None, {"__module__": obj.__module__})
        owner = getattr(type(obj).__reduce__, "__objclass__", Pickler)  # (if that is compiled)
        if owner.__module__ == "builtins" and isinstance(obj, BaseException):
            kind, args, *states = obj.__reduce__()
            names = ("args", "errno", "strerror", "filename", "filename2", "characters_written")
            if all(getattr(kind, name, None) is getattr(OSError, name) for name in names):
                # As they are: its own class may have set them, and not OSError from ``args``.
                fields = {n: value for n in names if (value := getattr(obj, n, None)) is not None}
                args, states = (), [fields]
            return make_exception, (kind, args, *states, object.__getstate__(obj))
        reduced = super().reducer_override(obj)
        if isinstance(reduced, tuple) and vars(obj).get("__slots__"):
            # (Without them its objects would have a dict there, for which they have no place here.)
            for names in [a for a in reduced[1] if isinstance(a, dict) and "__module__" in a]:
                names["__slots__"] = obj.__slots__
        return reduced


def memoized(func, parameters):
    """A function with a cache, which is empty."""
    return functools.lru_cache(**parameters)(func)


MEMOIZED = type(memoized(len, {}))
ALIAS = getattr(typing, "TypeAliasType", ())  # what ``type X = ...`` makes, since Python 3.12
# What would pickle itself by its name alone, also in a script.
BY_NAME = (MEMOIZED, ALIAS, typing.NewType, typing.ParamSpec, typing.TypeVarTuple)


def make_exception(kind, args, *states):
    """An exception as it was: what its class did with other arguments has left its traces.

    Each of ``states`` is what it has in its dict, or this and what it has in its slots.
    """
    builtin = next(base for base in kind.__mro__ if base.__module__ == "builtins")
    try:
        error = builtin.__new__(kind, *args)
        builtin.__init__(error, *args)
    except TypeError:  # They are for its own ``__new__``: as those of most kinds of groups are.
        error = kind(*args)
    for state in states:
        for some in state if type(state) is tuple else (state,):
            for name, value in (some or {}).items():
                object.__setattr__(error, name, value)  # Also in a frozen dataclass.
    return error


def loads(frames):
    """Unpickle frames.

    An array is a view of its buffer, and can be written to only if that can: large frames are
    read into writable ones, and of small ones, which are ``bytes``, a copy is made.
    """
    data, *buffers = frames
    buffers = [bytearray(b) if memoryview(b).readonly else b for b in buffers]
    return pickle.loads(data, buffers=buffers)


# What is going on while a call is pickled or unpickled: for ``Future.__reduce__`` and ``resolve``,
# which are called by the pickle module, and it has no place for an argument of ours.  They are set
# in a copy of the context that ends with the call: so nothing has to be set back.

COLLECTED = contextvars.ContextVar("{Future: None}: met in what is being pickled", default=None)
INPUTS = contextvars.ContextVar("{key: value}: for the futures in the call being unpickled")


def resolve(key):
    """On a worker, what a pickled Future becomes when it is unpickled: the value."""
    return INPUTS.get()[key]


def collecting(dump, *args):
    """(What ``dump(*args)`` returns, each Future that was pickled meanwhile, once)"""
    context, found = contextvars.copy_context(), {}
    context.run(COLLECTED.set, found)
    return context.run(dump, *args), list(found)


def dump_function(func):
    """(frame, func, name); the frame is empty if the function has to travel in the call.

    A frame of its own is pickled once for a whole ``map``, sent once in each batch, and may be
    unpickled once by each worker (``load_callable``).  But futures in a function are inputs of each
    call, to be found each time.
    (Buffers stay in it, whatever their size: beside it, they would travel with each call.)
    """
    name = name_of(func)
    frames, futures = collecting(dump_part, f"the function {name!r}", func)
    if futures:
        return b"", func, name
    return dump_by_value(func) if len(frames) > 1 else frames[0], func, name


class Apart(namedtuple("Apart", "load future")):
    """What is large in the calls of a ``map``: it travels once, as the value of a future.

    That is its frames, and not the object: so each call has one of its own, here as elsewhere.
    """

    def __reduce__(self):
        return self.load, (self.future,)


def frames_of(options, frames):
    """The task whose value that is.  (Its ``options`` are arguments to make another key.)"""
    return frames


def dump_call(function, args, kwargs):
    """Pickle a call: (run_spec, futures in its arguments).

    ``function`` comes from ``dump_function``.  A Future adds itself to the collection in
    ``Future.__reduce__``: so it is found at any depth, and never by equal strings.

    dask: walks through lists, tuples, sets and dicts to find futures.
    """
    frame, func, name = function
    try:
        call = (args, kwargs) if frame else (func, args, kwargs)
        (data, *buffers), futures = collecting(dumps, call)
    except Exception:
        # Which one is it?  At this price only now.
        for place, arg in (*enumerate(args), *kwargs.items()):
            collecting(dump_part, f"argument {place!r} of {name}", arg)
        raise
    # Copies: what the caller does to an array after the call must not change the call.
    return (frame, data, *map(bytes, buffers)), futures


def dump_part(what, obj):
    """Pickle an object; if that fails, say which: its own message names only what is inside."""
    try:
        return dumps(obj)
    except Exception as error:
        text = f"{what} ({type(obj).__name__}) cannot be pickled: {error}"
        raise TypeError(f"{text}: make what cannot travel inside the task") from error


class Stateful(Exception):
    """A callable that is not to be remembered: one task might change it under another's feet."""


@functools.lru_cache(maxsize=256)  # Not for ever: a notebook defines a function again and again.
def load_function(frame):
    """A plain function, unpickled once.  Raises Stateful for any other callable."""
    func = pickle.loads(frame)
    if not isinstance(func, (types.FunctionType, type)):
        raise Stateful(func)  # Then nothing is remembered.
    return func


def load_call(run_spec, inputs):
    """(func, args, kwargs) of a pickled call, with ``inputs`` ({key: value}) for its futures."""
    frame, *call = run_spec
    context = contextvars.copy_context()
    context.run(INPUTS.set, inputs)
    rest = context.run(loads, call)
    return (load_callable(frame), *rest) if frame else rest


def load_callable(frame):
    """Unpickle a callable: a plain function once, unless it has large data, which nobody keeps."""
    if len(frame) >= LARGE:
        return pickle.loads(frame)
    try:
        return load_function(frame)
    except Stateful as found:
        return found.args[0]


def name_of(func):
    """The function's name: the first part of its tasks' keys.

    The scheduler also measures by it how long a task takes: calls of one function are alike.
    """
    func = getattr(func, "func", func)  # functools.partial
    return str(getattr(func, "__name__", type(func).__name__)).strip("<>")


def pure_key(name, frames):
    """Same bytes, same call, same key.

    Sizes are hashed too: else two frames could be cut in another place, and mean another call.
    Equal values with other bytes (a set, a dict in another order, a function from another file) are
    computed twice: that is safe, the contrary would not be.

    dask: ``tokenize`` knows many types, so that equal values have equal keys more often.
    """
    digest = hashlib.blake2b(digest_size=16)
    for frame in frames:
        digest.update(len(frame).to_bytes(8, "big"))
        digest.update(frame)
    return f"{name}-{digest.hexdigest()}"


def unique():
    """A name that nobody else has: enough bits of chance that nobody has to be asked."""
    return os.urandom(16).hex()


def check_key(key):
    """A key is a string, or a tuple of strings, numbers and tuples; anything else a TypeError."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        # (Others hold what JSON makes something else of: a list, or no number.)
        if (same := to_key(json.loads(json.dumps(key)))) == key:
            return same
    raise TypeError(f"a key is a string or a tuple, not {key!r:.80}")


class RemoteError(Exception):
    """Stands for an exception that could not be pickled, or not be unpickled here.

    Its text is that one's type and text; its traceback and its causes are that one's.
    """


# The exceptions in a group, whatever its own class makes of that name.
exceptions_in = BaseExceptionGroup.exceptions.__get__


def pack_exception(error, skip=0, groups=None):
    """An exception as frames, with its causes and the places of its traceback.

    ``skip`` leaves out that many frames at the start: the worker's own.  Pickle loses causes and
    tracebacks; so each link of the chain travels as a pickle of its own, text, and places.  What is
    in a group is pickled with it, but has lost the same.  ``groups`` are those that were packed
    already: once is enough, and an exception may be due to the very group that it is in.
    """

    def has(name):  # Not what its own class makes of that name, which may raise.
        return getattr(BaseException, name).__get__(error)

    links, alone = [], groups is None
    groups = set() if alone else groups
    while error is not None and len(links) < 20 and id(error) not in groups:
        # (Some code has no lines.)
        codes = [(f.f_code, line or 0) for f, line in traceback.walk_tb(has("__traceback__"))]
        places = [(c.co_filename, line, c.co_name, c.co_firstlineno) for c, line in codes]
        data, text, parts = b"", "", ()
        if alone or links:
            text = text_of(error)
            with contextlib.suppress(BaseException):  # Whatever it does then is the task's failure.
                data = dump_by_value(error)
        if issubclass(type(error), BaseExceptionGroup) and len(groups) < 100:
            groups.add(id(error))
            parts = [pack_exception(part, groups=groups) for part in exceptions_in(error)]
        # Python sets that by "from", also by "from None": then there is no cause.
        relation = "__cause__" if has("__suppress_context__") else "__context__"
        links.append((data, text, places[skip:], relation, parts))
        error, skip = has(relation), 0
    return (pickle.dumps(links, protocol=5),)


def text_of(error):
    """An exception's type and text.  It may raise whatever it likes when it is looked at."""
    with contextlib.suppress(BaseException):
        return "".join(traceback.format_exception_only(error)).strip()
    return type_name(error)


def unpack_exception(frames, known=None):
    """The exception, with its causes, and with real tracebacks whose frames name the places.

    It is ``known`` if it came with the group that it is in: then that gets what pickle has lost.
    """
    error, links = None, pickle.loads(frames[0])
    for link in reversed(links):
        data, text, places, relation, parts = link
        origin, tb = error, rebuild_traceback(places)
        # What stands for one that could not be pickled there (b""), or whose class is not known
        # here, or that cannot be unpickled, or becomes something else than an exception.
        error = RemoteError(text).with_traceback(tb)
        with contextlib.suppress(Exception):
            found = known if known is not None and link is links[0] else pickle.loads(data)
            error = found.with_traceback(tb)
        getattr(BaseException, relation).__set__(error, origin)
        group = exceptions_in(error) if issubclass(type(error), BaseExceptionGroup) else ()
        for part, packed in zip(group, parts, strict=False):
            unpack_exception(packed, part)
    return error


def rebuild_traceback(places):
    """A traceback through [(file, line, function, the line in which that begins)].

    It goes through frames, and a frame belongs to code that runs: but that of a generator which
    has not begun will do, under the names of the place.  Nobody has called it, so that it keeps no
    caller alive.  The worker's variables are not in it: they may be anything, and large.
    """
    # (tblib, whose idea it is, compiles code that raises, and runs it.)
    tb = None
    for file, line, name, first in reversed(places):
        # Its table of lines, as CPython documents it: eight instructions in no column, so that
        # nothing is underlined; and how many lines after the first, doubled, and one more if it is
        # before: six bits in a byte, the lowest first, and a seventh says that more follow.
        after = abs(line - first) << 1 | (line < first)
        low = [after >> bits & 63 | 64 for bits in range(0, 30, 6)]
        code = (lambda: (yield)).__code__.replace(co_filename=file, co_name=name, co_qualname=name)
        code = code.replace(co_firstlineno=first, co_linetable=bytes([0xEF, *low, after >> 30]))
        frame = types.FunctionType(code, {"__file__": file})().gi_frame
        tb = types.TracebackType(tb, frame, 0, line)
    return tb


def sizeof(obj, depth=3):
    """About how many bytes an object takes, with its attributes; of containers, by a few items.

    An estimate is enough, to choose where a task should run, and what is small enough to travel
    with its notice; to walk through every result would cost more than the best choice saves.
    Arrays know their ``nbytes``.  What raises when it is looked at counts for little: a task does
    not fail over its size.
    """
    try:
        nbytes = getattr(obj, "nbytes", None)
        if type(nbytes) is int and 0 <= nbytes < 1 << 63:
            return nbytes
        size = sys.getsizeof(obj, 64)
        if depth and isinstance(obj, (list, tuple, set, frozenset, dict)) and obj:
            some = list(islice(obj.items() if isinstance(obj, dict) else obj, 10))
            size += len(obj) * sum(sizeof(item, depth - 1) for item in some) // len(some)
        elif depth and type(inside := getattr(obj, "__dict__", None)) is dict:
            size += sizeof([*inside.values()], depth)
        return size
    except Exception:
        return 64


def type_name(obj):
    """The name by which a client finds the type of a result that it has not fetched."""
    kind = type(obj)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


# ================================ Part three, how it runs =========================================
#
# Bodies decide nothing: they check what comes in, call the stimulus that its op names, and send
# what the mind leaves in its outbox.  So nearly all that can go wrong by the order of events is in
# part one, where it can be tried without a network; what is left here is the loop, threads and
# sockets.

logger = logging.getLogger("minidist")


def whole(option, number, least):
    """A whole number that a user gave.  Raises TypeError if it is none, ValueError if it is out."""
    if not isinstance(number, numbers.Integral):
        raise TypeError(f"{option}={number!r:.80} is no whole number")
    if not least <= number < 1 << 63:
        raise ValueError(f"{option}={number} is too {'small' if number < least else 'large'}")
    return int(number)


def whether(option, value):
    """A yes or no that a user gave; None is a no.  Raises TypeError for anything else."""
    if value not in (True, False, None):
        raise TypeError(f"{option}={value!r:.80} is neither True nor False")
    return bool(value)


UNITS = {"us": 1e-6, "ms": 1e-3, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
UNITS |= {"microsecond": 1e-6, "millisecond": 1e-3}
UNITS |= {word: UNITS[word[0]] for word in ("second", "minute", "hour", "day", "week")}


def seconds(timeout):
    """A timeout in seconds: None, a number, a timedelta, or a string like "10 ms", "2 minutes"."""
    number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
    if timeout is None or (number and timeout == timeout):  # (NaN would disorder a loop's timers.)
        return timeout
    if hasattr(timeout, "total_seconds"):  # a timedelta
        return timeout.total_seconds()
    match = re.fullmatch(r"\s*([\d.]+(?:e[-+]?\d+)?)\s*([a-z]*)\s*", str(timeout).lower())
    unit = match and UNITS.get(match[2], UNITS.get(match[2].removesuffix("s")))
    if not unit:
        raise ValueError(f"timeout={timeout!r} is no time: use seconds, or a string like '10 ms'")
    return float(match[1]) * unit


@contextlib.contextmanager
def dropping(peer):
    """What a peer sends can do no more than end its own stream; others are served on."""
    try:
        yield
    except PermissionError as error:
        logger.warning("Refused %s: %s", peer, error)
    except ProtocolError as error:
        logger.warning("Dropped %s: %s", peer, error)
    except (OSError, EOFError) as error:
        # What it means that a peer is gone is the mind's business; if the network is, the reader's.
        if getattr(error, "errno", 0) in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
            logger.warning("The connection to %s broke: %s", peer, error)
    except Exception:
        logger.exception("Dropped %s: what it sent cannot be", peer)


class Shown:
    """Shows its ``_facts()``, as text and as HTML that leaves colours to the notebook's theme."""

    def __repr__(self):
        return f"<{type(self).__name__}: {', '.join(self._facts())}>"

    def _repr_html_(self):
        facts = "<br>".join(html.escape(fact) for fact in self._facts())
        style = "border-left: 3px solid; padding-left: 0.6em"  # in the colour of the text
        return f'<div style="{style}"><b>{type(self).__name__}</b><br>{facts}</div>'


class Entered:
    """What ``async with`` starts and closes, by its coroutines ``_start`` and ``close``.

    ``await`` only starts it; an ``async with`` may follow.
    """

    _started = False

    async def __aenter__(self):
        try:
            if not self._started:
                await self._start()
        except BaseException:
            await self.close()  # What was started already ends, also when this is cancelled.
            raise
        self._started = True
        return self

    def __await__(self):
        return self.__aenter__().__await__()

    async def __aexit__(self, *_):
        await asyncio.shield(self.close())  # Cancelled or not, it ends.


class Body(Shown, Entered):
    """What the bodies of the three minds share: links to peers, and the tasks that serve them.

    With ``MINIDIST_VALIDATE`` in the environment, every invariant of the mind is checked before
    anything that it has said is sent.
    """

    # As what it introduces itself to a peer that it connects to, and to one that connects to it:
    role = role_when_called = ""
    server = None  # of asyncio, while it listens
    waking = False  # its loop is going to flush, because ``wake`` has said so
    id = ""  # the worker process that whoever connects has to mean
    parting = "it is gone"  # why the scheduler's stream has ended; "" after a good-bye

    def __init__(self, mind):
        self.state = mind  # (No record's state: the word is dask's, for what a worker's mind is.)
        self.links = {}  # {peer: Connection}
        self.tasks = set()  # of asyncio, cancelled when it ends
        self.lock = contextlib.nullcontext()  # around the mind
        self.validating = bool(os.environ.get("MINIDIST_VALIDATE"))

    def _facts(self):
        return [self.address if self.server else "not started"]

    def start(self, coroutine):
        """A task of this body's.  (Somebody has to keep it: the loop refers to tasks weakly.)"""
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def stop(self):
        """Send what goes out at once; cancel its tasks, and wait until they are gone.

        So nothing of it goes on when it has closed, in a loop that may be the user's.  (But for a
        large batch that is being written: until its reader has taken it, or hangs up, or stalls.)
        """
        for link in self.links.values():
            link.flush()
        others = self.tasks - {asyncio.current_task()}
        # (What is cancelled already is ending, and may have to clean up.)
        for task in [task for task in others if not task.cancelling()]:
            task.cancel()
        # (By ``wait``: if another ``stop`` cancels this one, those that clean up go on.  And not for
        # ever: a task of the user's may make nothing of being cancelled.)
        gone = asyncio.gather(*others, return_exceptions=True)
        await asyncio.wait([gone], timeout=LIMITS["close_seconds"])

    async def listen(self, host, port):
        """Serve whoever connects; ``address`` says where.  Raises OSError if the port is taken."""
        secret()  # Without one nobody could be served: say so now.
        host = host.strip("[]") or "0.0.0.0"  # (To listen by both protocols would take two ports.)
        options = {"limit": 4 * CHUNK, "start_serving": False}
        self.server = await asyncio.start_server(self.accept, host, port, **options)
        await self.server.start_serving()  # Only now: to be cancelled in there would lose it.
        self.address = f"tcp://{reachable(host)}:{self.server.sockets[0].getsockname()[1]}"

    def accept(self, reader, writer):
        """Somebody connects, and is served in a task of ours, until one of us hangs up."""
        # (By a callback: a task that is cancelled before it has begun runs nothing of its own.)
        self.start(self.welcome(reader, writer)).add_done_callback(lambda _: writer.close())

    async def welcome(self, reader, writer):
        """Serve a peer with whom hands can be shaken, until its stream ends."""
        connection = Connection()
        with dropping(":".join(map(str, writer.get_extra_info("peername") or "?"))):
            await connection.open(reader, writer, self.role_when_called, self.id, accepting=True)
            await self.serve(connection)

    async def follow(self, peer, connection, batch=()):
        """[4] A peer's checked messages, until its stream ends: each one's op names a stimulus.

        ``batch`` are those that came along with the first, which said who the peer is.  All of a
        batch (up to a good-bye) are given to the mind before it is flushed, so that the answers
        make one batch, too.
        """
        self.links[peer], connection.following = connection, asyncio.current_task()
        try:
            with dropping(peer):
                while True:
                    with self.lock:
                        for op, *fields in batch:
                            self.take(peer, op, fields)
                    self.flush()
                    batch = fields = ()  # Else what came last, maybe 100 MB, is kept meanwhile.
                    batch = await connection.receive()
        finally:
            self.links.pop(peer, None)  # (None: a client that closes has taken it out itself.)
            connection.writer.close()

    def take(self, peer, op, fields):
        """Give the mind one message; subclasses add what is not the mind's business."""
        if op in ("goodbye", "refused"):
            # We hang up first: if the scheduler did, what it has just said might be cut off.
            self.parting = fields[0] if fields else ""
            raise EOFError
        self.stimulate(op, peer, *fields)
        if op == "worker-left" and fields[0] in self.links:
            self.links[fields[0]].hang_up()

    def stimulate(self, op, *args):
        """Tell the mind what came, by the stimulus that is named after it."""
        getattr(self.state, "stimulus_" + op.replace("-", "_"))(*args)

    def happens(self, op, *args):
        """Tell the mind one thing that has happened; send what it says to that."""
        with self.lock:
            self.stimulate(op, *args)
        self.flush()

    def flush(self):
        """Send what the mind has in its outbox.

        Who gives the mind a stimulus calls this after it (a thread: ``wake``): none of them sends.
        Workers and clients connect to a holder of values when there is something to say to it.
        """
        with self.lock:
            outbox, self.state.outbox = self.state.outbox, []
            if self.validating:
                self.state.validate()
        for peer, message in outbox:
            if peer not in self.links and peer != SCHEDULER and self.role:
                self.links[peer] = Connection()
                self.links[peer].following = self.start(self.reach(peer, self.links[peer]))
            if peer in self.links:  # Else it is gone, or never was: the fire-and-forget client.
                waiting = len(self.links[peer].outbox)
                if message[0] == "key-in-memory" and waiting > LIMITS["batch_messages"]:
                    message[-1] = ()  # Who is slow fetches it: values must not pile up here.
                self.links[peer].send(message)
                if message[0] == "refused":
                    self.start(self.links[peer].close())

    def wake(self):
        """Have the loop flush soon, if it is not about to.  Any thread may call this.

        Two threads may both find the loop asleep, and wake it twice; none can find it awake when it
        is not: each has left what it has to say before it looks, and a ``flush`` says that it is
        no longer about to come before it collects.
        """
        if not self.waking:
            try:
                self.waking = True
                self.loop.call_soon_threadsafe(self.flush)
            except BaseException as error:
                self.waking = False  # It was an interrupt; else nobody would wake it any more.
                if not isinstance(error, RuntimeError):  # (The loop is closed: nobody cares.)
                    raise

    async def reach(self, holder, connection):
        """A data connection to a holder of values, from when it is first needed until it breaks.

        If nobody is there, that is the same to the mind as a connection that broke later.
        """
        try:
            await connection.connect(holder.partition("#")[0], self.role, holder)
            await self.follow(holder, connection)
        except (OSError, EOFError, ValueError) as error:  # (The last: what it says is no address.)
            logger.warning("Cannot reach %s: %s", holder, str(error) or "no answer")
            del self.links[holder]
        self.happens("link-lost", holder)


def reachable(host):
    """The address to tell others when listening on ``host``: one of our own for "any".

    A machine has several; the right one is where its packets for other machines leave from.
    """
    # (Of each kind of "any", this machine's own address, and one where no machine is.)
    kinds = {"0.0.0.0": ("127.0.0.1", "192.0.2.1"), "::": ("::1", "2001:db8::1")}
    if host in kinds:
        host, elsewhere = kinds[host]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))  # Sends nothing; only asks for the route out.
            return probe.getsockname()[0]
        logger.warning("This machine has no route to others: they may have to use another address")
    return host


async def reach_scheduler(address, body, timeout):
    """Register with the scheduler: (Connection, its first message, those that came with it).

    While nobody is there, it is tried again for ``timeout`` seconds (None: for ever): so the
    processes of a cluster may be started in any order.  A refusal is final: no waiting changes a
    secret.  Raises PermissionError then, and ConnectionError when the time is over.
    """
    pause = 0.1  # between two trials, and the least that one may take
    deadline = math.inf if timeout is None else time.monotonic() + max(timeout, pause)
    hint = "; if it is in this event loop, use asynchronous=True" if body.role == "client" else ""
    why = f"no answer{hint}"
    for trial in count():
        connection = Connection()
        try:
            async with asyncio.timeout_at(deadline):  # Where packets vanish, nothing is refused.
                await connection.connect(address, body.role)
                connection.send(await body.introduce(connection))
                first, *batch = await connection.receive()
            return connection, first, batch
        except PermissionError as error:
            raise PermissionError(f"{address}: {error}") from None
        except BaseException as error:
            connection.hang_up()
            if not isinstance(error, (OSError, EOFError)):
                raise
            why = str(error) or why  # (The last trial is cut short, and says nothing.)
            if time.monotonic() + pause >= deadline:
                text = f"no scheduler at {address} within {timeout} s ({why})"
                raise ConnectionError(f"{text}: is it running, is this its address?") from error
        if timeout is None and trial == 0:
            logger.warning("No scheduler at %s yet (%s); trying again", address, why)
        await asyncio.sleep(pause)


# ---- 7. Scheduler: the asyncio-stream server around its mind; recordings, replay ----
#
# One task for each peer reads its stream, and all of them call the same mind in the same loop: a
# stimulus runs from its begin to its end without another in between, and needs no lock.  It is one
# process and one thread, so what a task costs here bounds the rate of the whole cluster; and if it
# ends, the cluster does: what it knows is nowhere else.
#
# Since a mind is told everything by stimuli, time included, and decides nothing by chance, a file
# of all its stimuli is all there is to know of a run.  So a scheduler can record them, with what
# it answered; ``replay`` finds the line after which a mind of today says something else, or its
# books do not balance.  What users computed is not in the file: frames stand there as digests.
#
# dask: one process and one thread, too; but its scheduler's handlers and state are one object.


class Scheduler(Body):
    """Runs a SchedulerMind.

    ``host`` and ``port`` say where it listens; port 0 is any that is free.  A worker that gives no
    sign of life for ``worker_ttl`` seconds is dead.  ``record`` is a file for ``replay``.  An
    ``async with`` starts and closes it.  ``address`` is what workers and clients connect to,
    ``state`` the mind; the event ``ended`` is set when a client has shut the cluster down, and
    then it should be closed.  Raises OSError if the port is taken, ValueError or OverflowError for
    a ``worker_ttl`` that is no time, or a port that is none.

        async with Scheduler() as scheduler, Worker(scheduler.address):
            async with Client(scheduler.address, asynchronous=True) as client:
                assert await client.submit(pow, 2, 10) == 1024
    """

    role_when_called = "scheduler"

    def __init__(self, host="127.0.0.1", port=0, worker_ttl=30, record=None):
        # Attempts are numbered from the time of day: higher in each life of a scheduler, so that
        # what a worker still sends to the one before can never be taken for an answer.
        ttl_us = int(seconds(worker_ttl) * 1_000_000)
        if ttl_us < 1:
            raise ValueError(f"worker_ttl={worker_ttl} is no time that a worker could live")
        made_with = {"first_attempt": time.time_ns() // 1000, "ttl_us": ttl_us}
        super().__init__(SchedulerMind(**made_with))
        if folder := os.environ.get("MINIDIST_RECORD"):  # There every scheduler has a file.
            record = record or os.path.join(folder, f"{unique()}.jsonl")
        self.record, self.recording = record, None  # the name of a file; the file while it is open
        self.recorded = [made_with]  # what is still to be written, a line each
        self.host, self.port = host, port
        self.watched = {}  # {worker's name: its process, if we started it}
        self.ended = asyncio.Event()

    async def _start(self):
        await self.listen(self.host, self.port)
        if self.record:  # Only now: whose port is in use must not empty the other's recording.
            self.recording = open(self.record, "w")
        self.start(self.tell_time())

    async def close(self):
        """Hang up on everybody.  Worker processes end, clients' pending futures are cancelled.

        What the cluster holds is gone with it.  Twice is harmless.
        """
        if self.server:
            self.server.close()
        if self.ended.is_set() and self.links:
            # They were told good-bye, and hang up first: if we did while something of theirs is
            # under way, TCP would reset the connection, and they might not read the good-bye.
            # (They may have much to read before it.)
            await asyncio.wait([link.following for link in self.links.values()], timeout=4)
        await self.stop()
        if self.recording:
            self.recording.close()
        self.ended.set()

    async def tell_time(self):
        """The mind has no clock; it is told the time often enough to notice who is silent.

        The time that this process has lived through, and no clock's: while it was stopped itself
        (Ctrl-Z, a laptop that sleeps) nobody could be heard.  Each byte is a sign of life: on a
        slow link, a heartbeat may wait behind megabytes.
        """
        for ticks in count():
            for worker in [peer for peer, link in self.links.items() if link.heard]:
                self.links[worker].heard = False
                if worker in self.state.workers:
                    self.stimulate("heartbeat", worker)
            self.happens("time-passes", ticks * self.state.ttl_us // 4)
            await asyncio.sleep(self.state.ttl_us / 4_000_000)

    async def serve(self, connection):
        """One peer, from when it registers until it leaves.

        However that happens, the mind is told, and how a worker was lost goes into the message of
        a ``KilledWorker``: a process of ours is asked for its exit code or signal.
        """
        batch = await connection.receive()
        if self.ended.is_set():
            return  # Who shook hands just before the end was not told good-bye.
        # Who registers says its id first; for the mind that is the peer, as in all that follows.
        op, *fields = batch.pop(0) if batch else [""]
        peer = fields.pop(0) if op.startswith("register-") else SCHEDULER
        if peer == SCHEDULER or peer in self.links:
            raise ProtocolError(f"a {connection.peer} that does not register, or is here already")
        how, name = (["connection lost"], fields[0]) if op == "register-worker" else ([], "")
        process = self.watched.get(name)
        try:
            self.stimulate(op, peer, *fields)
            await self.follow(peer, connection, batch)
            if process and peer in self.state.workers:
                with contextlib.suppress(TimeoutError):  # How it ended says more.
                    how = [describe_exit(await asyncio.wait_for(process.wait(), 5))]
            elif process and not self.state.named([name]):  # Else it was another of that name.
                send_signal(process, signal.SIGKILL)  # It was silent for too long.
        finally:
            how = [f"{text} at {time.strftime('%H:%M:%S')}" for text in how]
            self.happens(f"{connection.peer}-left", peer, *how)

    def take(self, peer, op, fields):
        """Only who has registered, once, is listened to.

        What a worker has sent before it heard that it was taken for dead is still read, and must
        not count: its tasks were placed again.
        """
        if op.startswith("register-"):
            raise ProtocolError(f"{op} a second time")
        if peer in self.state.workers or peer in self.state.clients:
            self.stimulate(op, peer, *fields)
            if op == "shutdown":
                self.ended.set()
                # When that has been logged:
                asyncio.get_running_loop().call_soon(self.server.close)
        # Else it was refused, or declared dead, and is being hung up on.

    def stimulate(self, op, *args):
        """All that this mind is told goes through here; each time is one line of the recording."""
        if not self.recording:
            return super().stimulate(op, *args)
        # What earlier stimuli have left is put aside: a line has the messages of its own.
        outbox, self.state.outbox = self.state.outbox, []
        try:
            super().stimulate(op, *args)
        finally:
            self.recorded.append([op, args, self.state.outbox])
            outbox += self.state.outbox
            self.state.outbox = outbox

    def flush(self):
        """Send, and log who came and went; not at the end, when all do."""
        if self.recording and self.recorded:
            # First: what this process has said to anybody is there, however it ends.
            recorded, self.recorded = self.recorded, []
            # (All at once: encoded one by one, after its stimulus, a line costs half as much more.)
            try:
                print("\n".join(map(RECORDED.encode, recorded)), file=self.recording, flush=True)
            except OSError as error:
                logger.error("Nothing is recorded any more: %s", error)
                with contextlib.suppress(OSError):
                    self.recording.close()
                self.recording = None
        super().flush()
        for text in self.state.news if self.server.is_serving() else ():
            logger.info("%s", text)
        self.state.news.clear()


DIGESTS = {}  # {frame: its digest}, of small ones: a call's frames come and go again


def digest(frame):
    """What a recording has in a frame's place: it differs where frames do."""
    text = DIGESTS.get(frame) if type(frame) is bytes else None  # (A large one has no hash.)
    if text is None:
        text = f"{len(frame)} bytes, sha256 {hashlib.sha256(frame).hexdigest()}"
        if len(frame) < 1_000:
            # (Not ``forget_oldest``: at each new one, it would pass over those forgotten before.)
            if len(DIGESTS) > LIMITS["remembered"]:
                DIGESTS.clear()
            DIGESTS[frame] = text
    return text


RECORDED = json.JSONEncoder(default=digest, separators=(",", ":"), check_circular=False)


def replay(path, validate=True):
    """Run what a scheduler has recorded through a fresh mind.

    After the first line, which says how the mind was made, and after each stimulus, yields the
    number and the text of the line, and the mind.  Raises ValueError at a line that is none, whose
    messages are others now, or after which an invariant does not hold (unless ``validate`` is
    false: checking them takes long).
    """
    body = None
    with open(path, errors="replace") as file:
        # (The last line may have been being written when the scheduler was killed.)
        for number, line in enumerate((line for line in file if line.endswith("\n")), 1):
            try:
                if body is None:
                    body = Body(SchedulerMind(**json.loads(line)))
                else:
                    repeat(body, *json.loads(line))
                if validate:
                    body.state.validate()
            except (ValueError, TypeError, LookupError, AssertionError) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                told = place.line if isinstance(error, AssertionError) else type(error).__name__
                raise ValueError(f"{path}, line {number}: {told}: {error}") from error
            yield number, line, body.state
    if body is None:
        raise ValueError(f"{path} is no recording: it has no line")


def repeat(body, op, args, recorded):
    """Give a mind one recorded stimulus; raise ValueError if it does not say what it said then."""
    _, _, kinds = OPS.get(op, ((), (), ()))
    # (The last of them: of who registers, the id stands in the peer's place.)
    for place, kind in enumerate(kinds[1 - len(args) :], 1):
        # Where there were frames, their digests will do: no mind looks into them.
        args[place] = tuple(args[place]) if kind is to_frames else convert(kind, args[place], ())
    body.state.outbox = []
    with contextlib.suppress(Exception):  # Whoever had sent that was dropped.
        body.stimulate(op, *args)
    for now, then in zip_longest(body.state.outbox, recorded):
        if RECORDED.encode(now) != RECORDED.encode(then):
            raise ValueError(f"it says {now}, and it is recorded that it said {then}")


# ---- 8. Worker: executor threads, peer-to-peer transfers ----
#
# One loop talks to the scheduler and to peers; as many threads as tasks may run at a time take
# what is ready from the mind, and tell it what came of it; it has a lock around it for that reason.
# Two things are done once for many tasks: a thread wakes the loop, to send what the mind has to
# say, only if nobody else has since it sent last; and the loop wakes no more threads than there
# are ready attempts.
#
# The mind holds the values, though it never looks into one.  Threads add to them; only the loop
# removes any, since frees come with the scheduler's messages.

WORKER = contextvars.ContextVar("the worker whose task this is", default=None)


def get_worker():
    """The Worker on which a task, or a function of ``Client.run``, calls this.  Else ValueError.

    It has ``name``, ``address``, ``nthreads`` and ``data``.  A context variable and not a global:
    several workers may live in one process, and a coroutine takes its context along.
    """
    if WORKER.get() is None:
        raise ValueError("get_worker() is for tasks: no worker runs this")
    return WORKER.get()


class Worker(Body):
    """Runs a WorkerMind: threads that take ready attempts, and connections for values.

    ``nthreads`` tasks run at a time (default: one for each core); ``name`` is its own in the
    cluster (default: its address).  An ``async with`` starts and closes it; ``timeout`` seconds
    are given to the scheduler to answer, None waits for ever.  Raises OSError if there is no
    scheduler, ValueError if the name is in use, TypeError or ValueError for a bad argument.

    Threads take attempts from the mind by themselves; nobody hands them out.  They share one
    interpreter: pure Python code runs in one of them at a time, so several threads help tasks that
    wait or that compute in NumPy, and several processes help all.

    dask: a worker is the same, with a pool of threads, data that can spill to disk, and a nanny.
    """

    role, role_when_called = "worker", "holder"

    def __init__(self, scheduler_address, nthreads=None, name=None, timeout=10):
        super().__init__(WorkerMind())
        split_address(scheduler_address)
        self.scheduler_address, self.timeout = scheduler_address, seconds(timeout)
        nthreads = (os.cpu_count() or 1) if nthreads is None else nthreads
        self.nthreads, self.name = whole("nthreads", nthreads, least=1), name
        self.lock = threading.Condition()  # Threads take attempts; they wait for a ready one.
        self.scheduler = None  # the Connection
        self.ticking = self.closed = False

    async def introduce(self, connection):
        """Listen where the scheduler was reached from: that is where peers will look for us."""
        if self.server is None:
            await self.listen(connection.writer.get_extra_info("sockname")[0], 0)
            self.name = str(self.name if self.name is not None else self.address)
        self.id = f"{self.address}#{unique()[:8]}"  # Of each trial: who had the last may be dead.
        return ["register-worker", self.id, self.name, self.nthreads, [], []]

    async def _start(self):
        """Connect, listen, register, start the threads."""
        self.loop = asyncio.get_running_loop()
        reached = await reach_scheduler(self.scheduler_address, self, self.timeout)
        self.scheduler, (op, answer), batch = reached
        if op == "refused":
            raise ValueError(f"{self.scheduler_address}: {answer}")
        self.start(self.give_signs_of_life(answer / 4_000_000))  # It is the scheduler's patience.
        for number in range(self.nthreads):
            name = f"minidist-{self.name}-{number}"
            threading.Thread(target=self.run_thread, name=name, daemon=True).start()
        self.finished = self.start(self.follow(SCHEDULER, self.scheduler, batch))

    async def give_signs_of_life(self, interval_seconds):
        """A connection may stay open though its process is frozen or its host gone.

        These come from the loop, not from the tasks' threads: a long task does not make a worker
        look dead.  But one that holds the interpreter's lock in compiled code for longer than the
        scheduler's patience does.
        """
        while True:
            self.scheduler.send(["heartbeat"])
            await asyncio.sleep(interval_seconds)

    async def leave(self):
        """Hand over what exists nowhere else, and go.  Running tasks are not waited for.

        The scheduler copies it to other workers, and says good-bye when that is done; then this
        returns.  Tasks that still run here run again elsewhere.
        """
        self.happens("leave")
        await asyncio.wait([self.finished])

    async def close(self):
        """Leave at once.  Running tasks are not waited for; nothing is handed over.

        To the scheduler this is a lost worker: results that are still needed are computed again.
        A thread cannot be stopped: one that runs a task ends when that does.
        """
        with self.lock:
            self.closed = True
            self.lock.notify_all()
        if self.server:  # Else it has not been started.
            self.server.close()
        await self.stop()
        if self.scheduler:
            await self.scheduler.close()

    @property
    def data(self):
        """{key: value} of what this worker holds: a new dict, which changes nothing here."""
        with self.lock:
            return {name[0]: self.unpacked(name, value) for name, value in self.state.data.items()}

    def flush(self):
        """Send what the mind has to say; wake as many threads as there are attempts for."""
        self.waking = False  # First: what a thread tells the mind from now on needs a new flush.
        super().flush()
        with self.lock:
            self.lock.notify(len(self.state.ready))
            if self.state.ready and not self.ticking:
                self.ticking = self.loop.call_later(LATE_US / 1_000_000, self.tick)

    def tick(self):
        """Time matters to the mind only while something is ready."""
        self.ticking = False
        self.happens("time-passes", time.monotonic_ns() // 1000)

    # Threads.

    def run_thread(self):
        """Take ready attempts and run them, until the worker closes.

        The next attempt may begin before the loop has sent the end of this one: a thread never
        waits for the network.
        """
        WORKER.set(self)
        while not self.closed:
            self.wake()
            self.run_task()  # (A call for each: while it waits, it keeps no input and no result.)

    def run_task(self):
        """[9] Wait for a ready attempt, unpickle its call, run it, tell the mind what came of it.

        A small result is pickled here, in the task's thread, if a client wants it.

        Whatever goes wrong in here is this task's failure, and nobody else's: a call
        that cannot be unpickled, an exception that cannot be pickled, ``SystemExit``.
        """
        with self.lock:
            self.lock.wait_for(lambda: self.closed or self.state.ready)
            if self.closed:
                return
            attempt = self.state.stimulus_take()
            inputs = {name: self.state.data[name] for name in attempt.inputs}
        start = time.perf_counter_ns()
        try:
            try:
                values = {name[0]: self.unpacked(name, value) for name, value in inputs.items()}
                func, args, kwargs = load_call(attempt.run_spec, values)
            except Exception as error:
                text = f"the call of {attempt.key!r} cannot be unpickled on {self.name}"
                text = f"{text}: {type(error).__name__}: {error}"
                raise RuntimeError(f"{text}: can that worker import the same as you?") from error
            result = self.call(func, args, kwargs)
            duration_us = (time.perf_counter_ns() - start) // 1000
            nbytes, kind, value = sizeof(result), type_name(result), ()
        except BaseException as error:  # Also SystemExit: a task does not end its worker.
            told = "failed", attempt.number, pack_exception(error, skip=2)
        else:
            # A small result that somebody waits for travels with the notice: one message, and no
            # connection to this worker.  Others are pickled if and when they are asked for.
            if attempt.wanted and nbytes <= LIMITS["ride_along_bytes"]:
                status, frames = pack_result(attempt.key, result)
                # (What cannot be pickled will fail whoever asks for it.)
                if status == "ok" and sum(map(len, frames)) <= LIMITS["ride_along_bytes"]:
                    value = frames
            told = "finished", attempt.number, result, nbytes, kind, duration_us, value
        with self.lock:
            self.stimulate(*told)

    def unpacked(self, name, value):
        """A value as an object, which is kept under its name, unless the mind has freed it."""
        if isinstance(value, Packed):
            value = loads(value)  # Two threads may do so at once; one result stays.
            with self.lock:  # It may be freed just now: what is stored after that would stay.
                if name in self.state.data:
                    self.state.data[name] = value
        return value

    def call(self, func, args, kwargs):
        """What a function returns, in its thread.  A coroutine runs in the loop.

        Its thread is taken all the same: else ``nthreads`` would bound nothing, and thousands of
        coroutines might begin at once.  It shares the loop with the worker: one that does not await
        holds up the heartbeats.  When the worker closes, it is cancelled.
        """
        result = func(*args, **kwargs)
        if inspect.iscoroutine(result):
            result, *errors = asyncio.run_coroutine_threadsafe(self.run(result), self.loop).result()
            if errors:  # (By no name: an error refers to this frame, and so to all arguments.)
                raise errors.pop()
        return result

    async def run(self, coroutine):
        """What a coroutine returns, and what it raises, as a value: SystemExit ends a loop."""
        self.start(asyncio.current_task())  # It runs already; this notes that it is ours.
        try:
            return [await coroutine]
        except BaseException as error:
            places = BaseException.__traceback__  # (Whatever its own class makes of that name.)
            places.__set__(error, places.__get__(error).tb_next)  # without this frame
            return None, error

    # Data connections.  What comes by them is entered in the mind's books only as far as rule three
    # of chapter 1 allows: a value that was put is claimed on the scheduler's stream.

    async def serve(self, connection):
        """A peer's or client's data connection: give it the values that it asks for."""
        while True:
            for op, *fields in await connection.receive():
                if op == "get-data":
                    await self.give(connection, iter(fields[0]))
                elif op == "put-data":
                    self.happens(op, connection.peer, *fields)
                elif op == "run":
                    run = functools.partial(self.answer_run, connection, *fields)
                    threading.Thread(target=run, daemon=True).start()
                else:
                    raise ProtocolError(f"{op} on a data connection")
            fields = run = ()  # As in ``follow``: what came must not be kept until more comes.

    def answer_run(self, connection, number, run_spec):
        """Run a function outside of the task system, for Client.run, in a thread of its own.

        It takes none of the tasks' threads: it must be able to look at a worker that is busy.  The
        answer goes by the connection on which it was asked; if that is gone, nobody waits for it.
        """
        WORKER.set(self)
        try:
            func, args, kwargs = load_call(run_spec, {})
            with contextlib.suppress(ValueError, TypeError):  # Some builtins have no signature.
                if "dask_worker" in inspect.signature(func).parameters:
                    kwargs["dask_worker"] = self
            status, value = pack_result(name_of(func), self.call(func, args, kwargs))
        except BaseException as error:
            status, value = "error", pack_exception(error, skip=2)
        with contextlib.suppress(RuntimeError):  # The loop is closed.
            self.loop.call_soon_threadsafe(connection.send, ["ran", number, status, value])

    async def give(self, connection, names):
        """Answer for each of ``names``, an iterator.  Who asks sets the pace.

        (A call of its own, so that a connection on which nothing is asked for keeps no value.)
        """
        # In another thread: pickling 100 MB takes long, and the loop has other peers.
        while answers := await asyncio.to_thread(self.next_answers, names):
            for answer in answers:
                connection.send(answer)
            await connection.written()
            if connection.writer.is_closing():
                return  # Nobody is there any more.

    def next_answers(self, names):
        """What to say of the next of ``names``: of a large value, or of many small ones.

        (A thread, and a batch, for each small one would cost several times what it does itself.)
        """
        answers, nbytes = [], 0
        while nbytes < LIMITS["ride_along_bytes"] and (name := next(names, None)):
            with self.lock:  # "missing" is normal: it was freed while the request was under way.
                missing, value = name not in self.state.data, self.state.data.get(name)
            status, frames = ("missing", ()) if missing else pack_result(name[0], value)
            answers.append(["data", *name, status, frames])
            nbytes += sum(map(len, frames))
        return answers


def pack_result(key, result):
    """(status, frames) of a result, which are here or made, or of why nobody can pickle it."""
    try:
        return "ok", result if isinstance(result, Packed) else dumps(result)
    except BaseException as error:  # Also what no future can hold: StopIteration, SystemExit.
        text = f"the result of {key!r}, a {type_name(result)}, cannot be pickled: {text_of(error)}"
        return "error", pack_exception(TypeError(f"{text}: return something simpler"))


# ---- 9. Client: Future, Client, as_completed, wait, fire_and_forget, progress ----
#
# A user's thread, and ``Future.__del__`` in any thread at any moment of the garbage collector,
# only append an entry to the client's inbox, and wake its loop if it sleeps; that append is the
# commit.  Counts, tables and the stream change only in the loop, in the inbox's order.
#
# A lock around the mind would do for threads, but not for ``__del__``: the collector may call it
# in the thread that holds the lock.  And an interrupt (Ctrl-C in a notebook) may come between any
# two lines of the user's thread; after an append, there is nothing that it could leave half done.
#
# Calls that wait are coroutines.  An asynchronous client returns them; a synchronous one, whose
# loop runs in another thread, waits for them there: see ``Threaded._run``.
#
# Names and meanings are those of dask.distributed: ``from dask.distributed import Client`` is the
# way to a bigger cluster.


class CancelledError(concurrent.futures.CancelledError):
    """This future will never have a result; the message says why.

    Somebody cancelled it, scattered data that it needs was lost with its worker or could be put on
    none, its last future was released, its client was closed, or the scheduler is gone.
    """


class KilledWorker(Exception):
    """A task was alone on several workers when they died; the message says which, when and how.

    It is not tried again, since it would go on to kill workers: look for what ends a process (a
    crash in compiled code, too much memory, ``os._exit``).
    """


INHERITED = "this client belongs to the parent process: make one of your own"

# What ``wait`` returns: the set of futures that are done, and the set of the others.
DoneAndNotDoneFutures = namedtuple("DoneAndNotDoneFutures", "done not_done")


class Future(Shown):
    """The result of a task that may not have run yet.  Made by ``submit``, ``map``, ``scatter``.

    The result is kept on the cluster while one of its futures lives: delete the last one, and if no
    other task needs it, it is freed, or the task does not run if it has not begun.  Given as an
    argument, at any depth, to ``submit`` or ``map``, a future becomes its value, on the worker.
    ``key`` is the task's name; two futures of one key are one task.  In an event loop, ``await
    future`` is its result.
    """

    def __init__(self, key, client, held):
        self.key, self.client = key, client
        self._state = None  # the FutureState, as soon as the client's loop has read its inbox
        self._held = held  # a list, with that in it until the loop lets go of it: once
        self._released = False

    def _known(self, timeout=None):
        """Its state; to have one, the loop has to act on what was posted so far.

        For an asynchronous client's loop nobody can wait here: until then, it is pending.
        """
        if self._state is None and not self.client.asynchronous:
            self.client._run(self.client._catch_up, timeout=timeout)
        return self._state or FutureState(self.key, 0)

    @property
    def status(self):
        """ "pending", "finished", "error" or "cancelled".

        What is finished can be pending again: its result was lost before it came here, and is
        being computed anew.  That is what this client was told last; nobody is asked for it.
        """
        return self._known().status

    @property
    def type(self):
        """The type of the result, when it is finished; its name, if it is not known here.

        It came with the notice; nothing is fetched, nor imported, to know it.
        """
        module, _, name = (self._known().type if self.status == "finished" else "").rpartition(".")
        here = [sys.modules.get(module or "builtins", types), types]
        return next((vars(m)[name] for m in here if name in vars(m)), name or None)

    def done(self):
        """Whether it is finished, erred or cancelled: whether ``result`` need not wait for a task.

        (It may still have to wait for a value that is on its way.)
        """
        return self.status != "pending"

    def cancelled(self):
        """Whether there will be no result, though the task did not fail: see ``CancelledError``."""
        return self.status == "cancelled"

    def result(self, timeout=None):
        """Wait for the result; raise the task's own exception if it failed.

        ``timeout`` is in seconds, or a string like "10 ms".  Raises TimeoutError, and
        CancelledError if there will be no result.  The value is unpickled for each call: what one
        caller does to it does not change another's.
        """
        return self.client._wait_for([self], lambda: outcome(self._state), timeout, value=True)

    def exception(self, timeout=None):
        """Wait; return the exception that the task raised, None if there was none.

        Raises TimeoutError after ``timeout``, and CancelledError if it was cancelled.
        """
        return self.client._wait_for([self], lambda: failure(self._state), timeout)

    def traceback(self, timeout=None):
        """Wait; return the traceback of ``exception()``: its frames name the worker's code.

        None if it raised nothing, or was no Python code, which alone has frames (``int("x")``).
        Takes and raises what ``exception`` does.
        """
        wait = self.client._wait_for
        return wait([self], lambda: getattr(failure(self._state), "__traceback__", None), timeout)

    def cancel(self, *, force=False):
        """As ``Client.cancel``."""
        return self.client.cancel([self], force=force)

    def retry(self):
        """As ``Client.retry``."""
        return self.client.retry([self])

    def add_done_callback(self, fn):
        """Call ``fn(future)`` in a thread for callbacks, as soon as it is done.

        Returns at once.  If the future is done already, it is called soon.
        What it raises is logged.  All callbacks of this process share one thread, which is not the
        loop's: so a callback may wait for other futures, but holds up the callbacks after it.
        """

        def call():
            try:
                fn(self)
            except Exception:
                logger.exception("A callback of %r failed", self)

        def submit(state):
            with contextlib.suppress(RuntimeError):  # The interpreter is ending.
                callbacks(os.getpid()).submit(call)

        self.client._post(lambda: self.client._watch(self._state, submit))

    def release(self):
        """Let the result go, as if this object were deleted.  Twice is harmless.

        Other futures of the same key keep it; without any, this one is cancelled, unless it failed.
        """
        self.client._post(self.client._release, self._held)
        self._released = True

    def __del__(self):
        # No lock, and nothing that waits: the collector may call this anywhere.  After a fork the
        # parent's futures are none of the child's business.
        try:
            if self._held and self.client._pid == os.getpid():
                self.client._post(self.client._release, self._held)
        except Exception:
            pass  # The interpreter is going down.

    def __await__(self):
        """``await future`` is ``await future.result()``; TypeError for a synchronous client's."""
        if self.client.asynchronous:
            return self.result().__await__()
        raise TypeError("only futures of a Client(asynchronous=True) can be awaited: use result()")

    def __copy__(self, memo=None):
        """Itself: a future is a handle, and may be in objects that are copied."""
        return self

    __deepcopy__ = __copy__

    def __reduce__(self):
        """Among a call's arguments, note that it is one of them, and become its value there.

        Anywhere else a TypeError.  A pickled future that is nowhere noted keeps nothing alive: what
        it stands for might be freed before it is unpickled.
        """
        if COLLECTED.get() is None:
            # dask: a Future may be pickled anywhere; it binds itself to its worker's client later.
            text = "a Future can be pickled only inside the arguments of submit or map"
            raise TypeError(f"{text}: pass {self.key!r} as an argument, or gather it first")
        COLLECTED.get()[self] = None
        return resolve, (self.key,)

    def _facts(self):
        state = FutureState(self.key, 0)
        with contextlib.suppress(OSError, RuntimeError):  # In the loop, nobody can wait.
            state = self._known(timeout=0.1)
        kind = [f"type: {state.type}"] if state.status == "finished" else []
        return [state.status, *kind, f"key: {self.key}"]


@functools.cache
def callbacks(pid):
    """The thread for callbacks: a process that was forked has none of its parent's threads."""
    return concurrent.futures.ThreadPoolExecutor(1, "minidist-callbacks")


def settled(state, value=False):
    """Whether nothing more will come for it (``value``: and its value is here).

    That a task has finished is one thing, and soon known; its value is fetched only if it is asked
    for: who waits for 1,000 tasks with ``wait`` gets 1,000 notices, and no large results.
    """
    if value and state.status == "finished":
        return bool(state.value)
    return state.status != "pending" and not state.data  # (Else it is being scattered once more.)


def failed(state):
    """Whether it has come to nothing.  (A value that is here is final: it stays finished.)"""
    return state.status in ("error", "cancelled")


def outcome(state):
    """What a settled state has come to: its value, or an exception raised."""
    if value := state.value:  # (Read once: another thread may release it meanwhile.)
        try:
            # (Read-only: so ``loads`` copies them, and each call gets arrays of its own.)
            return loads([memoryview(frame).toreadonly() for frame in value])
        except Exception as error:
            raise RuntimeError(f"the result of {state.key!r} cannot be unpickled here") from error
    # (Not by a variable: the exception refers to this frame, which would refer to it.)
    raise to_be_raised(failure(state))


def to_be_raised(error):
    """What ``result()`` raises: the task's own exception, unless it would mean something here.

    It would end a loop, or cancel who awaits it, in silence.  (As PEP 479 has it for generators.)
    """
    if isinstance(error, (StopIteration, StopAsyncIteration, asyncio.CancelledError)):
        stop = RuntimeError(f"the task raised {type(error).__name__}")
        stop.__cause__ = error
        return stop
    if error is None:
        return RuntimeError("it was retried just now: wait for it again")
    return error


def failure(state):
    """The exception of a state that erred or was cancelled (then raised), else None."""
    if state.status == "cancelled":
        raise CancelledError(f"{state.key!r}: {state.text}")
    if state.status != "error":
        return None
    if state.exception:
        return unpack_exception(state.exception)
    return (KilledWorker if state.type == "KilledWorker" else ConnectionError)(state.text)


@functools.cache
def loop_in_thread(pid):
    """(loop, its thread) of all that is synchronous in this process.

    In a notebook a loop is running already, but in the thread in which cells wait: so what is
    synchronous cannot use it.  This one goes on until the process ends, whatever is closed before:
    so nobody can come too late for it, and wait for ever.  A process that was forked has none of
    its parent's threads.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    return loop, thread


class Threaded(Shown, Entered):
    """What lives in the running loop, or (synchronous) in one that runs in another thread.

    Subclasses have two coroutine methods, ``_start`` and ``_close``; the rest follows.
    """

    def _live(self, asynchronous):
        """The end of ``__init__``: a synchronous one has started when that returns."""
        self.asynchronous, self._pid = asynchronous, os.getpid()
        if not asynchronous:
            self.loop, self._thread = loop_in_thread(os.getpid())
            atexit.register(self.close)  # What was posted goes out, and no task is cut off.
            try:
                self._run(self._start)
            except BaseException:
                self.close()  # What was started already ends, also after an interrupt.
                raise

    async def __aenter__(self):
        if not self.asynchronous:
            raise TypeError("async with needs asynchronous=True; use with")
        return await super().__aenter__()

    def __enter__(self):
        if self.asynchronous:
            raise TypeError("what is asynchronous needs async with, not with")
        return self

    def __reduce__(self):
        raise TypeError(f"a {type(self).__name__} cannot travel")

    def __exit__(self, *_):
        self.close()

    def close(self, timeout=None):
        """End it, and what belongs to it.  Twice is harmless.

        A client's pending futures are cancelled; results that are here stay readable, all others
        are let go.  A cluster that it has started for itself ends, too.  Raises TimeoutError if
        that takes more than ``timeout`` seconds.  (To a scheduler that does not react, 30 are
        given.)
        """
        if self.asynchronous:
            return asyncio.wait_for(self._close(), seconds(timeout))
        if self._pid == os.getpid():
            self._run(self._close, timeout=seconds(timeout))
            atexit.unregister(self.close)

    def _run(self, wait, *args, timeout=None):
        """Run ``wait(*args)`` in the loop: an awaitable, or (synchronous) wait for it here.

        An interrupt in the waiting thread ends what it waits for, and nothing else.
        """
        if self.asynchronous:
            return wait(*args)
        if self._pid != os.getpid():
            raise RuntimeError(INHERITED)
        if threading.current_thread() is self._thread:
            raise RuntimeError("a synchronous client's loop cannot wait for itself: deadlock")
        future = asyncio.run_coroutine_threadsafe(wait(*args), self.loop)
        try:
            return future.result(timeout)
        finally:
            future.cancel()  # If it is not done: nobody waits for it any more.
            del future  # It may hold an exception, which refers to this frame: break the cycle.


class Client(Threaded, Body):
    """Submits calls to a cluster.

    ``address`` is the scheduler's ("HOST:PORT"), or a LocalCluster; it is tried again for
    ``timeout`` seconds.  Without one, ``LocalCluster(**new)`` is started, and ends
    with the client.  As a context manager it closes itself.  With ``asynchronous=True`` it
    lives in the running event loop: use ``async with`` (or ``await`` it); methods that wait return
    awaitables, and futures can be awaited.  Otherwise its loop runs in a thread, so that it
    works in notebooks.  Raises OSError if no scheduler is there, PermissionError if it refuses us,
    ValueError for what is no address, TypeError for ``new`` beside one, and what LocalCluster does.
    Once it is closed, what needs the cluster raises RuntimeError; once the scheduler is lost,
    ConnectionError.

        with Client("127.0.0.1:8786") as client:    # or Client(), Client(n_workers=4)
            squares = client.map(lambda x: x * x, range(100))
            total = client.submit(sum, squares)     # futures as arguments: nothing is fetched
            print(total.result())

    ``name`` is the first part of its identity in the scheduler's log.  ``Client.current()`` is
    this one while it is open, unless not ``set_as_default`` or another was opened later.
    """

    role = "client"
    _instances = {}  # an ordered set of those that are open, and may be the current one

    def __init__(
        self, address=None, *, timeout=10, asynchronous=False, name=None, set_as_default=True, **new
    ):
        super().__init__(ClientMind())
        if address is not None and new:
            raise TypeError(f"a client of a cluster that is there takes no {', '.join(new)}")
        self.name, self._timeout, self._set_as_default = name, seconds(timeout), set_as_default
        self._inbox = deque()  # (function, *arguments), to be called in the loop
        self._watchers = {}  # {FutureState: {called once it is settled: whether with its value}}
        self._answers = {}  # {number of a question: asyncio.Future of the answer}
        self._numbers, self._unique = count(), unique()
        self._workers = {}  # what is known of them, by their addresses
        self._scheduler = None  # the Connection
        # The exception type and words that new calls get, before it is connected and at its end.
        self._refusal = (RuntimeError, "this client is not connected: await it first")
        self._owns = address is None  # its cluster, which then ends with it
        if self._owns:
            address = LocalCluster(asynchronous=asynchronous, **new)
        self.cluster = address if isinstance(address, LocalCluster) else None
        self._address = getattr(address, "address", address)
        if not self._owns:
            split_address(self._address)
        self._live(asynchronous)

    # Life.

    async def _start(self):
        self.loop, self._thread = asyncio.get_running_loop(), threading.current_thread()
        if self._owns and self.asynchronous:
            self._address = (await self.cluster).address
        self._scheduler, _, batch = await reach_scheduler(self._address, self, self._timeout)
        self._refusal, self.links[SCHEDULER] = None, self._scheduler
        self._scheduler.following = self.start(self._listen(batch))
        await self._ask("workers", limit=None if self._timeout is None else max(self._timeout, 1))
        if self._set_as_default:
            Client._instances[self] = None

    async def introduce(self, connection):
        """Nobody connects to a client: it says only who it is, and that it wants nothing."""
        self.id = f"{self.name or 'client'}-{unique()[:8]}"
        return ["register-client", self.id, []]

    @classmethod
    def current(cls):
        """The client that was opened last.  Raises ValueError if none is open."""
        if not cls._instances:
            raise ValueError("there is no client: make one with Client()")
        return next(reversed(cls._instances))

    async def _close(self):
        """What was posted still goes out; then what waits is told that it waits in vain."""
        Client._instances.pop(self, None)
        if self._scheduler is not None:
            self._post(self.state.send, SCHEDULER, "leave")
            await self._catch_up()
            self._end(RuntimeError, "this client is closed: make a new one")
            self.links.pop(SCHEDULER, None)  # It is told nothing more.
            # The scheduler hangs up when it has read that: if we did while something of it is under
            # way to us, TCP would reset the connection, and the end of what we said might be lost.
            # (Seconds of work may be before it.)
            with contextlib.suppress(OSError, RuntimeError, ValueError):  # It is gone.  (uvloop.)
                self._scheduler.bear(LIMITS["close_seconds"])
                await self._scheduler.written()
                self._scheduler.writer.write_eof()
            await asyncio.wait([self._scheduler.following], timeout=LIMITS["close_seconds"])
            await self.stop()
            await self._scheduler.close()
        if self._owns:
            await self.cluster._close()
            atexit.unregister(self.cluster.close)  # It would be kept as long as this process.

    def shutdown(self):
        """End the whole cluster, and close.

        The scheduler says good-bye to all and ends; other clients' pending futures are cancelled.
        (A ``Scheduler`` that your own program has started still has to be closed.)
        Raises RuntimeError if this client is closed, ConnectionError if the scheduler was lost.
        """
        self._check_open()
        self._post(self.state.send, SCHEDULER, "shutdown")
        return self.close()

    async def _listen(self, batch):
        """The scheduler's stream, until it ends."""
        await self.follow(SCHEDULER, self._scheduler, batch)
        if not self._refusal:  # Else we are closing.
            text = f"the scheduler at {self._address} is gone: connect to a new one"
            self._end(ConnectionError, text)

    def _end(self, kind, text):
        """From now on, pending futures are cancelled, and new calls raise ``kind(text)``."""
        self._refusal = (kind, text)
        self.flush()

    def take(self, peer, op, fields):
        """What a user asked for outside of futures, and the scheduler's warnings, are for users."""
        if op == "warning":
            logger.warning("%s", *fields)
        elif op in ("answer", "ran"):
            self._answers.pop(fields[0]).set_result(fields[1:])  # Also if nobody waits any more.
        else:
            super().take(peer, op, fields)

    def flush(self):
        """Act on what was posted, and send what comes of it; wake who waits for what is news; warn.

        Each looks at the state itself, and waits on if it is not yet what it waits for.

        A bounded number of entries in one turn of the loop, until somebody waits (``_catch_up``).
        Between the turns answers are read: the first of 100,000 calls are running, and their
        results arrive, while the last are still being submitted.
        """
        self.waking = False
        for _ in range(LIMITS["batch_messages"]):
            if not self._inbox:
                break
            function, *arguments = self._inbox.popleft()
            function(*arguments)
        if self._refusal:  # Nothing will come of what was wanted, nor of what was just posted.
            self.state.stimulus_scheduler_left(self._refusal[1])
        if self._inbox:
            self.wake()
        super().flush()
        while self.state.warnings:
            logger.warning("%s", self.state.warnings.pop(0))
        news, self.state.news = self.state.news, []
        for state in news:
            for called, value in self._watchers.pop(state, {}).items():
                self._watch(state, called, value)

    def _watch(self, state, called, value=False):
        """Call ``called(state)`` once it is settled (``value``: and here), which may be now."""
        if value:
            self.state.stimulus_ask([state])
        if settled(state, value):
            called(state)
        else:
            self._watchers.setdefault(state, {})[called] = value

    # The inbox.

    def _post(self, *entry):
        """Leave ``function, *arguments`` for the loop.  Any thread may call this, at any moment.

        The append needs no lock: a deque's is atomic.
        """
        self._inbox.append(entry)
        self.wake()

    async def _catch_up(self):
        """Go on when all that was posted before has been acted on: in one turn of the loop.

        So a thread that has just submitted, and now waits, finds what it has submitted.
        """
        while self._inbox:
            self.flush()

    def _act(self, stimulus, futures, *arguments):
        """Give the mind a stimulus about futures, in the inbox's order; wait until it has it."""
        self._check_open()
        self._check_own(futures)
        self._post(lambda: stimulus([future._state for future in futures], *arguments))
        return self._run(self._catch_up)

    # Calls that wait.

    def _wait_for(self, futures, finish, timeout=None, value=False, enough=None):
        """Wait until futures are settled (``value``: and are here), or ``enough(one of them)``.

        Then ``finish()`` is called, in the caller's thread, so that errors show little but the
        caller's frames.
        """
        timeout = seconds(timeout)
        self._check_own(futures)
        if self.asynchronous:
            return self._then(lambda _: finish(), self._settle, futures, timeout, value, enough)
        if not all(future._state and settled(future._state, value) for future in futures):
            # (Else: without a trip to the loop.)
            self._run(self._settle, futures, timeout, value, enough)
        return finish()

    def _then(self, finish, wait, *args):
        """``finish`` of what the coroutine ``wait(*args)`` returns, in the caller's thread.

        What users see raised is raised there: in the loop, a task's SystemExit would be its end.
        """

        async def wait_then_finish():
            return finish(await wait(*args))

        return wait_then_finish() if self.asynchronous else finish(self._run(wait, *args))

    async def _settle(self, futures, timeout=None, value=False, enough=None):
        """The part of ``_wait_for`` that is in the loop.

        States and not futures are waited for: two futures of one key are one thing to wait for.
        """
        await self._catch_up()
        left = {future._state: None for future in futures}
        total, ready = len(left), self.loop.create_future()

        def over(state):
            del left[state]
            if (not left or (enough and enough(state))) and not ready.done():
                ready.set_result(None)

        for state in list(left):
            self._watch(state, over, value)
        self.flush()
        try:
            # (asyncio.timeout would leave a cycle that keeps our frame, and the futures in it.)
            if left:
                await asyncio.wait([ready], timeout=timeout)
        finally:
            for state in left:  # Who waits again and again leaves nothing here.
                del self._watchers[state][over]
        if left and not ready.done():
            text = f"{len(left)} of {total} futures are not done after {timeout} s"
            raise TimeoutError(f"{text}: they go on, wait again or cancel them")

    # Submitting.

    def submit(self, func, *args, key=None, pure=True, **kwargs):
        """[1] Call ``func(*args, **kwargs)`` on the cluster; return a Future at once.

        Futures at any depth of the arguments become their values.  ``pure`` calls that are equal
        share a key, and run once while a future of theirs lives; ``key`` names the task instead
        (while that lives, another call with this key gives its result, with a warning).
        Of two tasks that can run, the one of higher ``priority`` (0) goes first, or else the one
        that was submitted first; what needs results that are still to be computed counts as
        submitted with the last of them.  ``workers`` names those that may run it (an address, a
        host, a name, or a list of them; others too while there is none of these if
        ``allow_other_workers``, or if an input cannot be fetched from where it is).  After an
        exception it is tried again up to ``retries`` times.  (If a parameter of ``func`` is called
        so, give it by ``functools.partial``.)
        Raises TypeError for what cannot be pickled, TypeError or ValueError for a bad option,
        ValueError for a future that is another client's or released.

        Say ``pure=False`` of what gives another result each time (a random number, the time), or
        is called for what it does.  It may run more than once all the same: if its worker dies
        while it runs, or if its result was lost.  The arguments are pickled here and now: what is
        done to them afterwards changes nothing.
        """
        options = self._options(func, kwargs)
        key = check_key(key) if key is not None else None
        return self._submit(dump_function(func), args, kwargs, key, pure, options)

    def map(self, func, *iterables, key=None, pure=True, batch_size=None, **kwargs):
        """Submit ``func`` for each tuple of items; return a list of Futures.

        It stops at the shortest iterable.  ``key`` is a list with a key for each, or what their
        keys begin with in the place of the function's name; the options of ``submit`` and all
        ``kwargs`` go with every call.  (``batch_size`` has no effect: what is submitted travels in
        batches anyway.)  Raises what ``submit`` does.

        The function is pickled once, so this costs much less than as many calls of ``submit``.  If
        it is large, or one of ``kwargs`` is, and no future is inside, that is the result of a task
        more, which all calls need.
        """
        options = self._options(func, kwargs)
        if not iterables or any(isinstance(iterable, Future) for iterable in iterables):
            raise TypeError("map needs iterables to go over; gather a Future first")
        calls = list(zip(*iterables, strict=False))
        listed_keys = isinstance(key, (list, tuple))
        keys = [check_key(k) for k in key] if listed_keys else [None] * len(calls)
        prefix = None if listed_keys or key is None else check_key(key)
        if len(keys) != len(calls):
            raise ValueError(f"map got {len(keys)} keys for {len(calls)} calls")
        frame, _, name = function = dump_function(func)
        if len(calls) > 1 and len(frame) > LIMITS["ride_along_bytes"]:
            part = self._apart(f"{name}.function", load_callable, frame, pure, options)
            function = b"", part, name
        for what, arg in kwargs.items() if len(calls) > 1 else ():
            frames, inside = collecting(dump_part, f"argument {what!r} of {name}", arg)
            if sum(map(len, frames)) > LIMITS["ride_along_bytes"] and not inside:
                frames = [*map(bytes, frames)]
                kwargs[what] = self._apart(f"{name}.{what}", loads, frames, pure, options)
        futures = []  # (No comprehension: it would be a frame more, and the warning misplaced.)
        for args, key in zip(calls, keys, strict=True):
            futures.append(self._submit(function, args, kwargs, key, pure, options, prefix))
        return futures

    def _apart(self, name, load, frames, *options):
        """In each call, this stands for what ``load`` makes of the frames, which travel once."""
        task = (*dump_function(frames_of)[:2], name)
        return Apart(load, self._submit(task, (options, frames), {}, None, *options, level=4))

    def _options(self, func, kwargs):
        """Take the options of a task out of ``kwargs``: (priority, workers, loose, retries)."""
        # dask: has these options; they are not built here.
        self._check_call(func, kwargs, {"resources", "actor", "actors", "fifo_timeout"})
        priority, workers = kwargs.pop("priority", 0), kwargs.pop("workers", None)
        if not isinstance(priority, (numbers.Real, types.NoneType)) or priority != priority:
            raise TypeError(f"priority={priority!r:.80} is no number")
        loose = whether("allow_other_workers", kwargs.pop("allow_other_workers", False))
        if loose and workers is None:
            raise ValueError("allow_other_workers= without workers=: other than which?")
        retries = whole("retries", kwargs.pop("retries", None) or 0, least=0)
        priority = float(max(-MANY, min(priority or 0, MANY)))  # It may be infinite.
        return priority, names_of(workers) or [], loose, retries

    def _check_call(self, func, kwargs, reserved):
        self._check_open()
        if not callable(func):
            raise TypeError(f"the first argument must be callable, {func!r:.80} is not")
        if unbuilt := reserved & kwargs.keys():
            raise TypeError(f"the option {min(unbuilt)}= is not built yet")

    def _check_open(self):
        """Nothing new is taken after the end, nor after a fork.

        A forked child has a copy of everything but the loop's thread: what it posted nobody reads.
        """
        if self._refusal:
            raise self._refusal[0](self._refusal[1])
        if self._pid != os.getpid():
            raise RuntimeError(INHERITED)

    def _check_own(self, futures):
        for future in futures:
            if future.client is not self:
                raise ValueError(f"{future!r} belongs to another client")

    def _submit(self, function, args, kwargs, key, pure, options, prefix=None, level=3):
        """One call: everything that may fail does so here, in the user's thread.

        (The user's line, where a warning belongs, is so many calls up.)
        """
        run_spec, futures = dump_call(function, args, kwargs)
        self._check_own(futures)
        for future in futures:
            if future._released:
                raise ValueError(f"{future!r}, among the arguments, was released")
        if sum(map(len, run_spec)) > LIMITS["argument_bytes"]:
            text = "a call of more than 10 MB travels through the scheduler"
            warnings.warn(f"{text}: scatter large arguments first", stacklevel=level)
        name = function[2]
        call = (name, futures, *options)
        return self._begin(self._submit_now, key, prefix or name, run_spec, pure, *call)

    def _submit_now(self, key, run_spec, name, futures, *options):
        inputs = [future._state for future in futures]
        return self.state.stimulus_submit(key, name, run_spec, inputs, *options)

    def _begin(self, stimulus, key, name, frames, pure, *fields):
        """A Future; the inbox brings what makes its state to the loop.

        If there is no key, equal frames share one, or (not ``pure``) it gets one that nobody has.
        The entry refers to the future, so that it cannot be deleted before its state is there.
        """
        if key is None:
            # (The kernel is asked for chance once: it takes microseconds.)
            key = pure_key(name, frames) if pure else f"{name}-{self._unique}{next(self._numbers)}"
        future = Future(key, self, [])
        self._post(self._enter, future, stimulus, frames, *fields)
        # (In the loop of a synchronous client only finalizers submit, in the midst of anything.)
        if self.asynchronous and threading.current_thread() is self._thread:
            self.flush()
        return future

    def _enter(self, future, stimulus, *fields):
        future._state = stimulus(future.key, *fields)
        future._held.append(future._state)

    def _release(self, held):
        """Whoever asks for it, and however often: a future counts once."""
        if held:
            self.state.stimulus_release(held.pop())

    def scatter(self, data, workers=None, broadcast=False, direct=None, hash=True, timeout=None):
        """Put data on the workers; return futures of it, when it is there.

        A list, tuple, set, frozenset or namedtuple gives the like of futures, a range a list; of a
        dict, the keys name the tasks; anything else is one value.  Items go round robin, or to
        ``workers``; with ``broadcast``, each goes to all of them.  Equal data shares a key, unless
        not ``hash``.  It always goes directly to the workers, whatever ``direct``.  Scattered data
        cannot be computed again.  Raises TimeoutError if no worker is there for it, or the
        scheduler does not answer, within ``timeout`` seconds (if None, the client's; the transfer
        may take longer), CancelledError if it is lost meanwhile, TypeError for an iterator, a
        future, a bad key, or what cannot be pickled.  While a key is in use, also by another
        client, its first data is used.

        For what many calls need: an argument travels by the scheduler, with each call again.
        """
        self._check_open()
        timeout = self._timeout if timeout is None else seconds(timeout)
        # dask: as a number, ``broadcast`` says how many workers get a copy.
        options = (names_of(workers) or [], whether("broadcast", broadcast))

        def scatter_one(item, key=None):
            frames, name = dump_part("what is scattered", item), type(item).__name__
            fields = (sizeof(item), type_name(item), *options)
            return self._begin(self.state.stimulus_scatter, key, name, frames, hash, *fields)

        if isinstance(data, (abc.Iterator, Future)):
            raise TypeError(f"{data!r:.80} cannot be scattered: gather it, or make it a list")
        if type(data) is dict:
            futures = {key: scatter_one(item, check_key(key)) for key, item in data.items()}
        elif type(data) in (list, tuple, set, frozenset, range) or is_namedtuple(data):
            make = list if type(data) is range else getattr(data, "_make", type(data))
            futures = make(scatter_one(item) for item in data)
        else:
            futures = scatter_one(data)

        async def put():
            limit = timeout
            while True:
                with contextlib.suppress(TimeoutError):
                    await self._settle(list(leaves_of(futures)), limit)
                    break
                # Much data takes long; but where there is no worker for it, it takes for ever.
                if not await self._ask("workers", options[0] or None, limit=max(timeout, 1)):
                    called = f" called {workers!r}" if workers else ""
                    text = f"not scattered after {timeout} s, with 0 workers{called}: start one"
                    raise TimeoutError(text)
                limit = max(timeout, 0.1)  # The scheduler has other things to do.
            for future in leaves_of(futures):
                failure(future._state)
            return futures

        return self._run(put)

    # Results.

    def gather(self, futures, errors="raise", direct=None):
        """The results of futures in nested lists, tuples, sets and dicts, in the same shape.

        (What is of another class, like a ``defaultdict``, stays as it is, when its futures are
        done.)

        ``errors="raise"`` raises the first exception; ``errors="skip"`` leaves what failed out of
        lists, and puts None in its place elsewhere.  Results come directly from the workers,
        whatever ``direct``, but for small ones that came with their notices.  Raises the first
        failed task's own exception, without waiting for the others; CancelledError for one that was
        cancelled; ValueError for another client's.

        All of it comes here: if that is much, submit a call that needs only a part of it.
        """
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors={errors!r} is neither 'raise' nor 'skip'")
        futures = listed(futures)
        leaves = list(leaves_of(futures))
        if not all(future._state and future._state.final for future in leaves):
            self._check_open()

        def finish():
            for future in leaves if errors == "raise" else ():
                if failed(future._state):
                    outcome(future._state)
            return rebuild(futures)

        enough = failed if errors == "raise" else None
        return self._wait_for(leaves, finish, value=True, enough=enough)

    def cancel(self, futures, force=False):
        """Let these tasks go, and those that depend on them; what has not begun will not run.

        ``futures`` is a future or a collection of them.  What runs already runs to its end, and its
        result is dropped: no thread can be stopped from outside.  Other clients that want the same
        keep it, unless ``force``.  Returns None, without waiting for the cluster; from then on
        these futures are cancelled, but a result that has come to this client stays readable.
        Raises ValueError for another client's futures.
        """
        return self._act(self.state.stimulus_cancel, futures_of(futures), bool(force))

    def retry(self, futures):
        """Run tasks that failed once more, and those of their inputs that failed.

        Also what failed because they did.  Futures that have not failed are left alone.  Returns
        None; the futures are pending then.  Raises ValueError for another client's futures.
        """
        return self._act(self.state.stimulus_retry, futures_of(futures))

    # Looking inside.

    async def _question(self, peer, ask, *fields, limit=None):
        """Ask the scheduler or a worker; the other fields of its answer.

        Raises TimeoutError after ``limit`` seconds; what comes later is dropped by ``take``.
        """
        self._check_open()
        await self._catch_up()
        number, answer = next(self._numbers), self.loop.create_future()
        self._answers[number] = answer
        self.state.send(peer, ask, number, *fields)
        self.flush()
        # Whichever is first: the answer, or the end of the connection that should bring it.
        ends = [answer, self.links[peer].following]
        if not (await asyncio.wait(ends, timeout=limit, return_when=FIRST_COMPLETED))[0]:
            raise TimeoutError(f"no answer from the {peer} within {limit} s")
        if not answer.done():
            del self._answers[number]
            self._check_open()
            raise ConnectionError(f"no connection to {peer}")
        return answer.result()

    async def _ask(self, what, keys=None, limit=None):
        """Facts from the scheduler's tables, as ``SchedulerMind.facts_...`` collects them.

        They are about what ``keys`` name; None asks for all, which the scheduler takes from none.
        """
        if keys is not None and not keys:
            return {}
        (rows,) = await self._question(SCHEDULER, "query", what, keys or [], limit=limit)
        facts = {thaw(key): thaw(fact) for key, fact in rows}
        self._workers = facts if what == "workers" and keys is None else self._workers
        return facts

    def who_has(self, futures=None):
        """{key: addresses of the workers that hold it}, of these futures or of all there are.

        The addresses are a tuple, an empty one if nobody holds that key; a key that the scheduler
        does not know is left out.
        Like all that looks inside, it asks the scheduler.
        """
        return self._run(self._ask, "who_has", keys_of(futures and futures_of(futures)))

    def has_what(self, workers=None):
        """{address: keys of the results that the worker holds}, of these workers or of all.

        ``workers`` may be named as in ``submit``, here and below.
        """
        return self._run(self._ask, "has_what", names_of(workers))

    def processing(self, workers=None):
        """{address: keys of the tasks that were sent to the worker, and have not ended}

        They run there, or will soon.  What waits for room is on the scheduler, and not in here.
        """
        return self._run(self._ask, "processing", names_of(workers))

    def nthreads(self, workers=None):
        """{address: how many tasks the worker runs at a time}"""

        def threads(rows):
            return {address: row["nthreads"] for address, row in rows.items()}

        return self._then(threads, self._ask, "workers", names_of(workers))

    ncores = nthreads

    def nbytes(self, keys=None, summary=True):
        """Bytes of the results that the workers hold: by the keys' first part, or by key.

        A key's first part is its function's name, if nobody gave it another.  A result counts
        once, however many workers hold it.
        """

        def add_up(facts):
            sizes = Counter()
            for key, nbytes in facts.items():
                sizes[first_part(key) if summary else key] += nbytes
            return dict(sizes)

        return self._then(add_up, self._ask, "nbytes", keys_of(keys))

    def scheduler_info(self):
        """The scheduler's address, and what it knows of its workers, by their addresses.

        Of each: ``id``, ``name``, ``nthreads`` and ``nbytes``, the size of what it holds.  An
        asynchronous client does not ask: they are those of its start, or of when it last asked for
        all (by ``nthreads`` or ``wait_for_workers``).
        """
        # dask: an asynchronous client names no workers there.
        workers = self._workers if self.asynchronous else self._run(self._ask, "workers")
        return {"type": "Scheduler", "address": self._address, "workers": workers}

    def story(self, *keys):
        """The transitions of tasks: [(key, start, finish, attempt, worker)]

        ``keys`` are keys or futures.  The scheduler remembers the last transitions of all tasks.
        ``worker`` is the worker's id: its address, and what tells it from a later one there.  It
        is an empty string, and ``attempt`` 0, where there is none.
        This is where to look when something runs twice, late, or not at all.
        """
        return self._then(lambda facts: list(facts.values()), self._ask, "story", keys_of(keys))

    def wait_for_workers(self, n_workers, timeout=None):
        """Wait until so many workers are there.  Raises TimeoutError after ``timeout`` seconds.

        ValueError for what is no positive whole number.  Calls may be submitted before: they wait
        for a worker by themselves.
        """
        if type(n_workers) is not int or n_workers < 1:
            raise ValueError(f"n_workers={n_workers!r} is no positive whole number")

        async def wait_for_workers():
            left = limit = seconds(math.inf if timeout is None else timeout)
            start = time.monotonic()
            while (there := len(await self._ask("workers", limit=max(left, 0.1)))) < n_workers:
                await asyncio.sleep(0.01)
                left = limit - (time.monotonic() - start)
                if left < 0:
                    raise TimeoutError(f"{there} of {n_workers} workers are there after {limit} s")

        return self._run(wait_for_workers)

    def run(self, function, *args, workers=None, on_error="raise", **kwargs):
        """Call a function on every worker, or on ``workers``, outside of the task system.

        Returns {address: result}.  Coroutine functions are awaited; a parameter ``dask_worker``
        gets the Worker.  ``on_error`` is "raise", "return" (the exception in the result's place)
        or "ignore" (no result of that worker).  All workers are waited for; then the first
        exception is raised.  It is ConnectionError for a worker that cannot be reached.  Raises
        ValueError if no worker is called so, TypeError for a future among the arguments, or for
        what cannot be pickled.

        For a look at the workers' processes, or to prepare them: it takes no thread from tasks,
        and workers that come later know nothing of it.
        """
        if on_error not in ("raise", "return", "ignore"):
            raise ValueError(f"on_error={on_error!r} is none of 'raise', 'return', 'ignore'")
        self._check_call(function, kwargs, {"wait", "nanny"})
        run_spec, futures = dump_call(dump_function(function), args, kwargs)
        if futures:
            raise TypeError("run takes no futures: gather them first")

        async def run():
            rows = await self._ask("workers", names_of(workers))
            if workers and not rows:
                raise ValueError(f"there is no worker called {workers!r}")
            questions = [self._question(row["id"], "run", run_spec) for row in rows.values()]
            return zip(rows, await asyncio.gather(*questions, return_exceptions=True), strict=True)

        def finish(answers):
            results = {}
            for address, answer in answers:
                status, value = answer if isinstance(answer, list) else ("not asked", answer)
                if status == "ok":
                    results[address] = loads(value)
                elif on_error != "ignore":
                    results[address] = unpack_exception(value) if status == "error" else value
                    if on_error == "raise":  # (By no name, as in ``outcome``.)
                        raise to_be_raised(results.pop(address))
            return results

        return self._then(finish, run)

    def _facts(self):
        if self._refusal:
            return [self._refusal[1]]
        if not self.asynchronous:
            with contextlib.suppress(OSError, RuntimeError):  # In the loop, nobody can wait.
                self._run(self._ask, "workers", timeout=1)
        return [self._address, described(self._workers.values())]


def names_of(workers):
    """What a user called workers by, as a list; None, which is not the same as none, stays so."""
    if workers is None:
        return None
    names = [workers] if isinstance(workers, str) else workers
    if not isinstance(names, abc.Collection) or not all(isinstance(n, str) for n in names):
        raise TypeError(f"workers={workers!r} is no address, host or name, nor a list of them")
    return list(names)


def keys_of(things):
    """The keys of tasks that a user named by futures or keys; None stays so."""
    things = [things] if isinstance(things, (str, Future)) else things
    return things and [check_key(getattr(thing, "key", thing)) for thing in things]


def described(workers):
    """How many workers there are, with how many threads, and how much they hold."""
    threads, nbytes = (sum(row[field] for row in workers) for field in ("nthreads", "nbytes"))
    return f"{len(workers)} workers, {threads} threads, {nbytes / 1e6:,.1f} MB in memory"


def thaw(fact):
    """What was a tuple before JSON made it a list.  (Keys have to be tuples again: of a dict.)"""
    return tuple(map(thaw, fact)) if type(fact) is list else fact


def listed(obj):
    """What can be gone through only once, or is a view of a dict, as a list."""
    views = (abc.Iterator, abc.ValuesView)
    return list(obj) if isinstance(obj, views) else obj


def is_namedtuple(obj):
    return isinstance(obj, tuple) and hasattr(obj, "_make")


def leaves_of(obj):
    """The futures in nested lists, tuples, sets and dicts; what else there is, is passed over."""
    if isinstance(obj, Future):
        yield obj
    elif isinstance(obj, (list, tuple, set, frozenset, dict)):
        for item in obj.values() if isinstance(obj, dict) else obj:
            yield from leaves_of(item)


def rebuild(obj):
    """Nested containers with values in the place of futures; of other types they stay as they are.

    Those that failed are left out of lists; elsewhere they become None.
    """
    if isinstance(obj, Future):
        return None if failed(obj._state) else outcome(obj._state)
    if type(obj) is dict:
        return {key: rebuild(value) for key, value in obj.items()}
    if type(obj) in (list, tuple, set, frozenset) or is_namedtuple(obj):
        gone = Future if isinstance(obj, list) else ()
        items = [rebuild(i) for i in obj if not (isinstance(i, gone) and failed(i._state))]
        return getattr(obj, "_make", type(obj))(items)  # (A namedtuple has ``_make``.)
    return obj


def futures_of(obj):
    """The futures in nested containers, each once; the outermost may also be an iterator."""
    return list(dict.fromkeys(leaves_of(listed(obj))))


def first_part(key):
    """The function's name, where the key was made of it."""
    first = str(key if isinstance(key, str) else key[0])
    return first.rpartition("-")[0] or first


def default_client(c=None):
    """``c``, or the client that was opened last.  Raises ValueError if none is open."""
    return c or Client.current()


def fire_and_forget(obj):
    """Let tasks run to their end though nobody keeps their futures; the results are dropped.

    Also when the client has gone, but not when the cluster has: one that ``Client()`` has started
    ends with it.  For what is called for its effect, like writing a file.  ``obj`` is a future, or
    futures in nested containers.  Returns None at once.  What such a task raises nobody is told:
    keep a future where that matters.  Raises RuntimeError if the client is closed, ConnectionError
    if the scheduler is lost.
    """
    for future in futures_of(obj):
        future.client._check_open()
        future.client._post(lambda f=future: f.client.state.stimulus_fire_and_forget([f._state]))


def wait(fs, timeout=None, return_when=ALL_COMPLETED):
    """Wait for futures: ``(done, not_done)``, two sets.

    ``fs`` is a collection of futures of one client.  ``return_when`` is ALL_COMPLETED,
    FIRST_COMPLETED or (beyond dask) FIRST_EXCEPTION.  Raises TimeoutError after ``timeout``,
    CancelledError if one of them was cancelled, TypeError for ``wait(x, y)``, ValueError for
    another word, for futures of two clients, and for none where no client is open.  Errors of tasks
    are not raised.  No result is fetched.
    """
    if isinstance(timeout, Future):
        raise TypeError("wait takes one collection of futures: wait([x, y]), not wait(x, y)")
    # dask: FIRST_EXCEPTION is not implemented there.
    enough = {ALL_COMPLETED: None, FIRST_COMPLETED: settled, FIRST_EXCEPTION: failed}
    if return_when not in enough:
        raise ValueError(f"return_when={return_when!r} is unknown")
    futures = futures_of(fs)
    client = futures[0].client if futures else Client.current()

    def finish():
        done = {future for future in futures if settled(future._state)}
        for future in done:
            if future._state.status == "cancelled":
                failure(future._state)
        return DoneAndNotDoneFutures(done, set(futures) - done)

    return client._wait_for(futures, finish, timeout, enough=enough[return_when])


class as_completed(abc.Iterator, abc.AsyncIterator):
    """Iterate over futures in the order in which they are done, by ``for`` or ``async for``.

    A future is yielded as often as it was given, cancelled ones too.  ``with_results`` yields
    pairs with the results, as they were when each was done; an error is then raised, or (not
    ``raise_errors``) its type, itself and its traceback stand in the result's place.  There a
    cancelled one has its CancelledError, which is not raised.  ``timeout`` seconds after this call,
    TimeoutError is raised.

    More futures may be added meanwhile: those of calls that a result makes worth trying.  Futures
    of one iterator belong to one client, and are kept until they are done, also if it is dropped.
    (``loop`` has no effect; dask has it.)
    """

    def __init__(
        self, futures=None, loop=None, with_results=False, raise_errors=True, *, timeout=None
    ):
        self.with_results, self.raise_errors = with_results, raise_errors
        self._deadline = time.monotonic() + seconds(math.inf if timeout is None else timeout)
        self._lock = threading.Lock()  # Threads may share it: one at a time takes what is next.
        self._news = asyncio.Event()  # set when something is ready, or all was forgotten
        self.client = None
        self.clear()
        self.update(futures or ())

    def clear(self):
        """Forget all that was added; who waits for it is told that there is nothing."""
        # A None for each that is not done (threads may append and pop at once), and the others.
        self._pending, self._ready = [], deque()
        if self.client:  # Only now, and by the same event: who waits must see that none is left.
            self.client._post(self._news.set)

    def add(self, future):
        """Wait for one more; this may be done while iterating, and after it has ended.

        Raises TypeError for what is no future, ValueError for another client's.
        """
        if not isinstance(future, Future):
            raise TypeError(f"as_completed goes over futures, not {future!r:.80}")
        self.client = self.client or future.client
        self.client._check_own([future])
        pending, ready, news = self._pending, self._ready, self._news

        def done(state):
            # As it is now: it may be retried, or computed again, before it is taken.
            ready.append((future, replace(state) if self.with_results else None))
            pending.pop()  # Only now: it must not seem that none is left.
            news.set()

        pending.append(None)
        self.client._post(lambda: self.client._watch(future._state, done, self.with_results))

    def update(self, futures):
        """Wait for more."""
        for future in futures:
            self.add(future)

    def count(self):
        """How many are still to be yielded."""
        return len(self._pending) + len(self._ready)

    def is_empty(self):
        """Whether all that was added has been yielded; then the iteration ends, for now."""
        return not self.count()

    def has_ready(self):
        """Whether the next one is done already."""
        return bool(self._ready)

    def next_batch(self, block=True):
        """All that are done, as a list; with ``block``, at least one, for which it waits.

        For an iteration by ``for``, whose client is synchronous.  With ``block``, raises
        StopIteration if none is left.  A batch ends before a result that is an error to be raised:
        that is the first of the next one.
        """
        batch = [next(self)] if block else []
        with self._lock:
            for _, state in list(self._ready):
                if batch and self.raise_errors and state and state.status == "error":
                    break
                batch.append(self._take(StopIteration))
        return batch

    def batches(self):
        """Iterate over ``next_batch()``."""
        with contextlib.suppress(StopIteration):  # Others may take the last one, too.
            while True:
                yield self.next_batch()

    async def _wait(self):
        """Wait until one is done, or none is left.  (Another thread may be faster to take it.)"""
        while self._pending and not self._ready:
            self._news.clear()
            news = asyncio.ensure_future(self._news.wait())
            try:
                # (As in ``_settle``, wait_for would leave a cycle that keeps futures.)
                done, _ = await asyncio.wait([news], timeout=self._deadline - time.monotonic())
            finally:
                news.cancel()
            if not done:
                raise TimeoutError(f"{len(self._pending)} futures are not done in time")

    def _take(self, end):
        """What is yielded for the next one that is done; if none is left, ``end`` is raised."""
        if not self._ready:
            raise end
        future, state = self._ready.popleft()
        if not self.with_results:
            return future
        if state.status == "cancelled":
            return future, CancelledError(f"{state.key!r}: {state.text}")
        if failed(state) and not self.raise_errors:
            error = failure(state)
            return future, (type(error), error, error.__traceback__)
        return future, outcome(state)

    def __next__(self):
        with self._lock:
            if self._pending and not self._ready:
                if self.client.asynchronous:
                    raise TypeError("the futures of an asynchronous client need async for, not for")
                self.client._run(self._wait)
            return self._take(StopIteration)

    async def __anext__(self):
        if self.count() and not self.client.asynchronous:
            raise TypeError("the futures of a synchronous client need for, not async for")
        await self._wait()
        return self._take(StopAsyncIteration)


class Bars:
    """How far some tasks are, by the names of their functions: as text and as HTML."""

    def __init__(self, states, multi):
        self.rows, self.left = {}, {}  # {name: [done, failed, total]}, {pending state: its row}
        self.changed = asyncio.Event()
        self.back = ""  # moves a terminal's cursor to where it was last drawn
        for state in states:
            name = first_part(state.key) if multi else "all"
            # A terminal cannot redraw what has scrolled away: so rows are few.
            name = name if name in self.rows or len(self.rows) < 10 else "others"
            self.left[state] = row = self.rows.setdefault(name, [0, 0, 0])
            row[2] += 1

    def count(self, state):
        row = self.left.pop(state)
        row[0] += 1
        row[1] += state.status == "error"
        self.changed.set()

    async def follow(self, client, draw):
        """Draw when something is done, but at most ten times a second, until all is."""
        # The futures themselves are not held: who looks at work does not keep it going.
        for state in list(self.left):
            client._watch(state, self.count)
        while self.left:
            self.changed.clear()
            draw()
            await self.changed.wait()
            await asyncio.sleep(0.1 if self.left else 0)
        draw()

    def write(self):
        """Draw in the terminal, over what was drawn before."""
        columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        lines = [f"{line[: columns - 1]}\x1b[K\n" for line in repr(self).splitlines()]
        print(self.back, *lines, sep="", end="", file=sys.stderr)
        self.back = f"\x1b[{len(lines)}A"

    def shown(self):
        """Each row, as text and as HTML."""
        for name, (done, failed, total) in self.rows.items():
            words = f"{done} of {total}" + f", {failed} failed" * bool(failed)
            bar = f"<progress value={done} max={total}></progress>"
            text = f"{name:20.20} [{'#' * (30 * done // total):30}] {words}"
            yield text, f"<div>{bar} {html.escape(name)}: {words}</div>"

    def __repr__(self):
        return "\n".join(text for text, _ in self.shown())

    def _repr_html_(self):
        return "".join(shown for _, shown in self.shown())


def progress(*futures, notebook=None, multi=True, complete=True):
    """Draw how far futures are: a bar for each function name (not ``multi``: one for all).

    ``futures`` may be nested in containers.  Returns None (outside of notebooks, for futures of an
    asynchronous client: an awaitable).
    In a terminal, on standard error, this waits until they are done; where there is no terminal it
    waits, too, without a bar.  In a notebook (``notebook=None`` finds out) it returns at once, and
    the bars go on.  ``complete=False`` leaves out what is done already.
    """
    # dask: has a single bar in a terminal, and in a notebook a widget, which it returns.
    futures = futures_of(map(listed, futures))
    client = futures[0].client if futures else Client.current()
    client._check_own(futures)
    states = dict.fromkeys(future._known() for future in futures)
    bars = Bars([state for state in states if complete or not settled(state)], multi)
    IPython = sys.modules.get("IPython")  # Never imported: where it is not, there is no notebook.
    if notebook is None:
        notebook = hasattr(IPython and IPython.get_ipython(), "kernel")
    if notebook:
        handle = IPython.display.display(bars, display_id=True)
        return client._post(client.start, bars.follow(client, lambda: handle.update(bars)))
    return client._run(bars.follow, client, bars.write if sys.stderr.isatty() else lambda: None)


# ---- 10. Local cluster: processes of the very same command line, watched and restarted ----
#
# Worker processes are started as commands, not forked or spawned from the user's script: so no
# script needs ``if __name__ == "__main__"``, and no lock or thread of it is copied.  The standard
# input of each is a pipe from this process, and it ends when that does: the kernel closes a pipe
# even after ``kill -9``, and nobody has to be alive to say so.
#
# dask: spawns from the user's script; what watches and restarts a worker's process is its nanny.


class LocalCluster(Threaded):
    """A scheduler in this process, and workers: processes of their own, or threads here.

    ``n_workers`` workers with ``threads_per_worker`` threads each.  If both are left out, there is
    a single-threaded worker for each core; if one is, as many as make a thread for each core in
    all.  With ``processes=False`` there is one worker, unless ``n_workers`` says otherwise.  A
    worker process that is lost is replaced, and each ends when this process does, however that
    ends.  What can be imported here can be there.

    ``more`` are options of ``Scheduler`` (but ``worker_ttl`` is 300): with ``host="0.0.0.0"``,
    clients and workers on other machines can join.  ``address`` (dask: ``scheduler_address``) is
    its scheduler's, ``scheduler`` the scheduler itself, whose ``state`` can be looked at.  It has
    started when this returns, and ``with`` closes it; if ``asynchronous``, ``async with`` starts
    and closes it.  Raises OSError if the port is taken, or a client has shut it down before,
    TimeoutError if its workers do not start, TypeError or ValueError for a bad option, RuntimeError
    in a task of a cluster in a task, and what Scheduler does.

    With ``processes=False`` all is in one process: for a look at everything in a debugger, or for
    tasks that spend their time in compiled code or waiting.  (Results are pickled all the same.)
    """

    address = scheduler_address = "not started"

    def __init__(
        self, *, n_workers=None, threads_per_worker=None, processes=True, asynchronous=False, **more
    ):
        cores, threads = os.cpu_count() or 1, threads_per_worker
        if threads is not None:
            threads = whole("threads_per_worker", threads, least=1)
        if n_workers is None:
            n_workers = max(1, cores // (threads or 1)) if processes else 1
        self.n_workers = whole("n_workers", n_workers, least=0)
        self.processes = whether("processes", processes)
        self.threads_per_worker = threads or max(1, cores // max(n_workers, 1))
        if unknown := more.keys() - inspect.signature(Scheduler).parameters.keys():
            raise TypeError(f"a local cluster does not know the option {min(unknown)}=")
        if processes and DEPTH > 1:  # Else each would start the next, without end.
            text = "a cluster in a task, in a task: does a module that tasks import start one?"
            raise RuntimeError(f"{text} Do so under: if __name__ == '__main__'")
        # Be patient: that a process of ours has ended is seen at once, and a call that keeps the
        # interpreter's lock makes a worker silent, too.
        self.scheduler = Scheduler(**{"worker_ttl": 300, **more})
        self.workers = []  # the Workers, if they live in this process
        self.keepers = {}  # else for each worker, by its name, an asyncio task
        self._live(asynchronous)

    async def _start(self):
        await self.scheduler
        self.address = self.scheduler_address = self.scheduler.address
        end = self.scheduler.start(self._end())
        for name in map(str, range(self.n_workers)):
            if self.processes:
                self.keepers[name] = self.scheduler.start(self._keep(name))
            else:
                self.workers.append(await Worker(self.address, self.threads_per_worker, name))
        deadline = time.monotonic() + LIMITS["start_seconds"]
        while (there := len(self.scheduler.state.workers)) < self.n_workers:
            if time.monotonic() > deadline:
                text = f"{there} of {self.n_workers} worker processes have started"
                raise TimeoutError(f"{text}; why, the others have said on standard error")
            done, _ = await asyncio.wait([end, *self.keepers.values()], timeout=0.01)
            if self.scheduler.ended.is_set():
                raise ConnectionError("this cluster was shut down before it had started")
            await asyncio.gather(*done)  # It raises why no process can be started.

    async def _end(self):
        """A client may shut the cluster down: then it closes as if the user had closed it."""
        await self.scheduler.ended.wait()
        await self._close()

    async def _keep(self, name):
        """Run a worker process; when it is lost, another, until the cluster ends."""
        arguments = [self.address, "--nthreads", self.threads_per_worker, "--name", name, "--quiet"]
        arguments += ["--log-level", "warning"]  # As here: a task may have a cluster of its own.
        while not self.scheduler.ended.is_set():
            start, code = time.monotonic(), 1
            try:
                async with worker_process(*arguments, ended_by=signal.SIGKILL) as process:
                    self.scheduler.watched[name] = process
                    code = await process.wait()
            except OSError as error:
                if name not in self.scheduler.watched:
                    raise  # Who starts this cluster is told.
                logger.error("The worker %s cannot be replaced yet: %s", name, error)
            if time.monotonic() - start < 1 and code == 1:
                await asyncio.sleep(1)  # It did not even start: be patient with the next.

    async def _close(self):
        """Workers that do not end by themselves, since a task holds up their loop, are killed.

        (But what tasks have left to ``atexit`` may take a while.  Who is not there yet has none.)
        """
        for worker in self.workers:
            await worker.close()
        there = [task for name, task in self.keepers.items() if self.scheduler.state.named([name])]
        if self.scheduler.server and not self.scheduler.ended.is_set():
            self.scheduler.ended.set()
            self.scheduler.happens("shutdown", "its LocalCluster")
        if there:
            _, held_up = await asyncio.wait(there, timeout=4)
            # (Only once: who closes this, and ``_end``, are both here.)
            for task in [task for task in held_up if not task.cancelling()]:
                task.cancel()
        await self.scheduler.close()

    def _facts(self):
        return [self.address, described(dict(self.scheduler.state.facts_workers(())).values())]


# What a worker's environment has, unless the user says otherwise.  Strings have one hash in all of
# them, or who partitions data by it would find a word in several parts; and libraries of linear
# algebra do not start as many threads in each worker as there are cores.  (dask's nanny does so.)
ENVIRONMENT = {"PYTHONHASHSEED": "0"}
ENVIRONMENT |= {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
DEPTH = int(os.environ.get("MINIDIST_DEPTH", 0))  # 1 in a worker process, 2 in a worker's worker


@contextlib.asynccontextmanager
async def worker_process(*arguments, ended_by):
    """A process of the command line ``worker``, for as long as the block; then a signal ends it.

    It also ends when its standard input does: so with this process, however that ends.
    """
    # What the user's script can import, the functions that it submits can too, from there.  (The
    # import system passes over what is no text, as a Path.)  They find its arguments, too.
    path = [folder for folder in [*sys.path, os.path.dirname(__file__)] if type(folder) is str]
    end = len(arguments) + 3  # of the words for us in the command, which also begins with "-c"
    code = f"import sys; sys.path[:] = {path}; args, sys.argv = sys.argv[1:{end}], sys.argv[{end}:]"
    code += "; import minidist; sys.exit(minidist.main(args))"
    # (-P: so Python itself looks for nothing in the current folder, which may be gone.  Before it,
    # the flags with which this process runs, as multiprocessing passes them on.)
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-P", "-c", code]
    command += ["worker", *map(str, arguments), "--until-stdin-ends", *map(str, sys.argv)]
    # In a session of its own: Ctrl-C in the terminal is for us, and may only interrupt a wait.
    options = {"stdin": subprocess.PIPE, "start_new_session": True}
    options["env"] = ENVIRONMENT | os.environ | {"MINIDIST_DEPTH": str(DEPTH + 1)}
    process = await asyncio.create_subprocess_exec(*command, **options)
    try:
        yield process
    finally:
        send_signal(process, ended_by)
        await process.wait()
        with contextlib.suppress(OSError):  # What its tasks have started, if anything is left.
            os.killpg(process.pid, signal.SIGKILL)


def send_signal(process, number):
    """Send a signal to a process, if it is still there.

    ``process.send_signal``, before Python 3.13, takes the exit code of one that has just ended, for
    which the loop then looks in vain (CPython's gh-87744).
    """
    with contextlib.suppress(ProcessLookupError):
        if process.returncode is None:
            os.kill(process.pid, number)


def describe_exit(code):
    """How a process ended, by its exit code: what a ``KilledWorker`` says of it."""
    names = {-number: number.name for number in signal.Signals}  # Real-time ones have none.
    return f"exit code {code}" if code >= 0 else f"killed by {names.get(code, -code)}"


# ---- 12. Command line ----
#
# A cluster by hand: one terminal for the scheduler, one for each worker.  A process ends with exit
# code 0 if it was asked to end (Ctrl-C, SIGTERM, a client's ``shutdown``), with 1 and one line that
# says why if it could not go on, and with 2 if ``parse`` refuses its arguments.  What it says for
# programs to read (its address) goes to standard output, flushed at once; what happens meanwhile,
# to standard error.

DEFAULT_PORT = 8786
LEVELS = {"choices": ("debug", "info", "warning", "error"), "default": "info"}


def parse(argv):
    """The options of a command, with the coroutine function that ``run``s it."""
    text = "Workers, and Client(address), need the address that the scheduler prints."
    about = __doc__ and __doc__.splitlines()[0]  # (python -OO leaves it out.)
    parser = argparse.ArgumentParser("minidist", description=about, epilog=text)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, about):
        """A command; returns the function that adds an argument to it."""
        parser = commands.add_parser(run.__name__.removeprefix("run_"), help=about)
        parser.set_defaults(run=run)
        parser.add_argument("--log-level", **LEVELS, help="the least that is logged (info)")
        return parser.add_argument

    add = command(run_scheduler, "start a scheduler")
    add("--host", default="127.0.0.1", help="where it listens (127.0.0.1); 0.0.0.0: everywhere")
    add("--port", type=int, help=f"{DEFAULT_PORT}, or the next that is free; 0: any that is free")
    add("--worker-ttl", type=float, default=30, help="seconds until a silent worker is dead (30)")
    add("--record", metavar="FILE", help="record all that it is told and says, for replay")

    add = command(run_worker, "start a worker")
    add("address", metavar="IP:PORT", help="the scheduler's address")
    threads = "tasks run at a time (%(default)s: one for each core)"
    add("--nthreads", metavar="N", type=int, default=os.cpu_count() or 1, help=threads)
    add("--name", help="its name in the cluster (its address); of several, with -0, ... appended")
    add("--nworkers", metavar="N", type=int, default=1, help="how many processes (1)")
    # Not shown: with these minidist starts processes of its own.
    add("--until-stdin-ends", action="store_true", help=argparse.SUPPRESS)
    add("--quiet", action="store_true", help=argparse.SUPPRESS)

    add = command(run_replay, "run what a scheduler has recorded once more")
    add("file", metavar="FILE", help="the recording")
    add("--key", type=parse_key, help="print what changes a task (a tuple is written as in JSON)")
    add("--until", metavar="LINE", type=int, help="stop after this line, and print the state there")
    add("--quick", action="store_true", help="do not check every invariant after every line")

    options = parser.parse_args(argv)
    if options.command == "worker" and min(options.nthreads, options.nworkers) < 1:
        parser.error("--nthreads and --nworkers must be at least 1")
    return options


def parse_key(text):
    return to_key(json.loads(text)) if text.startswith("[") else text


def main(argv=None):
    """The command line: ``minidist scheduler``, ``worker``, ``replay``.

    Returns what ``sys.exit`` takes: None, or the line that says why, which is then exit code 1.
    """
    options = parse(argv)
    if argv is None and options.command == "worker" and not ENVIRONMENT.keys() <= os.environ.keys():
        # Python and the libraries read it at their start.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], ENVIRONMENT | os.environ)
    # Only what minidist says: how tasks log is their own business.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(options.log_level.upper())
    logger.propagate = False
    try:
        # (Who asks it to end has it leave at once, and in order.)
        with contextlib.suppress(KeyboardInterrupt, asyncio.CancelledError):
            asyncio.run(until_stopped(options.run(options)))
    except (OSError, ValueError, OverflowError) as error:
        return f"minidist {options.command}: {error}"


async def until_stopped(coroutine):
    """Run a coroutine; SIGINT and SIGTERM cancel it, also where a shell lets SIGINT be ignored.

    Children that a task forks would pass them over: there is no loop.  They get the handlers of any
    program, and no signal until they have them.
    """
    numbers, cancel = (signal.SIGINT, signal.SIGTERM), asyncio.current_task().cancel
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGURG, int)  # From now on, whatever signal comes wakes it.
    for number in numbers:
        # (Not by the loop, which gives them their defaults when it ends.)
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(cancel))
        # (Python ends by giving signals their defaults, which would be another exit code.)
        atexit.register(signal.signal, number, signal.SIG_IGN)

    def as_any_program():
        signal.set_wakeup_fd(-1)
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        unblock()

    block = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK, numbers)
    unblock = functools.partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, numbers)
    os.register_at_fork(before=block, after_in_parent=unblock, after_in_child=as_any_program)
    try:
        await coroutine
    finally:
        # It ends already: what comes now would find half a loop.  But what tasks have begun may
        # hold that up: then this is the end.
        for number in numbers:
            signal.signal(number, lambda *_: os._exit(0))
        loop.remove_signal_handler(signal.SIGURG)


async def run_scheduler(options):
    """A scheduler, until a client shuts the cluster down or somebody ends this process.

    Without ``--port``, the next one is tried if the default one is taken: the one who started the
    other scheduler may be somebody else on the same machine.  A port that was asked for is meant.
    """
    # Few of our objects are in cycles, and there are many of them: looking for cycles less often
    # saves a quarter of a busy scheduler's time.  (A worker's objects are its users'.)
    gc.set_threshold(100_000, 50, 50)
    ports = range(DEFAULT_PORT, DEFAULT_PORT + 100) if options.port is None else [options.port]
    for port in ports:
        try:
            async with Scheduler(options.host, port, options.worker_ttl, options.record) as body:
                print(f"Scheduler at {body.address}", flush=True)
                return await body.ended.wait()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == ports[-1]:
                raise
            logger.warning("Port %s is in use; trying the next", port)


async def run_replay(options):
    number, before, known = 1, {}, not options.key
    for number, line, mind in replay(options.file, validate=not options.quick):
        now = facts(mind.tasks[options.key]) if options.key in mind.tasks else {}
        if now != before:
            print(f"line {number}: {line.strip():.1000}")
            for field in [f for f in {**before, **now} if before.get(f) != now.get(f)]:
                print(f"    {field}: {before.get(field)} -> {now.get(field)}")
        before, known = now, known or bool(now)
        if number == options.until:
            for record in (*mind.tasks.values(), *mind.workers.values(), *mind.clients.values()):
                print(type(record).__name__, facts(record))
            break
        await asyncio.sleep(0)  # Ctrl-C is heard.
    if not known:
        raise ValueError(f"{options.file}: there is no task {options.key!r} in {number} lines")
    checked = ", and every invariant holds" if __debug__ and not options.quick else ""
    print(f"{number} lines: the messages are those that were recorded{checked}")


def facts(record):
    """The fields of a record that are set, with names in the places of other records."""

    def brief(value):
        if isinstance(value, dict):
            return {brief(key): brief(item) for key, item in value.items()}
        return getattr(value, "key", getattr(value, "id", value))

    return {name: brief(value) for name in record.__slots__ if (value := getattr(record, name))}


async def run_worker(options):
    """A worker, until the scheduler is gone or somebody ends this process.

    It waits for a scheduler for as long as it takes.  When it is asked to end, it first hands over
    what only it holds; a second Ctrl-C ends that, and a third what tasks hold up.
    """
    if options.until_stdin_ends:
        threading.Thread(target=end_with_stdin, daemon=True).start()
    else:
        sys.path.insert(0, "")  # Modules beside the user are importable.
    if options.nworkers > 1:
        return await run_workers(options)
    # What tasks print is there, however this process ends; and no name of theirs is found in here.
    if sys.stdout:
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.modules["__main__"] = types.ModuleType("__main__")
    # For ever; and in silence, if it is a local cluster's: that is there, or ending just now.
    patience = math.inf if options.quiet else None
    async with Worker(options.address, options.nthreads, options.name, patience) as worker:
        if not options.quiet:
            # In one write: several workers may share a terminal.
            print(f"Worker {worker.name} at {worker.address}\n", end="", flush=True)
        try:
            await asyncio.wait([worker.finished])
        except asyncio.CancelledError:
            await worker.leave()
            raise
    if worker.parting and options.quiet:  # Our local cluster is ending, or dead: as we then do.
        os.killpg(0, signal.SIGKILL)
    if worker.parting:
        raise ConnectionError(f"lost the scheduler at {options.address}: {worker.parting}")


async def run_workers(options):
    """Several worker processes, which end with this one."""
    common = [options.address, "--nthreads", options.nthreads, "--log-level", options.log_level]

    def start(number):
        name = ["--name", f"{options.name}-{number}"] if options.name else []
        return worker_process(*common, *name, ended_by=signal.SIGTERM)

    # They leave one after the other: so each can hand its data over to the next.
    async with contextlib.AsyncExitStack() as parts:
        processes = [await parts.enter_async_context(start(n)) for n in range(options.nworkers)]
        codes = await asyncio.gather(*(process.wait() for process in processes))
    if any(codes):
        raise ConnectionError("workers ended with exit codes " + ", ".join(map(str, codes)))


def end_with_stdin():
    """End when whoever holds the other end of standard input does, however that ends.

    At once, whatever runs, and with what tasks have started: whoever started this process for its
    own use has no use for it now.  Tasks, and their processes, find an empty standard input.

    Processes that it has forked hold that end too, and may outlive it: so we also look, now and
    then, whether our parent is still the same.
    """
    lifeline, parent = os.dup(0), os.getppid()
    with open(os.devnull) as empty:
        os.dup2(empty.fileno(), 0)
    # (Nobody writes to it: that it can be read is its end.)
    while os.getppid() == parent and not select.select([lifeline], [], [], 1)[0]:
        pass
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    # The classes of this file exist once, as minidist's, also when it is run as a script.
    import minidist

    sys.exit(minidist.main())
