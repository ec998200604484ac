"""The tests of minidist, as a textbook.

Each test's name is one claim.  The chapters follow those of ``minidist.py``.

    1     Vocabulary: messages, queues, and what chapters 1 to 4 may not know
    2     Client mind: a transcript for each claim
    3     Scheduler mind: transcripts
    4     Worker mind: transcripts
          The simulated cluster: the three minds together, in any order of events, with faults;
          planted bugs, which it must find
    5     Wire
    6     Serialization
    7-9   The API on a live cluster
    12    Command line and processes
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
import textwrap
import threading
import traceback
import types
from collections import Counter, deque
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
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
    MESSAGES,
    SCHEDULER,
    Client,
    ClientMind,
    HeapSet,
    ProtocolError,
    SchedulerMind,
    Worker,
    WorkerMind,
    check_message,
    dumps,
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
    """One secret for all processes of a test; minds validate themselves; gates are shut."""
    monkeypatch.setenv("MINIDIST_TOKEN", "the secret of the tests")
    monkeypatch.setenv("MINIDIST_VALIDATE", "1")
    RUNS.clear()
    for gate in GATES:
        gate.clear()
    yield
    for gate in GATES:
        gate.set()  # No thread is left behind.


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


def travel(message, sender):
    """A message as it arrives: through JSON, its frames in a table beside it, then checked."""
    frames = []

    def place(frame):
        assert type(frame) is bytes, frame
        frames.append(frame)
        return len(frames) - 1

    return check_message(json.loads(json.dumps(message, default=place)), frames, sender)


def test_a_message_arrives_as_it_was_sent():
    message = dict(op="submit", key=("x", 1), want=1, name="inc", run_spec=(b"inc", b"args"))
    message |= dict(inputs=[("y", 2), (("z", 0), 3)], priority=0, workers=["a"], loose=False)
    message |= dict(retries=0)
    assert travel(message, "client") == message


@pytest.mark.parametrize(
    "message",
    [
        {"op": "no-such-op"},
        {"op": "submit", "key": "x"},
        {"op": "key-lost", "key": "x", "want": 1},
        {"op": "fetch-missed", "key": "x", "want": 1, "attempt": True, "holders": []},
        {"op": "fetch-missed", "key": "x", "want": 1, "attempt": 1, "holders": [7]},
        {"op": "fetch-missed", "key": ["x", 1], "attempt": 1, "want": 1, "holders": []},
        {"op": "release-keys", "names": [["x"]]},
        {"op": "release-keys", "names": [["x", "1"]]},
        {"op": "release-keys", "names": [[7, 1]]},
    ],
)
def test_what_no_client_sends_is_refused(message):
    with pytest.raises(ProtocolError):
        check_message(message, [], "client")


def test_a_frame_that_did_not_come_is_refused():
    message = dict(op="put-data", key="x", attempt=1, value=[1])
    with pytest.raises(ProtocolError):
        check_message(message, [b"only one"], "client")


def test_a_queue_gives_the_smallest_priority_first_and_forgets_what_was_taken_out():
    class Item:
        def __init__(self, priority):
            self.priority = priority

    queue, items = HeapSet(), [Item(n * 37 % 100) for n in range(100)]
    for item in items:
        queue.push(item)
    for item in items[::2]:
        queue.discard(item)
    order = []
    while item := queue.peek():
        order.append(item.priority)
        queue.discard(item)
    assert order == sorted(item.priority for item in items[1::2])
    assert len(queue) == 0


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
    """What a mind has to say since it was last asked: [(peer, op, its other fields)]."""
    said = [
        (peer, message["op"], {k: v for k, v in message.items() if k != "op"})
        for peer, message in mind.outbox
    ]
    mind.outbox.clear()
    mind.validate()
    return said


def client_with_x(**notice):
    """A client that wants x, and the future's state; told of it if there is a notice."""
    client = ClientMind()
    x = client.stimulus_submit("x", "inc", (b"spec",), [], 0)
    if notice:
        fields = dict(key="x", want=1, attempt=5, nbytes=8, type="int", holders=["w"], value=())
        client.stimulus_key_in_memory(SCHEDULER, **fields | notice)
    sent(client)
    return client, x


def test_a_submit_names_its_inputs_by_key_and_want():
    client, x = client_with_x()
    y = client.stimulus_submit("y", "inc", (), [x], 0)
    fields = dict(key="y", want=2, name="inc", run_spec=(), inputs=[("x", 1)], priority=0)
    fields |= dict(workers=(), loose=False, retries=0)
    assert sent(client) == [(SCHEDULER, "submit", fields)]
    assert (y.status, y.count) == ("pending", 1)


def test_two_futures_of_one_key_are_one_want_and_the_last_one_lets_go():
    client, x = client_with_x()
    assert client.stimulus_submit("x", "inc", (b"spec",), [], 0) is x
    client.stimulus_release(x)
    assert sent(client) == []
    client.stimulus_release(x)
    assert sent(client) == [(SCHEDULER, "release-keys", {"names": [("x", 1)]})]
    assert client.futures == {}


def test_releases_in_a_row_travel_in_one_message():
    client, x = client_with_x()
    y = client.stimulus_submit("y", "inc", (), [], 0)
    sent(client)
    client.stimulus_release(x)
    client.stimulus_release(y)
    assert sent(client) == [(SCHEDULER, "release-keys", {"names": [("x", 1), ("y", 2)]})]


def test_news_of_an_older_want_is_ignored():
    client, x = client_with_x()
    client.stimulus_release(x)
    again = client.stimulus_submit("x", "inc", (b"spec",), [], 0)
    client.stimulus_key_erred(SCHEDULER, "x", 1, (b"old",), "", "")
    client.stimulus_key_cancelled(SCHEDULER, "x", 1, "old")
    assert (again.want, again.status) == (2, "pending")


def test_a_value_that_rode_along_is_not_fetched():
    client, x = client_with_x(value=(b"42",))
    client.stimulus_ask([x])
    assert (x.status, x.value, sent(client)) == ("finished", (b"42",), [])


def test_a_value_is_fetched_only_when_somebody_asks_for_it():
    client, x = client_with_x(value=())
    assert (x.status, sent(client)) == ("finished", [])
    client.stimulus_ask([x])
    assert sent(client) == [("w", "get-data", {"names": [("x", 5)]})]
    client.stimulus_data("w", "x", 5, "ok", (b"42",))
    assert (x.value, sent(client)) == ((b"42",), [])


def test_a_client_tries_each_holder_and_then_reports_those_that_missed():
    client, x = client_with_x(holders=["w", "v"])
    client.stimulus_ask([x])
    client.stimulus_link_lost("w")
    client.stimulus_data("v", "x", 5, "missing", ())
    assert [(peer, op) for peer, op, _ in sent(client)[:-1]] == [
        ("w", "get-data"),
        ("v", "get-data"),
    ]
    assert x.status == "pending"


def test_a_value_that_is_here_is_final():
    client, x = client_with_x(value=(b"42",))
    client.stimulus_key_lost(SCHEDULER, "x", 1)
    client.stimulus_key_erred(SCHEDULER, "x", 1, (b"late",), "", "")
    client.stimulus_key_cancelled(SCHEDULER, "x", 1, "late")
    assert (x.status, x.value, sent(client)) == ("finished", (b"42",), [])


def test_an_error_that_was_fetched_is_final_too():
    client, x = client_with_x(value=())
    client.stimulus_ask([x])
    client.stimulus_data("w", "x", 5, "error", (b"cannot pickle",))
    client.stimulus_key_lost(SCHEDULER, "x", 1)
    assert (x.status, x.exception) == ("error", (b"cannot pickle",))


def test_a_value_whose_holders_are_all_gone_is_reported_and_not_waited_for():
    client, x = client_with_x(value=())
    client.stimulus_worker_left(SCHEDULER, "w")
    client.stimulus_ask([x])
    fields = dict(key="x", want=1, attempt=5, holders=[])
    assert (x.status, sent(client)) == ("pending", [(SCHEDULER, "fetch-missed", fields)])


def test_what_is_submitted_on_a_cancelled_future_is_cancelled_saying_why():
    client, x = client_with_x()
    client.stimulus_key_cancelled(SCHEDULER, "x", 1, "its data was lost")
    y = client.stimulus_submit("y", "inc", (), [x], 0)
    assert (x.status, y.status, sent(client)) == ("cancelled", "cancelled", [])
    assert "'x' was cancelled: its data was lost" in y.text


def test_when_the_scheduler_is_lost_what_is_not_here_is_cancelled():
    client, x = client_with_x()
    y = client.stimulus_submit("y", "inc", (), [], 0)
    client.stimulus_key_in_memory(SCHEDULER, "y", 2, 6, 8, "int", [], (b"1",))
    client.stimulus_scheduler_left("the scheduler is gone")
    assert (x.status, x.text, y.status) == ("cancelled", "the scheduler is gone", "finished")


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

    def submit(self, key, *inputs, client="c", want=1, name=None, priority=0, **options):
        """``inputs`` are wanted under the number 1, like everything else."""
        inputs = [(i, 1) for i in inputs]
        spec = (str(key).encode(),)
        self.stimulus_submit(client, key, want, name or key, spec, inputs, priority, **options)

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
    fields = dict(key="x", attempt=1, name="x", run_spec=(b"x",), places=[], order=(0, 1))
    assert sent(s) == [("w", "compute-task", fields | {"wanted": True})]
    assert s.states() == {"x": "processing"}


def test_a_dependent_waits_until_its_dependency_is_in_memory():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    assert s.states() == {"x": "processing", "y": "waiting"}
    s.finish("x")
    assert s.states() == {"x": "memory", "y": "processing"}


def test_the_client_is_told_where_its_result_is_and_small_values_ride_along():
    s = Scheduler("w")
    s.submit("x")
    sent(s)
    s.finish("x", nbytes=8, value=(b"42",))
    fields = dict(key="x", want=1, attempt=1, nbytes=8, type="int", holders=["w"], value=(b"42",))
    assert sent(s) == [("c", "key-in-memory", fields)]


def test_tasks_are_sent_in_the_order_of_their_priorities_then_of_their_submission():
    s = Scheduler()
    for key, priority in [("low", -1), ("a", 0), ("b", 0), ("high", 7)]:
        s.submit(key, priority=priority)
    s.stimulus_register_worker("w", "w", 4, [], [])
    assert [key for _, key in s.computing()] == ["high", "a", "b", "low"]


def test_a_task_goes_to_the_holder_of_its_input():
    s = Scheduler("v", "w")
    for key in "xy":
        s.submit(key)
    holders = {key: s.finish(key, nbytes=100_000_000)[0] for key in "xy"}
    sent(s)
    for key in "xy":
        s.submit(f"on {key}", key)
    assert s.computing() == [(holders["x"], "on x"), (holders["y"], "on y")]


def test_a_small_input_moves_to_an_idle_worker_when_its_holder_is_busy():
    s = Scheduler("v", "w")
    s.submit("x")
    holder, _ = s.finish("x", nbytes=8)
    sent(s)
    s.submit("first", "x")
    s.submit("second", "x")
    assert {key: worker == holder for worker, key in s.computing()} == {
        "first": True,
        "second": False,
    }


def test_tasks_that_were_never_measured_go_one_to_a_thread():
    s = Scheduler("w", nthreads=3)
    for n in range(20):
        s.submit(f"x{n}", name="f")
    assert len(s.computing()) == 3


def test_long_tasks_are_not_hoarded():
    s = Scheduler("w", nthreads=3).measured("f", duration_us=2_000_000)
    for n in range(20):
        s.submit(f"x{n}", name="f")
    assert len(s.computing()) == 3


def test_short_tasks_are_sent_a_millisecond_deep():
    s = Scheduler("w").measured("f", duration_us=10)
    for n in range(500):
        s.submit(f"x{n}", name="f")
    assert 100 <= len(s.computing()) <= 102


def test_without_workers_a_task_has_no_worker_and_runs_when_one_joins():
    s = Scheduler()
    s.submit("x")
    assert s.states() == {"x": "no-worker"}
    s.stimulus_register_worker("w", "w", 1, [], [])
    assert s.states() == {"x": "processing"}


def test_a_second_worker_of_one_name_is_refused():
    s = Scheduler("w")
    s.stimulus_register_worker("v", "name of w", 1, [], [])
    (answer,) = sent(s)
    assert answer[:2] == ("v", "refused") and "name of w" in answer[2]["text"]
    s.stimulus_worker_left("v")
    assert list(s.workers) == ["w"]


def test_a_released_result_is_freed_on_every_worker():
    s = Scheduler("v", "w")
    s.submit("x")
    holder, attempt = s.finish("x")
    other = "w" if holder == "v" else "v"
    s.stimulus_add_keys(other, [("x", attempt)])
    sent(s)
    s.release("x")
    told = [(peer, op, fields["names"]) for peer, op, fields in sent(s)]
    assert sorted(told) == [(peer, "free-keys", [("x", 1)]) for peer in "vw"]
    assert s.states() == {}


def test_a_released_input_is_kept_until_its_last_dependent_has_its_value():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    s.finish("x")
    s.release("x")
    assert s.states() == {"x": "memory", "y": "processing"}
    s.finish("y")
    assert s.states() == {"x": "released", "y": "memory"}
    assert sent(s)[-1] == ("w", "free-keys", {"names": [("x", 1)]})


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
    assert [(peer, op) for peer, op, _ in sent(s)] == [("c", "worker-left"), ("c", "key-lost")]
    s.stimulus_register_worker("v", "v", 1, [], [])
    s.finish("x")
    s.finish("y")
    assert s.states() == {"x": "released", "y": "memory"}


def test_a_submit_with_an_input_that_this_client_does_not_want_is_cancelled():
    s = Scheduler("w", clients="cd")
    s.submit("x", client="c")
    sent(s)
    s.submit("y", "x", client="d")
    ((peer, op, fields),) = sent(s)
    assert (peer, op, fields["key"]) == ("d", "key-cancelled", "y") and "'x'" in fields["text"]
    assert s.states() == {"x": "processing"}


def test_two_clients_share_a_task_and_the_last_one_lets_it_go():
    s = Scheduler("w", clients="cd")
    s.submit("x", client="c")
    s.submit("x", client="d")
    assert len(s.computing()) == 1
    s.finish("x")
    assert sorted((peer, op) for peer, op, _ in sent(s)) == [
        ("c", "key-in-memory"),
        ("d", "key-in-memory"),
    ]
    s.stimulus_client_left("c")
    assert s.states() == {"x": "memory"}
    s.release("x", client="d")
    assert s.states() == {}


def test_the_first_call_of_a_key_wins_and_who_comes_with_another_is_warned():
    s = Scheduler("w")
    s.submit("x")
    sent(s)
    s.stimulus_submit("c", "x", 2, "other", (b"other",), [], 0)
    assert [op for _, op, _ in sent(s)] == ["warning"]


def test_an_abandoned_attempt_runs_to_its_end_and_its_value_is_freed():
    s = Scheduler("w")
    s.submit("x")
    s.release("x")
    assert s.states() == {} and len(s.workers["w"].processing) == 1
    s.submit("x", want=2)
    assert s.states() == {"x": "queued"}  # The abandoned attempt occupies the thread.
    sent(s)
    s.stimulus_task_finished("w", 1, 8, "int", 10, (b"old",))
    assert [(op, fields.get("names", fields.get("attempt"))) for _, op, fields in sent(s)] == [
        ("free-keys", [("x", 1)]),
        ("compute-task", 2),
    ]
    assert s.states() == {"x": "processing"}


def test_a_late_release_does_not_touch_a_newer_want():
    s = Scheduler("w")
    s.submit("x", want=2)
    s.release("x", want=1)
    assert s.states() == {"x": "processing"}


def test_an_error_is_told_to_every_dependent_and_forgotten_with_its_last_want():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    s.submit("z", "y")
    sent(s)
    s.stimulus_task_erred("w", 1, (b"boom",))
    told = {fields["key"]: fields["exception"] for _, op, fields in sent(s) if op == "key-erred"}
    assert told == dict.fromkeys("xyz", (b"boom",))
    s.submit("late", "z")
    assert s.states() == dict.fromkeys(["x", "y", "z", "late"], "erred")
    s.release("x", "y", "z", "late")
    assert s.states() == {}


def test_an_attempt_outlives_the_failure_of_an_input_that_it_has_fetched_already():
    s = Scheduler("w")
    s.submit("x")
    s.finish("x")
    s.stimulus_register_worker("v", "v", 1, [], [])
    s.submit("busy", "x")
    s.submit("y", "x")
    assert {ts.key for ts, _ in s.workers["v"].processing.values()} == {"y"}
    s.stimulus_worker_left("w")
    s.stimulus_register_worker("w2", "w2", 1, [], [])
    s.stimulus_task_erred("w2", s.tasks["x"].attempt, (b"boom",))
    assert s.states() == {"x": "erred", "busy": "erred", "y": "processing"}
    s.finish("y")
    assert s.states() == {"x": "erred", "busy": "erred", "y": "memory"}


def test_a_client_that_missed_is_told_of_the_other_holders():
    s = Scheduler("v", "w")
    s.submit("x")
    holder, attempt = s.finish("x")
    other = "w" if holder == "v" else "v"
    s.stimulus_add_keys(other, [("x", attempt)])
    sent(s)
    s.stimulus_fetch_missed("c", "x", 1, attempt, [holder])
    (freed, told) = sent(s)
    assert (told[1], told[2]["holders"]) == ("key-in-memory", [other])
    assert freed == (holder, "free-keys", {"names": [("x", attempt)]})


def test_a_client_that_missed_every_holder_makes_the_task_run_again_but_not_for_ever():
    s = Scheduler("w")
    s.submit("x")
    for _ in range(ALLOWED_FAILURES):
        _, attempt = s.finish("x")
        s.stimulus_fetch_missed("c", "x", 1, attempt, ["w"])
        assert s.states() == {"x": "processing"}
    _, attempt = s.finish("x")
    s.stimulus_fetch_missed("c", "x", 1, attempt, ["w"])
    assert s.states() == {"x": "erred"}
    assert "could not be fetched from w" in sent(s)[-1][2]["text"]


def test_a_task_that_is_returned_with_misses_too_often_errs():
    s = Scheduler("v", "w")
    s.submit("x")
    holder, attempt = s.finish("x", nbytes=1)
    s.submit("busy", "x")
    s.submit("y", "x")
    away = s.tasks["y"].processing_on.id
    for n in range(ALLOWED_FAILURES + 1):
        y = s.tasks["y"]
        worker = y.processing_on.id
        s.stimulus_task_returned(worker, y.attempt, [("x", 0, ["elsewhere"])])
    assert away and y.state == "erred"
    assert y.error[2] == f"{worker} could not fetch 'x' from elsewhere"


def test_a_returned_task_waits_without_an_attempt():
    s = Scheduler("w")
    s.submit("x")
    s.finish("x")
    s.submit("y", "x")
    s.submit("z", priority=1)  # It gets the thread that y gives back.
    s.stimulus_task_returned("w", s.tasks["y"].attempt, [("x", 1, ["w"])])
    assert s.states() == {"x": "queued", "y": "waiting", "z": "processing"}
    assert s.tasks["y"].attempt == s.tasks["x"].attempt == 0


def test_an_input_that_is_made_again_leaves_alone_the_attempt_that_had_it():
    s = Scheduler("w")
    s.submit("x")
    s.finish("x")
    s.stimulus_register_worker("v", "v", 2, [], [])
    s.submit("busy", "x")
    s.submit("y", "x")
    s.stimulus_worker_left("w")
    s.finish("x")
    assert s.states() == {"x": "memory", "busy": "queued", "y": "processing"}


def test_a_value_that_cannot_be_had_fails_the_dependents_that_wait_for_room():
    s = Scheduler("w")
    s.submit("x")
    for _ in range(ALLOWED_FAILURES):
        s.stimulus_fetch_missed("c", "x", 1, s.finish("x")[1], ["w"])
    _, attempt = s.finish("x")
    s.submit("y", "x")
    s.submit("z", "x")
    assert s.states() == {"x": "memory", "y": "processing", "z": "queued"}
    s.stimulus_fetch_missed("c", "x", 1, attempt, ["w"])
    assert s.states() == {"x": "erred", "y": "processing", "z": "erred"}


def test_a_task_that_is_let_go_makes_way_for_a_shorter_one_behind_it():
    s = Scheduler("w").measured("f", duration_us=10)
    s.submit("x")
    s.finish("x")
    s.submit("running", "x", name="f")
    s.submit("long", "x")
    s.submit("short", "x", name="f")
    sent(s)
    s.release("long")
    assert s.computing() == [("w", "short")]


def test_news_of_a_replica_that_nobody_needs_is_answered_by_free_keys():
    s = Scheduler("w")
    s.stimulus_add_keys("w", [("x", 7)])
    assert sent(s) == [("w", "free-keys", {"names": [("x", 7)]})]


def test_a_long_chain_is_no_deep_recursion():
    s = Scheduler("w")
    s.submit("0")
    for n in range(1, 5_000):
        s.submit(str(n), str(n - 1), name="f")
    for n in range(5_000):
        s.finish(str(n), duration_us=10)
    assert set(s.states().values()) == {"memory"}
    s.release(*(str(n) for n in range(4_999)))
    s.stimulus_worker_left("w")
    s.stimulus_register_worker("v", "v", 1, [], [])
    assert Counter(s.states().values()) == {"waiting": 4_999, "processing": 1}
    s.release("4999")
    assert s.states() == {}


def test_an_error_at_the_head_of_a_long_chain_reaches_its_end():
    s = Scheduler("w")
    s.submit("0")
    for n in range(1, 5_000):
        s.submit(str(n), str(n - 1))
    s.stimulus_task_erred("w", 1, (b"boom",))
    assert set(s.states().values()) == {"erred"}


# ---- 4. Worker mind ----


class WorkerByHand(WorkerMind):
    """A worker driven by hand: its stimuli with what the transcripts do not care about."""

    def compute(self, number, *inputs, key="y", holders=("v",), priority=0):
        """``inputs`` are keys whose values bear the attempt 1 and are held by ``holders``."""
        inputs = [(i, 1, list(holders)) for i in inputs]
        self.stimulus_compute_task(SCHEDULER, key, number, "f", (b"f",), inputs, [priority], True)
        return self

    def states(self):
        self.validate()
        return {number: attempt.state for number, attempt in self.attempts.items()}


def test_an_attempt_without_inputs_is_ready_at_once_and_ends_with_its_value():
    w = WorkerByHand().compute(7)
    assert (w.states(), sent(w)) == ({7: "ready"}, [])
    assert w.stimulus_take().number == 7
    assert (w.states(), w.stimulus_take()) == ({7: "executing"}, None)
    w.stimulus_finished(7, 8, "int", 10, (b"1",))
    fields = dict(attempt=7, nbytes=8, type="int", duration_us=10, value=(b"1",))
    assert sent(w) == [(SCHEDULER, "task-finished", fields)]
    assert (w.states(), list(w.data)) == ({}, [("y", 7)])


def test_threads_take_attempts_in_the_order_of_their_priorities():
    w = WorkerByHand().compute(1, priority=5).compute(2, priority=3).compute(3, priority=4)
    assert [w.stimulus_take().number for _ in range(3)] == [2, 3, 1]


def test_an_exception_ends_an_attempt():
    w = WorkerByHand().compute(7)
    w.stimulus_take()
    w.stimulus_failed(7, (b"boom",))
    assert sent(w)[-1] == (SCHEDULER, "task-erred", {"attempt": 7, "exception": (b"boom",)})


def test_inputs_are_fetched_from_each_holder_in_one_request():
    w = WorkerByHand().compute(7, "x", "z")
    assert sent(w) == [("v", "get-data", {"names": [("x", 1), ("z", 1)]})]
    w.stimulus_data("v", "x", 1, "ok", (b"1",))
    assert w.states() == {7: "waiting"}
    w.stimulus_data("v", "z", 1, "ok", (b"2",))
    assert w.states() == {7: "ready"}
    assert sent(w) == [(SCHEDULER, "add-keys", {"names": [("x", 1), ("z", 1)]})]


def test_an_input_that_nobody_gives_sends_the_attempt_back():
    w = WorkerByHand().compute(7, "x", holders=["u", "v"])
    w.stimulus_data("u", "x", 1, "missing", ())
    sent(w)
    w.stimulus_link_lost("v")
    misses = [("x", 1, ["u", "v"])]
    assert sent(w) == [(SCHEDULER, "task-returned", {"attempt": 7, "misses": misses})]
    assert (w.states(), w.needed_by) == ({}, {})


def test_an_input_that_its_holder_cannot_pickle_fails_the_attempt():
    w = WorkerByHand().compute(7, "x")
    w.stimulus_data("v", "x", 1, "error", (b"cannot pickle",))
    assert sent(w)[-1][:2] == (SCHEDULER, "task-erred")


def test_a_freed_input_sends_back_what_has_not_started():
    w = WorkerByHand().compute(7, "x").compute(8, "x", key="z", priority=1)
    w.stimulus_data("v", "x", 1, "ok", (b"1",))
    w.stimulus_take()
    sent(w)
    w.stimulus_free_keys(SCHEDULER, [("x", 1)])
    assert w.states() == {7: "executing"}
    assert sent(w) == [(SCHEDULER, "task-returned", {"attempt": 8, "misses": []})]


def test_several_attempts_may_bear_one_key():
    w = WorkerByHand().compute(7, key="y").compute(8, key="y")
    w.stimulus_take()
    w.stimulus_take()
    w.stimulus_finished(8, 1, "int", 10, ())
    w.stimulus_finished(7, 1, "int", 10, ())
    assert set(w.data) == {("y", 7), ("y", 8)}


def test_a_dead_holder_is_not_waited_for():
    w = WorkerByHand().compute(7, "x", holders=["u", "v"])
    sent(w)
    w.stimulus_worker_left(SCHEDULER, "u")
    assert sent(w) == [("v", "get-data", {"names": [("x", 1)]})]
    w.stimulus_worker_left(SCHEDULER, "v")
    assert w.states() == {}


# ---- The simulated cluster: three minds, every order of events, and faults ----

DURATIONS_US = {"instant": 10, "short": 400, "long": 5_000, "hours": 10**10, "unpicklable": 10}
FAILS = ("never", "never", "never", "never", "at first", "always", "kills its worker")


@dataclass(frozen=True)
class Call:
    """What a user submits: a call on the values of other keys, or (``data``) a scattered value."""

    n: int
    name: str = "data"
    inputs: tuple = ()
    fails: str = "never"
    retries: int = 0
    workers: tuple = ()
    loose: bool = False


class Counting(SchedulerMind):
    """A scheduler's mind that says how often a worker stole."""

    stolen = 0

    def steal(self, ws):
        ts = super().steal(ws)
        self.stolen += ts is not None
        return ts


class Cluster:
    """Real minds, their simplest bodies, and one FIFO channel per connection and direction.

    Nothing moves by itself: who calls the methods decides what happens next.  ``pick`` is any
    number; it chooses among what is possible.  Each mind is validated after its every stimulus.
    """

    def __init__(self, workers=2, clients=1):
        self.minds = {SCHEDULER: Counting()}  # {id: mind} of those alive; w... and c... too
        self.channels = {}  # {(sender, receiver, kind): deque}; None in one: the connection is lost
        self.stores = {}  # {worker: {(key, attempt): value}}
        self.running = {}  # {worker: {attempt number: (Attempt, values of its inputs)}}
        self.hung = set()  # workers that do nothing until they come back
        self.names = {}  # {worker: its name}
        self.held = {}  # {client: [FutureState]}: one entry for each Future object
        self.known = {}  # {FutureState: (status, value)}, as the news told it
        self.broken = set()  # {(peer, holder)}: data links that fail for good
        self.calls = {}  # {key: Call}
        self.specs = {}  # {number: Call}: older calls of a key run beside its newest
        self.edges = set()  # {(kind of mind, start, finish)}, of minds that are gone
        self.seen = Counter()  # what happened
        self.wanted, self.runs = Counter(), Counter()  # {key: how often}
        self.cancelled = set()  # {(whose want, key)}
        self.deaths = Counter()  # {key: how many workers died while it ran alone there}
        self.forgotten_futures = set()  # keys that were fired and forgotten
        self.now_us = 0
        for _ in range(workers):
            self.a_worker_joins()
        for _ in range(clients):
            self.a_client_joins()

    def ids(self, kind):
        return [id for id in self.minds if id[0] == kind]

    def states(self, pick, *statuses):
        """One (client, state) that its user holds, in a list, or none."""
        some = [(c, s) for c in self.ids("c") for s in self.held[c]]
        return pick_from(
            [pair for pair in some if not statuses or pair[1].status in statuses], pick
        )

    # Events that users cause.

    def a_client_joins(self, pick=0):
        if self.seen["calls changed"]:
            return  # Which of two calls wins would depend on whose message comes first.
        self.seen["clients"] += 1
        id = f"c{self.seen['clients']}"
        self.minds[id], self.held[id] = ClientMind(), []
        self.post(id, SCHEDULER, {"op": "register-client", "id": id, "wants": []})

    def a_client_submits(self, pick=0):
        for client in pick_from(self.ids("c"), pick):
            n, held = len(self.calls), self.usable(client)
            inputs = [held[pick // (7**i) % len(held)] for i in range(pick % 4) if held]
            key = ("call", n) if n % 2 else f"call-{n}"
            workers = tuple(f"name {i}" for i in range(pick // 11 % 3)) if pick % 6 == 0 else ()
            self.calls[key] = self.specs[n] = Call(
                n,
                list(DURATIONS_US)[pick // 5 % 17 % 5],
                tuple(dict.fromkeys(state.key for state in inputs)),
                FAILS[pick // 3 % 31 % len(FAILS)],
                retries=max(0, pick // 2 % 7 - 4),
                workers=workers,
                loose=bool(workers) and pick % 4 == 0,
            )
            self.submit(client, key)

    def usable(self, client):
        """The states whose futures a user has: those of a scatter only when it is over."""
        data = {key for key, call in self.calls.items() if call.name == "data"}
        return [s for s in self.held[client] if s.status != "pending" or s.key not in data]

    def a_client_scatters(self, pick=0):
        for client in pick_from(self.ids("c"), pick):
            n = len(self.calls)
            known = [key for key, call in self.calls.items() if call.name == "data"]
            key = (pick_from(known, pick // 3) if pick % 3 == 0 else []) or [f"data-{n}"]
            workers = ("name 0",) if pick % 5 == 0 else ()
            self.calls.setdefault(key[0], Call(n, workers=workers))
            self.submit(client, key[0], broadcast=pick % 2 == 0)
            self.seen["scattered"] += 1

    def a_client_submits_a_known_call(self, pick=0):
        for client in pick_from(self.ids("c"), pick):
            for key in pick_from(list(self.calls), pick // 3):
                self.submit(client, key)

    def a_user_changes_a_call(self, pick=0):
        """Drop a key's futures and submit it at once as another call, with another outcome.

        Only where it is clear which call should win: with one client, and no dependents.
        """
        inputs = {key for call in self.calls.values() for key in call.inputs}
        keys = [s.key for s in self.held.get("c1", ()) if s.key not in inputs]
        keys = [key for key in keys if self.calls[key].name != "data"]
        keys = [key for key in keys if key not in self.forgotten_futures]
        for key in pick_from(keys if self.seen["clients"] == 1 else [], pick):
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
            value, workers = b"%d" % value_of_call(call.n, ()), list(call.workers)
            state = mind.stimulus_scatter(key, (value,), 8, "int", workers, broadcast)
        else:
            futures = [held.get(i) or self.submit(client, i) for i in call.inputs]
            if not set(futures) <= set(self.usable(client)):
                return None  # Some other time: what it needs is only now being scattered.
            spec, options = (b"%d" % call.n,), (list(call.workers), call.loose, call.retries)
            state = mind.stimulus_submit(key, call.name, spec, futures, call.n % 3, *options)
        self.wanted[key] += state.count == 1
        self.held[client].append(state)
        self.flush(client)
        return state

    def a_client_releases(self, pick=0):
        for client, state in self.states(pick):
            self.release(client, state)

    def release(self, client, state):
        self.held[client].remove(state)
        self.minds[client].stimulus_release(state)
        self.flush(client)

    def a_client_asks(self, pick=0):
        for client, state in self.states(pick):
            self.minds[client].stimulus_ask([state])
            self.flush(client)

    def a_client_cancels(self, pick=0):
        for client, state in self.states(pick):
            force = pick % 5 == 0
            self.cancelled.add(("anybody" if force else client, state.key))
            self.seen["cancelled while running"] += any(
                attempt.key == state.key
                for some in self.running.values()
                for attempt, _ in some.values()
            )
            self.minds[client].stimulus_cancel([state], force)
            self.flush(client)

    def a_client_retries(self, pick=0):
        for client, state in self.states(pick, "error"):
            if self.minds[client].futures.get(state.key) is state:
                for key in self.lineage(state.key):
                    self.wanted[key] += 1 + self.calls[key].retries
                self.seen["retried"] += 1
            self.minds[client].stimulus_retry([state])
            self.flush(client)

    def a_client_fires_and_forgets(self, pick=0):
        for client, state in self.states(pick):
            self.minds[client].stimulus_fire_and_forget([state])
            self.forgotten_futures.add(state.key)
            self.release(client, state)

    def lineage(self, key):
        """The key and all that it is computed from."""
        found = [key]
        for each in found:
            found += [i for i in self.calls[each].inputs if i not in found]
        return found

    # Events that threads, clocks and messages cause.

    def something_moves(self, pick=0):
        """One message is delivered, or a thread begins or ends a task.  False: all is quiet."""
        moves = [(self.deliver, *c) for c in self.channels if c[1] not in self.hung]
        for worker in self.ids("w"):
            if worker in self.hung:
                continue
            if len(self.running[worker]) < self.nthreads(worker) and self.minds[worker].ready:
                moves.append((self.take, worker))
            moves += [(self.end, worker, n, pick) for n in self.running[worker]]
        for move, *arguments in pick_from(moves, pick):
            move(*arguments)
        return bool(moves)

    def nthreads(self, worker):
        return 1 + int(worker[1:]) % 2

    def take(self, worker):
        attempt = self.minds[worker].stimulus_take()
        values = [self.stores[worker][name] for name in attempt.inputs]
        self.running[worker][attempt.number] = (attempt, values)
        self.runs[attempt.key] += 1
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
            value = value_of_call(call.n, values)
            if call.name == "unpicklable":
                value = f"cannot pickle {value}"
            self.stores[worker][attempt.key, number] = value
            rides = attempt.wanted and pick % 2 and type(value) is int
            frames = (b"%d" % value,) if rides else ()
            fields = (number, 10 ** (call.n % 8), "int", DURATIONS_US[call.name], frames)
            self.minds[worker].stimulus_finished(*fields)
        self.flush(worker)

    def time_passes(self, pick=0):
        """Who lives says so; and the scheduler, or a worker, learns what time it is."""
        self.now_us += pick % 25 * 1_000_000
        for worker in self.ids("w"):
            if worker not in self.hung:
                self.post(worker, SCHEDULER, {"op": "heartbeat"})
        for id in [SCHEDULER] if pick % 2 else pick_from(self.ids("w"), pick):
            if id not in self.hung:
                before = self.alone()
                self.minds[id].stimulus_time_passes(self.now_us)
                for dead in set(before) - set(self.minds[SCHEDULER].workers):
                    self.deaths.update(before[dead])
                    self.seen["faults"] += 1
                    self.seen["silent for too long"] += 1
                self.flush(id)

    def alone(self):
        """What the scheduler will blame if a worker is lost now: {worker: [a key, or none]}"""
        workers = self.minds[SCHEDULER].workers.values()
        some = {ws.id: [ts.key for ts, _ in ws.processing.values()] for ws in workers}
        return {id: keys if len(keys) == 1 else [] for id, keys in some.items()}

    # Faults.

    def a_worker_joins(self, pick=0):
        self.seen["workers"] += 1
        id = f"w{self.seen['workers']}"
        taken = [self.names[w] for w in self.ids("w")]
        free = [f"name {i}" for i in range(99) if f"name {i}" not in taken]
        self.names[id] = taken[0] if taken and pick % 9 == 5 else free[0]
        self.minds[id], self.stores[id], self.running[id] = WorkerMind(), {}, {}
        fields = dict(id=id, name=self.names[id], nthreads=self.nthreads(id))
        self.post(id, SCHEDULER, {"op": "register-worker", **fields, "values": [], "attempts": []})

    def a_worker_dies(self, pick=0):
        for worker in pick_from(self.ids("w"), pick):
            self.lose_worker(worker, told=pick % 2)

    def lose_worker(self, worker, told):
        self.seen["faults"] += 1
        self.seen["lost while running"] += bool(self.running[worker])
        self.vanish(worker, told)

    def a_worker_leaves(self, pick=0):
        for worker in pick_from([w for w in self.ids("w") if w not in self.hung], pick):
            if not self.minds[worker].leaving:
                self.minds[worker].stimulus_leave()
                self.seen["leaving"] += 1
                self.flush(worker)

    def a_worker_hangs(self, pick=0):
        self.hung.update(pick_from(self.ids("w"), pick))

    def a_worker_comes_back(self, pick=0):
        self.hung.difference_update(pick_from(sorted(self.hung), pick))

    def a_client_vanishes(self, pick=0):
        for client in pick_from(self.ids("c")[1:], pick):
            del self.held[client]
            self.seen["clients vanished"] += 1
            self.vanish(client, told=pick % 2)

    def vanish(self, id, told):
        """All its connections are lost; ``told``: after what it had sent to the scheduler."""
        mind = self.minds.pop(id)
        self.hung.discard(id)
        self.stores.pop(id, None), self.running.pop(id, None)
        self.remember_edges(mind)
        stream = self.channels.get((id, SCHEDULER, "stream"), ()) if told else ()
        for channel in [channel for channel in self.channels if id in channel]:
            del self.channels[channel]
        self.channels[id, SCHEDULER, "stream"] = deque([*stream, None])
        for peer in [peer for peer in self.minds if (peer, id) in self.links()]:
            self.channels[id, peer, "answer"] = deque([None])

    def links(self):
        """The data connections in use: [(peer, holder)]."""
        links = [(p, h) for p, m in self.minds.items() if p != SCHEDULER for h in m.asked]
        clients = [(c, self.minds[c]) for c in self.ids("c")]
        puts = [(c, s.put[0]) for c, m in clients for s in m.futures.values() if s.put]
        return [*links, *puts]

    def a_data_link_fails(self, pick=0):
        for peer, holder in pick_from(
            [link for link in self.links() if link[1] in self.minds], pick
        ):
            self.seen["faults"] += 1
            self.channels.pop((peer, holder, "request"), None)
            self.channels[holder, peer, "answer"] = deque([None])
            if pick % 3 == 0:
                self.broken.add((peer, holder))

    # The network.

    def post(self, sender, receiver, message, kind="stream"):
        self.channels.setdefault((sender, receiver, kind), deque()).append(message)

    def flush(self, id):
        """Do what a body does after each stimulus: send, and wake who waits."""
        mind = self.minds[id]
        for peer, message in mind.outbox:
            if message["op"] in ("get-data", "put-data"):
                if peer in self.minds and (id, peer) not in self.broken:
                    self.post(id, peer, message, "request")
                else:
                    self.seen["faults"] += peer in self.minds
                    self.post(peer, id, None, "answer")
            elif peer in self.minds:
                self.post(id, peer, message)
            self.seen[message["op"]] += 1
            self.seen["copies"] += message.get("name") == "copy"
        mind.outbox.clear()
        if id[0] == "c":
            self.known |= {state: (state.status, state.value) for state in mind.news}
            mind.news.clear()
        mind.validate()

    def deliver(self, sender, receiver, kind):
        channel = self.channels[sender, receiver, kind]
        message = channel.popleft()
        if not channel:
            del self.channels[sender, receiver, kind]
        role = {"c": "client", "w": "worker", "s": "scheduler"}[sender[0]]
        mind = self.minds[receiver]
        if message is None:
            lost = "link_lost" if kind == "answer" else f"{role}_left"
            self.deaths.update(self.alone().get(sender, ()) if kind == "stream" else ())
            getattr(mind, f"stimulus_{lost}")(sender)
        else:
            message = travel(message, "holder" if kind == "answer" else role)
            self.handle(sender, receiver, message.pop("op"), message)
        if receiver in self.minds:
            self.flush(receiver)

    def handle(self, sender, receiver, op, fields):
        """What a body does with a message: most of them are for its mind."""
        mind = self.minds[receiver]
        if op == "get-data":
            for name in fields["names"]:
                self.post(receiver, sender, self.answer(receiver, name), "answer")
        elif op in ("refused", "goodbye"):
            self.seen["said good-bye"] += op == "goodbye"
            self.vanish(receiver, told=False)
        elif op in ("registered", "warning") or (
            receiver == SCHEDULER and not op.startswith("register") and not self.knows(sender)
        ):
            pass
        else:
            if op.startswith("task-") and fields["attempt"] in mind.workers[sender].processing:
                ts, _ = mind.workers[sender].processing[fields["attempt"]]
                self.seen["abandoned"] += ts.attempt != fields["attempt"]
                self.seen["returned as late"] += op == "task-returned" and not fields["misses"]
            getattr(mind, "stimulus_" + op.replace("-", "_"))(fields.pop("id", sender), **fields)
            self.keep_store(receiver, op, fields)

    def knows(self, id):
        scheduler = self.minds[SCHEDULER]
        return id in scheduler.workers or id in scheduler.clients

    def keep_store(self, worker, op, fields):
        """A worker's body stores what its mind holds."""
        if op == "free-keys":
            for name in fields["names"]:
                del self.stores[worker][name]
        elif op in ("data", "put-data") and worker[0] == "w":
            name = fields["key"], fields["attempt"]
            if name in self.minds[worker].data and name not in self.stores[worker]:
                self.stores[worker][name] = int(fields["value"][0])
                self.seen["transfers"] += 1

    def answer(self, holder, name):
        value = self.stores[holder].get(name)
        if value is None:
            status, frames = "missing", ()
        elif type(value) is str:
            status, frames = "error", (value.encode(),)
        else:
            status, frames = "ok", (b"%d" % value,)
        return dict(op="data", key=name[0], attempt=name[1], status=status, value=frames)

    # The end.

    def calm_down(self, choose):
        """No more faults: what is under way arrives, in some order, and then nothing moves.

        Workers that tasks have killed, and those that tasks call for by name, are there.
        """
        self.hung.clear()
        for _ in range(3_000 + 300 * len(self.calls) * len(self.minds)):
            if not self.something_moves(choose.randrange(10**6)):
                called = {"name 0"} | {w for call in self.calls.values() for w in call.workers}
                if self.minds[SCHEDULER].complaints:
                    self.time_passes(pick=1)
                elif called <= {self.names[w] for w in self.ids("w")}:
                    return
                else:
                    self.a_worker_joins()
        raise AssertionError("it never calms down")

    def remember_edges(self, mind):
        kind = SchedulerMind if isinstance(mind, SchedulerMind) else type(mind)
        self.edges |= {(kind, start, finish) for _, start, finish, _, _ in mind.story}

    def ask_for_everything_and_let_go(self, choose):
        """The end of each history: the five properties."""
        self.calm_down(choose)
        nothing_waits_for_ever(self)
        for client in self.ids("c"):
            asked = [state for state in self.held[client] if choose.random() < 0.8]
            self.minds[client].stimulus_ask(asked)
            self.flush(client)
        self.calm_down(choose)
        nothing_waits_for_ever(self)
        every_future_tells_the_truth(self)
        no_task_runs_in_vain(self)
        for client in self.ids("c"):
            for state in list(self.held[client]):
                self.release(client, state)
        self.calm_down(choose)
        nothing_is_left_behind(self)
        self.seen["stolen"] += self.minds[SCHEDULER].stolen
        for mind in self.minds.values():
            self.remember_edges(mind)


def pick_from(options, pick):
    """One of the options, in a list; or none, if there are none."""
    return [options[pick % len(options)]] if options else []


def value_of_call(n, values):
    """The value of call ``n``: it shows which call was made with which values."""
    return hash((n, *values))


def expected(cluster, key):
    """What plain sequential Python gives, and which exceptions may be seen.

    The value is None if the call raises, or (a string) cannot be pickled: then it is of use on
    the worker that has it, and only there.
    """
    call = cluster.calls[key]
    outcomes = [expected(cluster, i) for i in call.inputs]
    values = [value for value, _ in outcomes]
    exceptions = {exception for _, some in outcomes for exception in some}
    if call.fails == "always" or (call.fails == "at first" and not call.retries):
        exceptions.add(b"error %d" % call.n)
    if call.fails in ("always", "kills its worker") or None in values:
        return None, exceptions
    value = value_of_call(call.n, values)
    if call.name == "unpicklable":
        value = f"cannot pickle {value}"
        exceptions.add(value.encode())
    return value, exceptions


# The properties of every history.


def nothing_waits_for_ever(cluster):
    for client in cluster.ids("c"):
        for state in cluster.held[client]:
            assert state.status != "pending", state
            assert bool(state.value) or state.status != "finished" or not state.asked, state
            assert cluster.known.get(state, ("cancelled", ())) == (state.status, state.value), state


def every_future_tells_the_truth(cluster):
    for client in cluster.ids("c"):
        for state in cluster.held[client]:
            value, exceptions = expected(cluster, state.key)
            lineage = cluster.lineage(state.key)
            if state.status == "cancelled":
                by_user = any({(client, k), ("anybody", k)} & cluster.cancelled for k in lineage)
                data = [key for key in lineage if cluster.calls[key].name == "data"]
                lost = any(f"the data {key!r}" in state.text for key in data)
                excused = cluster.seen["faults"] or cluster.seen["leaving"]
                assert (excused and (lost or data)) or (by_user and "cancelled" in state.text), (
                    state
                )
            elif state.type == "KilledWorker":
                assert any(cluster.deaths[key] > ALLOWED_FAILURES for key in lineage), state
            elif state.text:
                # Only links that failed, again and again, excuse a task that did not.
                assert "fetch" in state.text and cluster.seen["faults"] > 0, state
            elif state.status == "error":
                assert state.exception[0] in exceptions, state
            else:
                assert value is not None, state
                assert not state.value or state.value == (b"%d" % value,), state


def no_task_runs_in_vain(cluster):
    for key, runs in cluster.runs.items():
        call = cluster.calls[key]
        allowed = cluster.wanted[key] * (1 + call.retries) + cluster.seen["faults"]
        assert runs <= allowed + cluster.seen["leaving"], key
    for key in cluster.forgotten_futures:
        lineage = cluster.lineage(key)
        excused = any(call.fails != "never" for call in map(cluster.calls.get, lineage))
        excused = excused or any(k == key for _, k in cluster.cancelled for key in lineage)
        data = any(cluster.calls[k].name == "data" for k in lineage)
        excused = excused or data or cluster.seen["clients vanished"] or cluster.seen["faults"]
        assert cluster.runs[key] or excused or cluster.seen["calls changed"], key


def nothing_is_left_behind(cluster):
    for id, mind in cluster.minds.items():
        if id == SCHEDULER:
            assert not mind.tasks and not mind.queue and not mind.unrunnable and not mind.crowded
            assert not any(cs.wants_what for cs in [*mind.clients.values(), mind.keeper])
            workers = mind.workers.values()
            assert not any(ws.processing or ws.has_what or ws.arriving for ws in workers)
            assert set(mind.workers) == set(cluster.ids("w"))
            assert set(mind.clients) == set(cluster.ids("c"))
        else:
            assert not mind.wanted and not mind.asked
        if id[0] == "w":
            assert not mind.data and not mind.attempts and not mind.needed_by and not mind.ready
            assert not cluster.stores[id] and not cluster.running[id]
        if id[0] == "c":
            assert not mind.futures


ACTS = ["a_client_submits", "a_client_submits_a_known_call", "a_client_releases", "a_client_asks"]
ACTS += ["a_user_changes_a_call", "a_client_scatters", "a_client_cancels", "a_client_retries"]
ACTS += ["a_client_fires_and_forgets"]
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
            self.cluster.something_moves(pick)

    def teardown(self):
        if hasattr(self, "cluster"):
            self.cluster.ask_for_everything_and_let_go(random.Random(0))


def rule_for(act):
    """The rule named ``act``: it happens in the histories in which it is switched on."""

    def happens(self, pick):
        getattr(self.cluster, act)(pick)

    happens.__name__ = act
    switched_on = precondition(lambda self: act in getattr(self, "switched_on", ()))
    return switched_on(rule(pick=PICKS)(happens))


for act in [*ACTS, *FAULTS]:
    setattr(AnyHistory, act, rule_for(act))

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


def a_deep_history(seed, steps=300):
    """A longer history than hypothesis makes, from a seed; its own weights for what happens."""
    choose = random.Random(seed)
    cluster = Cluster(workers=choose.randint(0, 3), clients=choose.randint(1, 2))
    weights = {act: choose.choice([0, 0.5, 1, 2]) for act in ACTS} | {"a_client_submits": 3}
    weights |= {fault: choose.choice([0, 0, 0, 0.5, 2]) for fault in FAULTS}
    weights["something_moves"] = choose.choice([5, 20, 60])
    if seed % 5 == 0:  # A history of broken links: values are there, and cannot be had.
        weights |= dict.fromkeys(FAULTS, 0) | {"a_data_link_fails": 6, "a_client_asks": 6}
    for act in choose.choices(list(weights), list(weights.values()), k=steps):
        getattr(cluster, act)(choose.randrange(10**6))
    cluster.ask_for_everything_and_let_go(choose)
    return cluster


@cache
def deep_histories():
    """What a few hundred of them reached: (how often things happened, edges taken)."""
    seen, edges = Counter(), set()
    for seed in range(300):
        cluster = a_deep_history(seed)
        seen += cluster.seen
        seen["computed again"] += sum(cluster.runs.values()) > len(cluster.runs)
        edges |= cluster.edges
    return seen, edges


def test_deep_histories_reach_what_is_rare():
    seen, _ = deep_histories()
    for what in ["transfers", "key-lost", "task-returned", "free-keys", "clients vanished"]:
        assert seen[what] > 20, what
    for what in ["fetch-missed", "computed again", "lost while running", "key-erred", "abandoned"]:
        assert seen[what] > 20, what
    for what in ["scattered", "put-data", "copies", "retried"]:
        assert seen[what] > 20, what
    assert seen["cancelled while running"] > 5 and seen["stolen"] > 5
    for what in ["killed by a task", "silent for too long", "said good-bye", "put-failed"]:
        assert seen[what] > 20, what
    for what in ["fire-and-forget", "returned as late", "give-back", "key-cancelled"]:
        assert seen[what] > 20, what


@pytest.mark.parametrize("mind", [SchedulerMind, WorkerMind])
def test_every_edge_in_the_table_is_taken_by_some_history(mind):
    _, edges = deep_histories()
    assert {(start, finish) for kind, start, finish in edges if kind is mind} == set(
        mind.TRANSITIONS
    )


# Planted bugs: a simulation that finds nothing proves nothing, unless it finds these.

PLANTED = [  # (method, the line as it is, the line as planted)
    # A stale message is believed.
    (ClientMind.current, "state.want != want", "False"),
    # An abandoned attempt is adopted by a later want.
    (
        SchedulerMind.end_attempt,
        "current = ts.attempt == attempt",
        "ts = self.tasks.get(ts.key, ts); current = ts.state == 'processing'",
    ),
    # A wake-up is forgotten.
    (SchedulerMind.enter_memory, "self.mark(dependent)", "pass"),
    (SchedulerMind.stimulus_register_worker, "self.mark(ts)", "pass"),
    # A value is freed never, or known on one side only.
    (
        SchedulerMind.leave_memory,
        'self.send_name(ws.id, "free-keys", (ts.key, ts.attempt))',
        "pass",
    ),
    (SchedulerMind.add_replica, 'link(ts, "who_has", ws, "has_what")', "ts.who_has = {ws: None}"),
    # An innocent task is blamed.
    (SchedulerMind.suspect, "if blamed:", "if True:"),
    # A cancel, a retry or lost data does not reach whoever depends on it.
    (SchedulerMind.cancel, "found += more", "pass"),
    (SchedulerMind.stimulus_retry, "self.mark(each)", "pass"),
    # A miss, or a put that failed, is not reported, or not acted upon.
    (SchedulerMind.stimulus_fetch_missed, "self.strike(ts, holders)", "pass"),
    (WorkerMind.missed, "in self.needed_by.get(name, ())", "in ()"),
    (SchedulerMind.stimulus_put_failed, "self.end_arrival(ts, attempt)", "pass"),
    (SchedulerMind.let_go, "self.end_arrival(ts, ts.attempt)", "pass"),
]


def plant(monkeypatch, method, line, planted):
    """Replace a line, which must stand once in the method's source."""
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(line) == 1, source
    namespace = dict(vars(minidist))
    exec(source.replace(line, planted), namespace)
    kind = getattr(minidist, method.__qualname__.partition(".")[0])
    monkeypatch.setattr(kind, method.__name__, namespace[method.__name__])


@pytest.mark.parametrize(
    "method, line, planted", PLANTED, ids=[method.__qualname__ for method, _, _ in PLANTED]
)
def test_a_planted_bug_is_found(method, line, planted, monkeypatch):
    """By the five properties alone, without the minds' own invariants."""
    plant(monkeypatch, method, line, planted)
    for kind in (SchedulerMind, WorkerMind, ClientMind):
        monkeypatch.setattr(kind, "validate", lambda self: None)
    with pytest.raises((AssertionError, KeyError, AttributeError)):
        for seed in range(150):
            a_deep_history(seed)


# ---- 5. Wire ----

keys = st.text() | st.recursive(
    st.tuples(st.text() | st.integers()),
    lambda key: st.lists(st.text() | key, min_size=1, max_size=3).map(tuple),
    max_leaves=5,
)
few = functools.partial(st.lists, max_size=3)


def of_kind(kind):
    """The values of a kind of field."""
    if isinstance(kind, list):
        return few(of_kind(kind[0]))
    if isinstance(kind, tuple):
        return st.tuples(*map(of_kind, kind))
    if kind is minidist.to_frames:
        return few(st.binary(max_size=200)).map(tuple)
    if kind is minidist.anything:
        return st.integers() | few(st.text())
    return keys if kind is minidist.to_key else st.from_type(kind)


senders = ["client", "worker", "scheduler", "holder"]


@st.composite
def some_batches(draw):
    """(who sends them, batches of any messages that it may send)."""
    sender = draw(st.sampled_from(senders))
    messages = []
    for op, (some, names, _) in minidist.OPS.items():
        if sender in some:
            values = [of_kind(minidist.FIELDS[name]) for name in names[1:]]
            made = st.tuples(st.just(op), *values)
            messages.append(made.map(lambda values, names=names: dict(zip(names, values))))
    return sender, draw(few(few(st.one_of(messages))))


def read(pieces, sender, count=1):
    """What ``read_batch`` makes of a stream that arrives in pieces and then ends."""

    async def feed():
        reader = asyncio.StreamReader()

        async def read_all():
            return [await read_batch(reader, sender) for _ in range(count)]

        reading = asyncio.ensure_future(read_all())
        for piece in pieces:
            reader.feed_data(piece)
            await asyncio.sleep(0)
        reader.feed_eof()
        return await reading

    return asyncio.run(feed())


@settings(deadline=None)
@given(some_batches(), st.lists(st.integers(min_value=0)))
def test_batches_arrive_as_they_were_sent_however_the_bytes_are_split(sent_batches, cuts):
    sender, batches = sent_batches
    stream = b"".join(b"".join(pack(batch)) for batch in batches)
    places = [0, *sorted({cut % (len(stream) + 1) for cut in cuts}), len(stream)]
    pieces = [stream[i:j] for i, j in zip(places, places[1:], strict=False)]
    assert read(pieces, sender, len(batches)) == batches


@settings(deadline=None)
@given(some_batches(), st.integers(min_value=0))
def test_a_stream_that_ends_within_a_batch_is_incomplete(sent_batches, cut):
    sender, batches = sent_batches
    stream = b"".join(pack(batches[0] if batches else []))
    with pytest.raises(asyncio.IncompleteReadError):
        read([stream[: cut % len(stream)]], sender)


anything_in_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([*MESSAGES]),
    lambda some: st.lists(some) | st.dictionaries(st.text() | st.sampled_from(["op", "key"]), some),
)


@settings(deadline=None)
@given(anything_in_json.map(lambda garbage: json.dumps(garbage).encode()) | st.binary())
def test_garbage_is_a_protocol_error_and_nothing_else(header):
    with contextlib.suppress(ProtocolError):
        assert read([minidist.PREFIX.pack(len(header), 0), header], "client") == [[]]


@settings(deadline=None)
@given(some_batches(), st.data())
def test_a_field_of_another_kind_is_a_protocol_error_and_nothing_else(sent_batches, data):
    sender, batches = sent_batches
    assume(batches and batches[0])
    message = batches[0][0]
    message[data.draw(st.sampled_from([*message]))] = data.draw(anything_in_json)
    with contextlib.suppress(ProtocolError):
        ((got, *_),) = read(pack(batches[0]), sender)
        hash(got.get("key"))


def test_a_frame_that_messages_share_travels_once():
    function = bytes(10_000)
    message = {"op": "warning", "text": (function, b"arguments")}
    assert sum(map(len, pack([message] * 100))) < 20_000


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

GATES = [threading.Event() for _ in range(4)]
RUNS = []  # what ran: the workers of these tests are in this process


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


CANNOT_UNPICKLE = """
import _pickle, argparse, marshal, pickle, sys
import gettext, locale, shutil  # argparse imports them late, and imports need marshal
import minidist

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


@contextlib.contextmanager
def process(*arguments, cwd=ROOT, **env):
    """A Python process with piped output, killed at the end if it still runs."""
    command, env = [sys.executable, *map(str, arguments)], {**os.environ, **env}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=cwd, env=env) as p:
        try:
            yield p
        finally:
            p.kill()


def address_of(p):
    """The address that a scheduler's or worker's process prints as soon as it is ready."""
    return re.search(r"tcp://\S+", p.stdout.readline())[0]


SCHEDULERS = ["in this process", "that cannot unpickle"]


async def run_on(kind, test):
    """Run ``await test(c, a, b)`` on a cluster with two workers, ``a`` with two threads."""
    async with contextlib.AsyncExitStack() as stack:
        if kind == "in this process":
            address = (await stack.enter_async_context(minidist.Scheduler())).address
        else:
            address = address_of(stack.enter_context(process("-c", CANNOT_UNPICKLE)))
        async with (
            Worker(address, nthreads=2, name="a") as a,
            Worker(address, nthreads=1, name="b") as b,
            Client(address, asynchronous=True) as c,
        ):
            await asyncio.wait_for(test(c, a, b), 30)


def on_cluster(test):
    """Make a test of ``async def test(c, a, b)``, for each kind of scheduler."""

    @pytest.mark.parametrize("kind", SCHEDULERS)
    def run(kind):
        asyncio.run(run_on(kind, test))

    run.__name__ = test.__name__
    return run


@on_cluster
async def test_submit_calls_a_function_with_its_arguments(c, a, b):
    assert await c.submit(pow, 2, exp=5) == 32
    assert await c.submit(lambda: "by value").result() == "by value"


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
async def test_equal_pure_calls_run_once_while_the_first_future_lives(c, a, b):
    first, second = c.submit(through, 0, "x"), c.submit(through, 0, "x")
    GATES[0].set()
    assert await c.gather([first, second]) == ["x", "x"]
    assert RUNS == ["x"]
    first.release()
    assert await c.submit(through, 0, "x") == "x" and RUNS == ["x"]


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
async def test_an_exception_comes_back_as_itself_with_the_frames_of_the_worker(c, a, b):
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


@on_cluster
async def test_a_lost_result_is_computed_again(c, a, b):
    GATES[0].set()
    futures = c.map(through, [0] * 20, range(20))
    await wait(futures)
    await b.close()
    assert await c.gather(futures) == list(range(20))


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

    asyncio.run(run_on(kind, graph))


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


# ---- 12. Command line and processes ----


@pytest.fixture
def scheduler():
    """A scheduler's process with its ``address``."""
    with process(SCRIPT, "scheduler", "--port", 0) as p:
        p.address = address_of(p)
        yield p


@pytest.fixture
def listener():
    """A socket for tasks to call: then the test knows which worker runs them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)
        yield listener


def call_home(port, value):
    """A task in another process that tells its pid to the test, and waits to be hung up on."""
    with socket.create_connection(("127.0.0.1", port)) as home:
        home.sendall(os.getpid().to_bytes(8, "big"))
        home.recv(1)
    return value


def test_the_synchronous_client_computes_on_processes(scheduler):
    with process(SCRIPT, "worker", scheduler.address.removeprefix("tcp://"), "--nthreads", 2):
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


def test_a_killed_worker_costs_time_but_no_result(scheduler, listener):
    port = listener.getsockname()[1]
    worker = [SCRIPT, "worker", scheduler.address, "--nthreads", 1]
    with process(*worker) as p, process(*worker) as q, Client(scheduler.address) as c:
        address_of(p), address_of(q)
        early = c.map(pow, range(50), [2] * 50)
        wait(early)
        total = c.submit(sum, [c.submit(call_home, port, 1000), *early])
        running, _ = listener.accept()
        pid = int.from_bytes(running.recv(8), "big")
        os.kill(pid, signal.SIGKILL)
        again, _ = listener.accept()  # The task runs on the other worker.
        assert int.from_bytes(again.recv(8), "big") in {p.pid, q.pid} - {pid}
        running.close(), again.close()
        assert total.result(30) == 1000 + sum(n * n for n in range(50))
        assert c.gather(early) == [n * n for n in range(50)]
