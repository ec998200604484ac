"""Transcripts of the scheduler's mind for which the textbook has no room: one for each mechanism."""

import inspect
import json
import math
import sys
from itertools import cycle

import pytest

from minidist import (
    ALLOWED_FAILURES,
    BYTES_PER_US,
    LIMITS,
    MESSAGES,
    OPS,
    ROOM_US,
    SCHEDULER,
    TRANSFER_US,
    ClientMind,
    ProtocolError,
    SchedulerMind,
    WorkerMind,
    check_message,
)
from test_minidist import Scheduler, sent


def told(s, peer, op):
    """The messages of one kind that a peer was sent since last asked."""
    return [fields for to, what, fields in sent(s) if (to, what) == (peer, op)]


def scatter(s, key="d", want=1, client="c", workers=(), broadcast=False):
    """Scatter, as far as the scheduler's question to the client; returns (worker, attempt)."""
    s.stimulus_scatter(client, key, want, 8, "int", list(workers), broadcast)
    (put,) = [f for peer, op, f in sent(s) if op == "put"]
    return put["worker"], put["attempt"]


def scattered(s, *args, **kwargs):
    worker, attempt = scatter(s, *args, **kwargs)
    s.stimulus_add_keys(worker, [("d", attempt)])
    return worker, attempt


def test_data_is_in_memory_when_its_worker_says_so():
    s = Scheduler("w")
    worker, attempt = scatter(s)
    assert (worker, s.states()) == ("w", {"d": "processing"})
    assert not s.workers["w"].processing, "it takes no thread"
    s.stimulus_add_keys("w", [("d", attempt)])
    (news,) = told(s, "c", "key-in-memory")
    assert (news["holders"], news["nbytes"], s.states()) == (["w"], 8, {"d": "memory"})


def test_data_under_the_key_of_a_call_is_that_calls_result():
    s = Scheduler("w", clients="ce")
    s.submit("d", client="e")
    sent(s)
    s.stimulus_scatter("c", "d", 1, 8, "int", [], False)
    assert "'d' is known as a call" in told(s, "c", "warning")[0]["text"]
    s.finish("d")
    assert told(s, "c", "key-in-memory") and s.tasks["d"].run_spec


def test_data_that_could_not_be_put_goes_elsewhere_but_not_for_ever():
    s = Scheduler("v", "w")
    worker, attempt = scatter(s)
    for _ in range(ALLOWED_FAILURES):
        s.stimulus_put_failed("c", "d", attempt)
        (put,) = told(s, "c", "put")
        assert put["worker"] != worker
        worker, attempt = put["worker"], put["attempt"]
    s.stimulus_put_failed("c", "d", attempt)
    (cancelled,) = told(s, "c", "key-cancelled")
    assert "the data 'd' could not be put on any worker" in cancelled["text"]
    assert s.states() == {}


def test_of_two_clients_that_scatter_the_same_the_second_gives_it_if_the_first_lets_go():
    s = Scheduler("w", clients="ce")
    _, attempt = scatter(s, client="c")
    s.stimulus_scatter("e", "d", 1, 8, "int", [], False)
    sent(s)
    s.release("d", client="c")
    (put,) = told(s, "e", "put")
    s.stimulus_add_keys("w", [("d", attempt)])
    assert told(s, "w", "free-keys"), "what the first one has put all the same is stale"
    s.stimulus_add_keys("w", [("d", put["attempt"])])
    assert s.states() == {"d": "memory"}


def test_a_broadcast_is_over_when_each_worker_has_it_or_is_gone():
    s = Scheduler("u", "v", "w")
    worker, attempt = scatter(s, broadcast=True)
    s.stimulus_add_keys(worker, [("d", attempt)])
    said = sent(s)
    ((one, copy),) = [(peer, f) for peer, op, f in said if op == "compute-task"]
    assert copy["order"] == s.tasks["d"].priority and not [op for _, op, _ in said if "key" in op]
    s.stimulus_add_keys(one, [("d", attempt)])
    s.stimulus_task_returned(one, copy["attempt"], [])
    ((other, copy),) = [(peer, f) for peer, op, f in sent(s) if op == "compute-task"]
    assert copy["places"] == [("d", attempt, [one, worker])], "who has got it gives it further"
    s.stimulus_worker_left(other)
    (news,) = told(s, "c", "key-in-memory")
    assert {one, other, worker} == {*"uvw"} and {*news["holders"]} == {one, worker}


def test_data_that_is_on_two_workers_is_given_up_where_another_could_not_fetch_it():
    s = Scheduler("u", "v", "w")
    worker, attempt = scattered(s)
    other, third = {"u", "v", "w"} - {worker}
    s.stimulus_add_keys(other, [("d", attempt)])
    s.submit("y", "d", workers=[third])
    sent(s)
    s.stimulus_task_returned(third, s.tasks["y"].attempt, [("d", attempt, [worker])])
    assert told(s, worker, "free-keys") == [{"names": [("d", attempt)]}]
    assert [ws.id for ws in s.tasks["d"].who_has] == [other]


def test_what_runs_with_data_that_was_lost_is_cancelled_and_goes_on_in_vain():
    s = Scheduler("v", "w")
    worker, _ = scattered(s)
    s.submit("blocks", workers=[worker], want=2), s.submit("y", "d", workers=["v", "w"], want=3)
    (other,) = {"v", "w"} - {worker}
    assert s.tasks["y"].processing_on.id == other
    sent(s)
    s.stimulus_worker_left(worker)
    assert [f["key"] for f in told(s, "c", "key-cancelled")] == ["d", "y"]
    assert "y" not in s.states() and len(s.workers[other].processing) == 1


def test_a_broadcast_of_what_is_in_memory_copies_it_too():
    s = Scheduler("v", "w")
    holder, attempt = scatter(s)
    s.stimulus_add_keys(holder, [("d", attempt)])
    sent(s)
    s.stimulus_scatter("c", "d", 2, 8, "int", [], True)
    ((copier, op, fields),) = sent(s)
    assert (copier != holder, op, fields["places"]) == (
        True,
        "compute-task",
        [("d", attempt, [holder])],
    )


def test_a_broadcast_needs_few_rounds_since_each_copy_makes_the_next_ones():
    s = Scheduler(*(f"w{n}" for n in range(32)))
    _, attempt = scattered(s, broadcast=True)
    rounds = []
    while copies := [(peer, f["attempt"]) for peer, op, f in sent(s) if op == "compute-task"]:
        rounds.append(len(copies))
        for worker, copy in copies:
            s.stimulus_add_keys(worker, [("d", attempt)])
        for worker, copy in copies:
            s.stimulus_task_returned(worker, copy, [])
    assert rounds == [1, 2, 4, 8, 16] and len(s.tasks["d"].who_has) == 32


def test_a_broadcast_of_data_that_is_tied_to_some_workers_reaches_those():
    s = Scheduler("u", "v", "w")
    worker, attempt = scattered(s, workers=["u", "w"], broadcast=True)
    ((copied, _),) = s.computing()
    assert {worker, copied} == {"u", "w"}


def test_a_broadcast_ends_with_the_value_and_passes_by_who_has_left_or_fetched_it_meanwhile():
    s = Scheduler(*"uvwxy")
    worker, attempt = scattered(s, broadcast=True)
    ((one, copy),) = [(peer, f["attempt"]) for peer, op, f in sent(s) if op == "compute-task"]
    fetched, left, last = [id for id in s.workers if id not in (worker, one)]
    s.stimulus_add_keys(fetched, [("d", attempt)])
    s.stimulus_leave(left)
    sent(s)
    s.stimulus_task_returned(one, copy, [])
    assert s.computing() == [(last, "d")]
    s.stimulus_worker_left(fetched)
    s.stimulus_worker_left(worker)
    s.validate()
    assert not s.tasks.get("d")


def test_those_who_fetch_ask_one_holder_after_the_other():
    s = Scheduler("v", "w", "x", nthreads=3)
    _, attempt = scattered(s, broadcast=True)
    while copies := [(peer, f["attempt"]) for peer, op, f in sent(s) if op == "compute-task"]:
        for worker, copy in copies:
            s.stimulus_add_keys(worker, [("d", attempt)])
            s.stimulus_task_returned(worker, copy, [])
    s.stimulus_register_worker("y", "y", 9, [], [])
    first = []
    for n in range(6):
        s.submit(f"t{n}", "d", workers=["y"])
        (task,) = told(s, "y", "compute-task")
        first.append(task["places"][0][2][0])
    assert sorted(first) == [*"vvwwxx"]


def test_the_values_of_a_worker_that_leaves_are_shared_out_among_those_that_stay():
    s = Scheduler("u")
    for n in range(6):
        s.submit(f"t{n}")
        s.finish(f"t{n}")
    for worker in "vwx":
        s.stimulus_register_worker(worker, worker, 1, [], [])
    sent(s)
    s.stimulus_leave("u")
    assert sorted(worker for worker, _ in s.computing()) == [*"vvwwxx"]


def test_lost_data_cancels_what_was_still_to_be_made_from_it_and_says_which():
    s = Scheduler("w")
    scattered(s)
    s.submit("done", "d")
    s.finish("done")
    s.stimulus_register_worker("v", "v", 1, [], [])
    s.stimulus_add_keys("v", [("done", s.tasks["done"].attempt)])
    s.submit("running", "d")
    sent(s)
    s.stimulus_worker_left("w", "exit code 3")
    lost = {f["key"]: f["text"] for _, op, f in sent(s) if op == "key-cancelled"}
    assert set(lost) == {"d", "running"} and s.states() == {"done": "memory"}
    assert all("the data 'd' was lost with w (name of w): exit code 3" in t for t in lost.values())


def test_what_was_made_from_data_that_was_let_go_becomes_data_and_remembers_why():
    s = Scheduler("w")
    scattered(s)
    s.submit("y", "d")
    s.finish("y")
    s.release("d")
    assert s.states() == {"y": "memory"} and s.tasks["y"].run_spec == ()
    sent(s)
    s.submit("y", want=2)
    assert [op for _, op, _ in sent(s)] == ["key-in-memory"], "and no warning of another call"
    s.stimulus_worker_left("w")
    (cancelled,) = told(s, "c", "key-cancelled")
    assert "it was made from 'd', which was let go" in cancelled["text"]


def test_the_only_copy_of_data_is_kept_though_it_was_missed_and_draws_the_task_there():
    s = Scheduler("v", "w")
    holder, attempt = scattered(s)
    other = "v" if holder == "w" else "w"
    s.submit("y", "d", workers=[f"name of {other}"])
    y = s.tasks["y"]
    assert y.processing_on.id == other
    s.stimulus_task_returned(other, y.attempt, [("d", attempt, [holder])])
    assert y.processing_on.id == holder, "restrictions or not"


def test_a_client_that_cannot_reach_the_only_copy_is_told_so_when_its_holder_is_known_to_live():
    s = Scheduler("w")
    _, attempt = scattered(s)
    for _ in range(2 * ALLOWED_FAILURES):
        sent(s)
        s.stimulus_fetch_missed("c", "d", 1, attempt, ["w"], True)
        ((peer, op, copy),) = sent(s)
        assert (peer, op) == ("w", "compute-task"), "it holds that: so it gives it back at once"
        s.stimulus_task_returned("w", copy["attempt"], [])
        assert [f["holders"] for f in told(s, "c", "key-in-memory")] == [["w"]]


def test_a_client_that_cannot_reach_the_only_copy_is_told_of_the_loss_when_its_holder_was_dead():
    s = Scheduler("v", "w")
    holder, attempt = scattered(s)
    other = "v" if holder == "w" else "w"
    s.stimulus_fetch_missed("c", "d", 1, attempt, [holder], True)
    (copy,) = told(s, other, "compute-task")
    s.stimulus_task_returned(other, copy["attempt"], [("d", attempt, [holder])])
    assert sent(s) == [], "perhaps the holder is dead: then it is the data that is lost"
    s.stimulus_worker_left(holder)
    (cancelled,) = told(s, "c", "key-cancelled")
    assert f"the data 'd' was lost with {holder}" in cancelled["text"]


def test_what_could_not_be_fetched_is_told_as_soon_as_there_is_a_copy_elsewhere():
    s = Scheduler("w", clients="ce")
    _, attempt = scattered(s)
    s.stimulus_register_worker("v", "v", 1, [], [])
    sent(s)
    s.stimulus_fetch_missed("c", "d", 1, attempt, ["w"], True)
    copies = {peer: f["attempt"] for peer, op, f in sent(s) if op == "compute-task"}
    s.stimulus_fetch_missed("e", "d", 1, attempt, ["w"], True)
    s.stimulus_task_returned("w", copies["w"], [])
    assert sent(s) == [], "it does not want it; and the copy at the other may still come"
    s.stimulus_add_keys("v", [("d", attempt)])
    s.stimulus_task_returned("v", copies["v"], [])
    assert [f["holders"] for f in told(s, "c", "key-in-memory")] == [["v", "w"]]
    assert not s.tasks["d"].stuck


def test_a_copy_that_comes_back_from_a_holder_that_was_struck_meanwhile_says_nothing_of_others():
    s = Scheduler("w")
    _, attempt = scattered(s)
    s.stimulus_register_worker("v", "v", 1, [], [])
    s.submit("y", "d", workers=["v"])
    sent(s)
    s.stimulus_fetch_missed("c", "d", 1, attempt, ["w"], True)
    copies = {peer: f["attempt"] for peer, op, f in sent(s) if op == "compute-task"}
    s.stimulus_add_keys("v", [("d", attempt)])
    s.stimulus_task_returned("v", copies["v"], [])
    s.stimulus_task_returned("v", s.tasks["y"].attempt, [("d", attempt, ["w"])])
    s.stimulus_task_returned("w", copies["w"], [])  # It was there when it was asked to copy it.
    s.release("y")
    sent(s)
    s.stimulus_leave("v")
    ((peer, op, copy),) = sent(s)
    assert (peer, op, copy["name"]) == ("w", "compute-task", "copy"), "it is handed over"


def test_a_retry_forgets_how_often_inputs_were_missed():
    s = Scheduler("w")
    s.submit("i")
    miss = ("i", s.finish("i")[1], ["elsewhere"])
    s.submit("x", "i")
    for want in (2, 3):
        for _ in range(ALLOWED_FAILURES):
            s.stimulus_task_returned("w", s.tasks["x"].attempt, [miss])
            assert s.states() == {"i": "memory", "x": "processing"}
        s.stimulus_task_returned("w", s.tasks["x"].attempt, [miss])
        assert s.states() == {"i": "memory", "x": "erred"}
        s.stimulus_retry("c", "x", want)


def test_a_miss_of_a_value_that_was_lost_meanwhile_is_no_news():
    s = Scheduler("w")
    s.submit("x")
    for _ in range(ALLOWED_FAILURES + 1):
        s.stimulus_task_returned("w", s.tasks["x"].attempt, [("gone", 1, ["v"])])
    assert s.states() == {"x": "processing"}, "its holders died: no link was at fault"


def test_two_that_leave_together_hand_over_to_one_that_stays():
    s = Scheduler("u", "v")
    s.submit("x", workers=["name of u"])
    _, number = s.finish("x")
    s.stimulus_leave("u")
    assert told(s, "v", "compute-task"), "a copy"
    s.stimulus_register_worker("w", "w", 1, [], [])
    s.stimulus_leave("v")
    said = sent(s)
    assert [peer for peer, op, _ in said if op == "goodbye"] == ["v"]
    ((peer, copy),) = [(peer, fields) for peer, op, fields in said if op == "compute-task"]
    assert (peer, copy["name"]) == ("w", "copy")
    s.stimulus_add_keys("w", [("x", number)])
    s.stimulus_task_returned("w", copy["attempt"], [])
    assert told(s, "u", "goodbye") and list(s.workers) == ["w"]
    assert s.states() == {"x": "memory"}


def test_what_crosses_the_loss_of_data_is_told_which_data_was_lost():
    s = Scheduler("w")
    scattered(s)
    s.submit("x", "d")
    s.stimulus_worker_left("w", "exit code 3")
    s.submit("y", "d")
    s.submit("z", "x")
    s.submit("zz", "z")
    s.stimulus_retry("c", "x", 2)
    for cancelled in (news := told(s, "c", "key-cancelled")):
        assert cancelled["text"] == "the data 'd' was lost with w (name of w): exit code 3"
    assert [cancelled["key"] for cancelled in news] == ["d", "x", "y", "z", "zz", "x"]


def test_what_crosses_a_cancel_is_told_who_cancelled_what():
    s = Scheduler(clients=("c", "other"))
    for client in ("c", "other"):
        s.submit("x", client=client)
    s.stimulus_cancel_keys("other", [("x", 1)], True)
    s.submit("y", "x")
    told_why = [cancelled["text"] for cancelled in told(s, "c", "key-cancelled")]
    assert told_why == ["'x' was cancelled by other"] * 2


def test_what_is_made_from_a_cancelled_value_that_is_here_is_told_why_that_was_cancelled():
    client = ClientMind()
    x = client.stimulus_submit("x", "inc", (b"x",), [], 0)
    client.stimulus_key_in_memory("scheduler", "x", x.want, 5, 8, "int", ["w"], (b"42",))
    client.stimulus_key_cancelled("scheduler", "x", x.want, "the data 'd' was lost")
    y = client.stimulus_submit("y", "inc", (b"y",), [x], 0)
    assert (x.status, x.value) == ("finished", (b"42",))
    words = "its input 'x' was cancelled: the data 'd' was lost"
    assert (y.status, y.text) == ("cancelled", words)


def test_many_that_leave_are_let_go_in_one_moment():
    many = [f"w{number}" for number in range(sys.getrecursionlimit())]
    s = Scheduler(*many)
    for number, worker in enumerate(many):
        s.submit(f"x{number}")
        s.finish(f"x{number}")
    s.stimulus_register_worker("stays", "stays", 1, [], [])
    for worker in many:
        s.stimulus_leave(worker)
    assert len(s.workers) == len(many) + 1, "what they hold is being copied"
    s.stimulus_worker_left("stays")
    assert not s.workers


def test_a_cancel_takes_dependents_along_and_leaves_alone_what_another_client_wants():
    s = Scheduler("w", clients="ce")
    s.submit("x")
    s.submit("y", "x")
    s.submit("x", client="e")
    sent(s)
    s.stimulus_cancel_keys("c", [("x", 1)], False)
    said = sent(s)
    assert {f["key"] for peer, op, f in said if (peer, op) == ("c", "key-cancelled")} == {"x", "y"}
    assert s.states() == {"x": "processing"}
    s.stimulus_cancel_keys("e", [("x", 1)], True)
    assert told(s, "w", "give-back") and s.states() == {}


def test_a_retry_runs_failed_inputs_and_what_failed_because_of_them_again():
    s = Scheduler("w")
    for key, *inputs in ["x", "yx", "zx"]:
        s.submit(key, *inputs)
    s.stimulus_task_erred("w", 1, (b"boom",))
    assert set(s.states().values()) == {"erred"}
    sent(s)
    s.stimulus_retry("c", "y", 2)
    retried = {(f["key"], f["want"]) for f in told(s, "c", "key-retried")}
    assert retried == {("x", 1), ("y", 2), ("z", 1)}
    assert s.states() == {"x": "processing", "y": "waiting", "z": "waiting"}
    s.finish("x")
    s.finish("y")
    assert {(f["key"], f["want"]) for f in told(s, "c", "key-in-memory")} == {("x", 1), ("y", 2)}


def test_a_retry_leaves_alone_what_failed_on_its_own_beside_its_inputs():
    s = Scheduler("w", nthreads=2)
    for key, *inputs in ["c", "d", "ad", "bcd", "xcd"]:
        s.submit(key, *inputs)
    for key in "dc":
        s.stimulus_task_erred("w", s.tasks[key].attempt, (b"boom of %s" % key.encode(),))
    sent(s)
    s.stimulus_retry("c", "a", 2)
    assert s.states() == {"c": "erred", "d": "processing", "a": "waiting"} | dict.fromkeys(
        "bx", "erred"
    )
    assert {f["exception"] for f in told(s, "c", "key-erred")} == {(b"boom of c",)}


def test_a_retry_of_what_is_not_wanted_any_more_is_answered_under_its_own_number():
    s = Scheduler("w")
    s.stimulus_retry("c", "x", 7)
    assert [f["want"] for f in told(s, "c", "key-cancelled")] == [7]


def test_a_task_may_raise_as_often_as_it_has_retries():
    s = Scheduler("w")
    s.submit("x", retries=2)
    for _ in range(2):
        s.stimulus_task_erred("w", s.tasks["x"].attempt, (b"boom",))
        assert s.states() == {"x": "processing"}
    s.stimulus_task_erred("w", s.tasks["x"].attempt, (b"boom",))
    assert s.states() == {"x": "erred"}


def test_a_task_that_no_worker_may_run_waits_with_a_warning_until_one_so_called_joins():
    s = Scheduler("w")
    s.submit("x", workers=["nobody"])
    s.submit("loose", workers=["nobody"], loose=True)
    (warning,) = told(s, "c", "warning")
    assert "'x' waits: there is no worker called nobody" in warning["text"]
    assert s.states() == {"x": "no-worker", "loose": "processing"}
    s.stimulus_register_worker("tcp://1.2.3.4:5#v", "nobody", 1, [], [])
    assert s.tasks["x"].processing_on.name == "nobody"


def test_a_cancel_looks_at_each_dependent_once_however_many_ways_lead_there():
    s = Scheduler("w")
    s.submit(("a", 0)), s.submit(("b", 0))
    for n in range(1, 40):  # There are 2 ** 39 ways.
        for letter in "ab":
            s.submit((letter, n), ("a", n - 1), ("b", n - 1))
    sent(s)
    s.stimulus_cancel_keys("c", [(("a", 0), 1)], False)
    assert len(told(s, "c", "key-cancelled")) == 1 + 2 * 39


def test_a_cancel_of_many_looks_at_each_once_also_if_the_last_come_first():
    class Looked(dict):
        times = 0

        def __iter__(self):
            Looked.times += 1
            return super().__iter__()

    s, keys = Scheduler("w"), [f"x{n}" for n in range(40)]
    for n, key in enumerate(keys):
        s.submit(key, *keys[max(0, n - 1) : n])
    for ts in s.tasks.values():
        ts.dependents = Looked(ts.dependents)
    sent(s)
    s.stimulus_cancel_keys("c", [(key, 1) for key in reversed(keys)], False)
    assert len(told(s, "c", "key-cancelled")) == 40
    assert Looked.times < 6 * 40


def test_how_data_was_lost_is_not_remembered_for_ever(monkeypatch):
    monkeypatch.setitem(LIMITS, "remembered", 2)
    s = Scheduler("w")
    for key in "def":
        _, attempt = scatter(s, key)
        s.stimulus_add_keys("w", [(key, attempt)])
    s.stimulus_worker_left("w")
    assert len(s.endings) == 2 and len(told(s, "c", "key-cancelled")) == 3


def test_which_workers_are_dead_is_not_remembered_for_ever(monkeypatch):
    monkeypatch.setitem(LIMITS, "remembered", 2)
    client = ClientMind()
    for worker in "uvw":
        client.stimulus_worker_left(SCHEDULER, worker)
    assert [*client.dead] == ["v", "w"]


def test_when_no_worker_is_left_one_warning_is_enough_for_all_that_wait():
    s = Scheduler("w").measured("x", 1_000_000)
    for n in range(3):
        s.submit(f"x{n}", name="x")
    sent(s)
    s.stimulus_worker_left("w")
    assert [*s.states().values()] == ["no-worker"] * 3
    (warning,) = told(s, "c", "warning")
    assert "waits: there is no worker yet" in warning["text"]


def test_each_client_is_warned_once_of_each_kind_of_worker_that_is_not_there():
    s = Scheduler(clients=("c", "d"))
    for n in range(2):
        s.submit(f"x{n}", workers=["nobody"])
        s.submit(f"y{n}")
        s.submit(f"z{n}", client="d")
    warnings = [(peer, fields["text"]) for peer, op, fields in sent(s) if op == "warning"]
    assert warnings == [
        ("c", "'x0' waits: there is no worker called nobody yet"),
        ("c", "'y0' waits: there is no worker yet"),
        ("d", "'z0' waits: there is no worker yet"),
    ]
    s.stimulus_register_worker("w", "name of w", 1, [], [])
    s.stimulus_worker_left("w")
    assert len(told(s, "d", "warning")) == 1, "again, since there was one"


def test_both_are_warned_who_wants_it_and_who_wants_what_is_made_from_it():
    s = Scheduler("w", clients=("c", "d"))
    s.submit("x"), s.submit("x", client="d"), s.submit("y", "x", client="d")
    s.release("x", client="d")
    sent(s)
    s.stimulus_worker_left("w")
    assert s.states() == {"x": "no-worker", "y": "waiting"}
    assert [(peer, op) for peer, op, _ in sent(s) if op == "warning"] == [
        ("c", "warning"),
        ("d", "warning"),
    ]


def test_however_many_wait_for_each_other_each_is_looked_at_once_to_warn():
    s, n = Scheduler("w"), 300
    warned = []
    s.warn = lambda cs, ts: warned.append(ts)
    s.submit("sum 0")
    for i in range(1, n):
        s.submit(f"x{i}"), s.submit(f"sum {i}", f"x{i}", f"sum {i - 1}")
    s.stimulus_worker_left("w")
    assert len(s.unrunnable) == n and len(warned) == 2 * n - 1


def test_all_are_warned_who_want_something_that_is_made_from_it():
    s = Scheduler("w", clients="cd")
    for key, client in [("x", "c"), ("x", "d"), ("y", "c"), ("z", "d")]:
        s.submit(key, *("x" if key != "x" else ""), client=client)
    s.release("x", client="c"), s.release("x", client="d")
    sent(s)
    s.stimulus_worker_left("w")
    assert sorted(peer for peer, op, _ in sent(s) if op == "warning") == ["c", "d"]


def test_what_waits_behind_many_threads_is_stolen():
    s = Scheduler("w", nthreads=2).measured("f", 1_000_000)
    s.submit("x")
    s.finish("x")
    for n in range(4):
        s.submit(f"y{n}", "x", name="f")
    assert [s.states()[f"y{n}"] for n in range(4)] == ["processing"] * 2 + ["queued"] * 2
    s.stimulus_register_worker("v", "name of v", 2, [], [])
    assert [s.tasks[f"y{n}"].processing_on.id for n in range(4)] == ["w", "w", "v", "v"]


def test_only_who_was_asked_to_may_claim_what_has_no_value():
    s = Scheduler("v", "w")
    s.submit("x")
    (worker, _), attempt = s.computing()[0], s.tasks["x"].attempt
    (other,) = {"v", "w"} - {worker}
    s.stimulus_add_keys(other, [("x", attempt)])
    assert sent(s) == [(other, "free-keys", {"names": [("x", attempt)]})]
    assert s.states() == {"x": "processing"}


def test_who_wants_only_what_is_made_from_it_is_warned_too():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    s.submit("z", "y")
    s.release("x", "y")
    sent(s)
    s.stimulus_worker_left("w")
    assert [text for text in told(s, "c", "warning") if "'x' waits" in text["text"]]


def test_whoever_wants_what_waits_for_a_worker_already_is_warned_too():
    s = Scheduler(clients=("c", "d"))
    s.submit("x", workers=["nobody"])
    s.submit("x", client="d")
    (warning,) = told(s, "d", "warning")
    assert warning["text"] == "'x' waits: there is no worker called nobody yet"


def test_a_task_goes_to_the_worker_with_the_least_work_for_each_thread():
    s = Scheduler("many", nthreads=3).measured("x", 2_000_000).measured("y", 3_000_000)
    s.stimulus_register_worker("few", "few", 2, [], [])
    for key, where in [("x1", "many"), ("x2", "many"), ("y1", "few")]:
        s.submit(key, name=key[0], workers=[where])
    s.submit("z")
    assert s.tasks["z"].processing_on.id == "many", "4 s of work on 3 threads; 3 s on 2"


def test_workers_are_called_by_name_address_and_host():
    for alias in ["tcp://1.2.3.4:5#v", "n", "tcp://1.2.3.4:5", "1.2.3.4:5", "1.2.3.4"]:
        s = Scheduler("w")
        s.stimulus_register_worker("tcp://1.2.3.4:5#v", "n", 1, [], [])
        s.submit("x", workers=[alias])
        assert s.tasks["x"].processing_on.name == "n"


def test_a_worker_that_was_cut_off_and_registers_again_takes_its_own_place():
    """It knows its name to be free, since nobody ever told it that it was taken."""
    s = Scheduler("tcp://a:1#old", "tcp://b:1#other", "tcp://c:1#so-called")
    s.stimulus_register_worker("tcp://c:2#so-called", "tcp://a:1", 1, [], [])
    s.submit("x", workers=["name of tcp://a:1#old"])
    sent(s)
    s.stimulus_register_worker("tcp://a:1#new", "name of tcp://a:1#old", 1, [], [])
    words = {"text": "this worker was cut off, and has registered again"}
    peers = ["tcp://b:1#other", "tcp://c:1#so-called", "tcp://c:2#so-called", "c"]
    assert sent(s)[:6] == [
        ("tcp://a:1#old", "refused", words),
        *((peer, "worker-left", {"worker": "tcp://a:1#old"}) for peer in peers),
        ("tcp://a:1#new", "registered", {"ttl_us": s.ttl_us}),
    ]
    assert s.tasks["x"].processing_on.id == "tcp://a:1#new"
    assert not s.tasks["x"].witness, "nobody has died"
    s.stimulus_register_worker("tcp://a:1#third", "name of tcp://b:1#other", 1, [], [])
    assert [op for peer, op, _ in sent(s) if peer == "tcp://a:1#third"] == ["refused"]
    assert s.tasks["x"].state == "no-worker"
    s.validate()


def test_few_holders_are_weighed_those_of_large_inputs_first():
    s = Scheduler("idle", "rest", *"abcdefgh", "far").measured("long", duration_us=10**9)
    assert len("abcdefgh") == LIMITS["holders"]
    for key, worker, nbytes in (
        ("common", "a", 10**6),
        ("small", "far", 10),
        ("large", "far", 10**9),
    ):
        s.submit(key, workers=[f"name of {worker}"])
        _, attempt = s.finish(key, nbytes=nbytes)
        if key == "common":
            for holder in "bcdefgh":
                s.stimulus_add_keys(holder, [("common", attempt)])
    for worker in "abcdefgh":
        s.submit(f"busy {worker}", workers=[f"name of {worker}"], name="long")
    s.submit("x", "common", "small")
    assert s.tasks["x"].processing_on.id != "far", "there have been enough before it"
    s.submit("y", "common", "large")
    assert s.tasks["y"].processing_on.id == "far"


def test_what_comes_back_from_behind_a_long_task_waits_where_its_inputs_are_by_now():
    s = Scheduler("v", "w").measured("long", duration_us=1_000_000)
    s.measured("short", duration_us=200_000)
    s.submit("x", workers=["name of v"])
    _, number = s.finish("x", nbytes=10_000_000)
    for key, worker, name in (("1", "v", "long"), ("2", "w", "long"), ("3", "v", "short")):
        s.submit(key, workers=[f"name of {worker}"], name=name)
    s.submit("y", "x", name="short")
    assert s.tasks["y"].processing_on.id == "w", "sent early, for the sake of x"
    s.stimulus_add_keys("w", [("x", number)])
    s.stimulus_task_returned("w", s.tasks["y"].attempt, [])
    assert s.tasks["y"].queue is s.workers["w"].queue


def test_of_workers_that_may_start_a_task_at_once_the_one_that_holds_least_gets_it():
    s = Scheduler(*"abcd")
    for n in range(9):
        s.submit(f"x{n}", workers=["name of b", "name of c", "name of d"])
        s.finish(f"x{n}", nbytes=1_000_000)
    assert [ws.nbytes for ws in s.workers.values()] == [0, 3_000_000, 3_000_000, 3_000_000]


def test_functions_that_were_measured_long_ago_are_forgotten_when_there_are_too_many():
    s = Scheduler("w")
    for n in range(LIMITS["remembered"] + 1):
        s.submit("x", want=n, name=f"f{n}")
        s.stimulus_task_finished("w", s.tasks["x"].attempt, 8, "int", 10, ())
        s.release("x", want=n)
    assert len(s.durations) == LIMITS["remembered"]
    assert "f0" not in s.durations and "f1" in s.durations


def test_what_must_not_be_stolen_does_not_hide_what_may_be():
    others = [f"w{n}" for n in range(LIMITS["holders"] + 1)]
    s = Scheduler(*others, "v", "idle").measured("long", duration_us=10**9)
    s.submit("busy", workers=["name of idle"], name="long")
    for worker in others:
        for n in range(2):
            s.submit(f"{worker}-{n}", workers=[f"name of {worker}"])
    for n in range(9):
        s.submit(f"x{n}", workers=["name of v", "name of idle"])
    s.finish("busy")
    for _ in range(2):  # Each end lets the idle worker look at some of the others.
        ((running, _),) = s.workers["v"].processing.values()
        s.finish(running.key)
    assert s.workers["idle"].processing


def test_what_would_start_no_sooner_elsewhere_is_not_stolen():
    moving_us = TRANSFER_US + ROOM_US
    for waits_us, stolen in [(moving_us, False), (moving_us + 1, True)]:
        s = Scheduler("w").measured("before", waits_us).measured("x", 2_000_000)
        s.submit("data")
        s.finish("data", nbytes=ROOM_US * BYTES_PER_US)
        s.submit("early", "data", name="before")
        s.submit("x", "data")
        assert s.states()["x"] == "queued"
        s.stimulus_register_worker("v", "v", 1, [], [])
        assert s.states()["x"] == ("processing" if stolen else "queued")


def test_a_worker_that_joins_steals_what_waits_for_another():
    s = Scheduler("w")
    s.submit("big")
    s.finish("big", nbytes=1_000_000)
    for n in range(4):
        s.submit(f"y{n}", "big")  # Half a second each, for all that is known.
    assert [len(s.workers["w"].processing), len(s.workers["w"].queue)] == [1, 3]
    sent(s)
    s.stimulus_register_worker("v", "v", 1, [], [])
    assert s.computing() == [("v", "y1")]


def test_an_idle_holder_of_its_input_steals_what_waits():
    s = Scheduler("idle", "v", "holder").measured("short", duration_us=ROOM_US)
    s.submit("big", workers=["name of v"])
    _, attempt = s.finish("big", nbytes=100_000_000)
    s.stimulus_add_keys("holder", [("big", attempt)])
    s.submit("busy", workers=["name of holder"])
    s.submit("x", workers=["name of v"], name="short")
    s.submit("y", "big")  # It waits for x, which takes less time than to move its input to any.
    assert s.tasks["y"].queue.worker is s.workers["v"]
    s.finish("busy")
    assert s.tasks["y"].processing_on is s.workers["holder"]


def test_a_worker_that_has_fetched_an_input_steals_what_waits_for_it_elsewhere():
    s = Scheduler("v", nthreads=2).measured("y", 1_000_000)
    s.submit("x")
    s.finish("x", nbytes=10**9)
    for n in range(5):
        s.submit(f"y{n}", "x", name="y")
    s.stimulus_register_worker("w", "w", 2, [], [])
    s.submit("z", "x", workers=["w"])
    assert [key for worker, key in s.computing() if worker == "w"] == ["z"], "x is too large"
    s.stimulus_add_keys("w", [("x", s.tasks["x"].attempt)])
    assert s.computing() == [("w", "y2")]


def test_what_waited_where_its_input_was_stuck_is_stolen_when_there_is_a_copy():
    s = Scheduler("v", "w", "idle")
    holder, attempt = scattered(s)
    s.submit("drawn", "d", workers=["name of w"])
    s.stimulus_task_returned("w", s.tasks["drawn"].attempt, [("d", attempt, [holder])])
    s.submit("busy", workers=["name of w"])
    sent(s)
    s.stimulus_fetch_missed("c", "d", 1, attempt, [holder], True)
    _, target = [peer for peer, op, _ in sent(s) if op == "compute-task"]
    for n in range(3):
        s.submit(f"y{n}", "d")
    assert (holder, target) == ("v", "w") and not s.workers["idle"].processing
    s.stimulus_add_keys(target, [("d", attempt)])
    assert s.workers["idle"].processing


def test_a_free_thread_is_found_beside_idle_workers_that_have_a_queue():
    s = Scheduler("v")
    for worker, nthreads in [("half", 2), ("w", 1)]:
        s.stimulus_register_worker(worker, worker, nthreads, [], [])
    s.submit("x", workers=["v"])
    s.finish("x")
    s.submit("gate", workers=["w"])
    for n in range(5):
        s.submit(f"y{n}", "x", "gate")
    s.submit("busy", workers=["half"])
    s.finish("gate")  # All at once they are placed on v and w, which run nothing.
    assert len(s.workers["half"].processing) == 2


def test_tiny_tasks_stay_where_their_large_input_is():
    s = Scheduler("w").measured("f", duration_us=10)
    s.submit("big")
    s.finish("big", nbytes=1_000_000_000)
    for n in range(1_000):
        s.submit(f"y{n}", "big", name="f")
    assert s.workers["w"].queue
    sent(s)
    s.stimulus_register_worker("v", "v", 1, [], [])
    assert s.computing() == []


def test_a_queue_remembers_few_of_those_that_were_taken_out_of_it():
    s = Scheduler()
    for n in range(100):
        s.submit(f"x{n}", priority=-n)
    s.stimulus_register_worker("w", "w", 1, [], [])
    for n in range(99, 0, -1):
        s.release(f"x{n}")
        assert len(s.queue.heap) <= 2 * len(s.queue) + 16
    assert s.states() == {"x0": "processing"}


def test_of_two_maps_the_first_items_have_gone_through_both_before_the_last_begin():
    s = Scheduler("v", "w")
    for key in [f"x{n}" for n in range(20)]:
        s.submit(key)
    s.submit("another job")
    for n in range(20):
        s.submit(f"y{n}", f"x{n}")
        s.submit(f"z{n}", f"y{n}")
        s.release(f"x{n}", f"y{n}")
    order = []
    while running := [key for key, state in s.states().items() if state == "processing"]:
        s.finish(running[0])
        order += [running[0]]
        assert len([ts for ts in s.tasks.values() if ts.waiters and ts.who_has]) <= 2, order
        s.release(*[key for key in running[:1] if key[0] == "z"])
    assert order.index("another job") > order.index("x19") and len(order) == 61


def test_whoever_keeps_submitting_calls_on_one_result_lets_others_have_their_turn():
    s = Scheduler("w")
    s.submit("table")
    s.finish("table")
    s.submit("a", "table")
    s.submit("another job")
    s.submit("b", "table")
    s.finish("a")
    assert s.states()["another job"] == "processing"


def test_what_needs_a_result_goes_no_earlier_than_what_makes_it_was_submitted():
    s = Scheduler("w")
    s.submit("running")
    s.submit("early")
    s.submit("x", priority=1)
    s.submit("y", "x")
    s.finish("running")
    s.finish("x")
    assert (s.states()["early"], s.states()["y"]) == ("processing", "queued")


def test_a_task_that_failed_and_is_retried_is_no_suspect():
    s = Scheduler("w", nthreads=2)
    s.submit("x")
    s.submit("y")
    s.stimulus_task_erred("w", s.tasks["x"].attempt, (b"boom",))
    s.stimulus_retry("c", "x", 2)
    assert s.states() == {"x": "processing", "y": "processing"}


def test_what_needs_data_alone_goes_in_the_order_of_submission():
    s = Scheduler("w")
    worker, attempt = scatter(s)
    s.stimulus_add_keys(worker, [("d", attempt)])
    s.submit("x")
    s.submit("y")
    s.submit("z", "d")
    s.finish("x")
    assert s.states()["y"] == "processing"


def test_tasks_wait_in_order_however_little_their_priorities_differ():
    s = Scheduler()
    priorities = [math.nextafter(4.0, 5.0), 4.0, math.nextafter(4.0, 0.0), 1e-15, 0.0, -1e-15]
    for n, priority in enumerate(reversed(priorities)):
        s.submit(f"x{n}", priority=priority)
    s.stimulus_register_worker("w", "w", 1, [], [])
    for n in range(5, -1, -1):
        assert s.states()[f"x{n}"] == "processing"
        s.finish(f"x{n}")


@pytest.mark.parametrize("tiny_inputs, urgent_inputs", [("x", ""), ("", "x")])
def test_a_long_task_is_not_passed_by_short_ones_of_another_queue(tiny_inputs, urgent_inputs):
    s = Scheduler("w").measured("tiny", duration_us=100)
    s.submit("x")
    s.finish("x")
    for n in range(100):
        s.submit(f"y{n}", *tiny_inputs, name="tiny")
    s.submit("urgent", *urgent_inputs, priority=1)
    assert s.states()["urgent"] == "queued", "tiny ones were sent as deep as the room is"
    s.finish("y0", duration_us=100)
    assert s.states()["urgent"] == "processing"
    s.finish("y1", duration_us=100)
    assert s.states()["y50"] == "queued", "it takes all the room of its thread"


def test_a_task_as_long_as_the_room_is_short_and_fills_it():
    s = Scheduler("w").measured("f", duration_us=10).measured("g", duration_us=ROOM_US)
    for key, name in [("x", "f"), ("y", "g"), ("z", "f")]:
        s.submit(key, name=name)
    assert s.states() == {"x": "processing", "y": "processing", "z": "queued"}


def test_a_long_task_takes_the_room_of_its_thread():
    s = Scheduler("w", nthreads=3).measured("f", duration_us=50)
    s.submit("long")
    for n in range(2_000):
        s.submit(f"x{n}", name="f")
    assert 200 <= len(s.workers["w"].processing) - 1 <= 202


def test_one_further_task_a_thread_is_sent_early_if_its_inputs_have_to_be_fetched():
    s = Scheduler("v", "w")
    s.submit("x", workers=["name of v"])
    s.finish("x")
    for n in range(4):
        s.submit(f"y{n}", "x", workers=["name of w"])
    assert [ts.key for ts, _ in s.workers["w"].processing.values()] == ["y0", "y1"]
    s = Scheduler("w")
    s.submit("here")
    s.finish("here")
    for n in range(4):
        s.submit(f"y{n}", "here")
    assert [ts.key for ts, _ in s.workers["w"].processing.values()] == ["y0"]


def test_a_worker_that_gave_back_what_came_late_gets_one_task_a_thread_until_one_has_ended():
    s = Scheduler("w").measured("f", duration_us=10)
    for n in range(30):
        s.submit(f"x{n}", name="f")
    attempts = list(s.workers["w"].processing)
    assert len(attempts) == 30
    for attempt in attempts[1:]:
        s.stimulus_task_returned("w", attempt, [])
    assert len(s.workers["w"].processing) == 1
    s.finish("x0", duration_us=10)
    assert len(s.workers["w"].processing) > 1


def test_what_is_given_back_late_goes_to_who_is_idle():
    s = Scheduler("v", "w").measured("f", duration_us=10)
    s.submit("x", workers=["v"])
    s.finish("x")
    for key, name in [("hour", "f"), ("short", "f"), ("long", None)]:
        s.submit(key, "x", name=name)
    assert s.computing()[1:] == [("v", "hour"), ("v", "short"), ("v", "long")]
    for key in ("short", "long"):
        s.stimulus_task_returned("v", s.tasks[key].attempt, [])
    assert s.computing() == [("w", "short"), ("w", "long")]


def test_a_worker_that_gave_back_what_nobody_needed_keeps_its_share_when_it_is_idle():
    s = Scheduler("v", "w")
    s.submit("x", workers=["v"])
    s.finish("x")
    s.submit("y", "x")
    attempt = s.tasks["y"].attempt
    s.release("y")
    s.stimulus_task_returned("v", attempt, [])
    s.submit("z", "x")
    assert s.tasks["z"].processing_on is s.workers["v"]


def test_a_worker_that_says_twice_that_it_holds_a_value_holds_it_once():
    s = Scheduler("w")
    s.submit("x")
    _, attempt = s.finish("x", nbytes=8)
    s.stimulus_add_keys("w", [("x", attempt)])
    assert s.states() == {"x": "memory"} and s.workers["w"].nbytes == 8


def test_what_was_on_two_workers_that_died_runs_alone_and_only_who_was_alone_is_blamed():
    s = Scheduler("w0", nthreads=2)
    s.submit("innocent")
    s.submit("killer")
    for n in range(ALLOWED_FAILURES + 3):
        assert s.tasks["killer"].state != "erred"
        s.stimulus_worker_left(f"w{n}", "exit code 3 at 12:00:00")
        s.stimulus_register_worker(f"w{n + 1}", f"w{n + 1}", 2, [], [])
        assert len(s.workers[f"w{n + 1}"].processing) <= (2 if n == 0 else 1)
        if n == 1:
            assert not s.tasks["killer"].deaths, "nobody knows yet who did it"
            s.finish(next(iter(s.workers["w2"].processing.values()))[0].key)
            s.release("innocent")
    kind, text = s.tasks["killer"].error[1:]
    assert kind == "KilledWorker" and text.count("exit code 3 at 12:00:00") == ALLOWED_FAILURES + 1


def test_what_has_had_a_value_is_blamed_for_no_death_before_that():
    s = Scheduler("w0")
    s.submit("x")
    for n in range(2 * ALLOWED_FAILURES):
        s.stimulus_worker_left(f"w{n}")
        s.stimulus_register_worker(f"w{n + 1}", f"w{n + 1}", 1, [], [])
        if n + 1 == ALLOWED_FAILURES:
            s.finish("x")  # And with the next worker it is lost.
    assert s.states() == {"x": "processing"} and s.tasks["x"].deaths


def test_a_suspect_is_not_sent_to_a_worker_that_holds_something_else():
    s = Scheduler("v", "w", nthreads=2)
    s.submit("on v", workers=["name of v"])
    s.submit("on w", workers=["name of w"], loose=True)
    s.stimulus_worker_left("w")
    assert s.states() == {"on v": "processing", "on w": "queued"}
    s.submit("later")
    assert s.states()["later"] == "queued", "the worker runs empty for it"
    s.finish("on v")
    assert s.states() == {"on v": "memory", "on w": "processing", "later": "queued"}
    s.finish("on w")
    assert s.states()["later"] == "processing"


def test_nothing_is_sent_beside_a_suspect_however_short_it_is_known_to_be():
    s = Scheduler("v").measured("x", 0)
    s.submit("x0", name="x")
    s.stimulus_worker_left("v")
    s.stimulus_register_worker("w", "w", 1, [], [])
    s.submit("x1", name="x")
    assert s.states() == {"x0": "processing", "x1": "queued"}


def test_a_suspect_keeps_one_worker_from_taking_more_and_not_all_of_them():
    s = Scheduler("u", "v", "w", nthreads=2)
    for n in range(5):
        s.submit(f"t{n}")
    (one,) = [id for id, ws in s.workers.items() if len(ws.processing) == 1]
    s.stimulus_worker_left(one)
    s.submit("t5")
    s.submit("t6")
    sent(s)
    for worker in list(s.workers):
        s.finish(s.facts_processing([worker])[0][1][0])
    assert [key for _, key in s.computing()] == ["t5"] and s.states()["t6"] == "queued"


def test_a_worker_that_leaves_goes_when_what_only_it_has_is_elsewhere():
    s = Scheduler("v", "w")
    s.submit("x", workers=["name of w"])
    s.finish("x")
    s.submit("running", workers=["name of w"], loose=True)
    sent(s)
    s.stimulus_leave("w")
    ((peer, _, copy),) = [said for said in sent(s) if said[1] == "compute-task"]
    assert (peer, copy["run_spec"], copy["places"][0][2]) == ("v", (), ["w"])
    s.stimulus_add_keys("v", [("x", s.tasks["x"].attempt)])
    s.stimulus_task_returned("v", copy["attempt"], [])
    ops = [(peer, op) for peer, op, _ in sent(s)]
    assert ("w", "goodbye") in ops and ("c", "key-lost") not in ops
    assert s.states() == {"x": "memory", "running": "processing"}
    assert not s.tasks["running"].suspect, "a good-bye blames nobody"


@pytest.mark.parametrize("others", ["vwxyz", "vw"])
def test_what_a_leaving_worker_has_is_offered_to_one_other_after_another_but_not_to_all(others):
    """A broken link between two is no reason to lose it, and must not keep the worker for ever."""
    s = Scheduler("leaving", *others)
    _, attempt = scatter(s, workers=["name of leaving"])
    s.stimulus_add_keys("leaving", [("d", attempt)])
    sent(s)
    s.stimulus_leave("leaving")
    asked = []
    while copies := [(peer, fields) for peer, op, fields in sent(s) if op == "compute-task"]:
        ((peer, copy),) = copies
        assert peer not in asked
        asked.append(peer)
        s.stimulus_task_returned(peer, copy["attempt"], [("d", attempt, ["leaving"])])
        s.validate()
    assert len(asked) == min(ALLOWED_FAILURES, len(others)) and "leaving" not in s.workers


def test_what_nobody_could_fetch_before_is_handed_over_if_it_can_be_now():
    s = Scheduler("v", "w")
    holder, attempt = scattered(s)
    (other,) = {"v", "w"} - {holder}
    s.submit("x", "d", workers=[f"name of {other}"])
    s.stimulus_task_returned(other, s.tasks["x"].attempt, [("d", attempt, [holder])])
    assert s.tasks["d"].stuck
    sent(s)
    s.stimulus_leave(holder)
    assert [copy["name"] for copy in told(s, other, "compute-task")] == ["copy"]


def test_who_was_to_have_a_copy_and_left_does_not_count_as_one_who_could_not_fetch_it():
    s = Scheduler("first", *"vwxyz")
    _, attempt = scatter(s, workers=["name of first"])
    s.stimulus_add_keys("first", [("d", attempt)])
    s.stimulus_leave("first")
    while len(s.staying) > 1:
        ((peer, _, _),) = [message for message in sent(s) if message[1] == "compute-task"]
        s.stimulus_leave(peer)
        s.validate()
    (last,) = s.staying
    (copy,) = told(s, last.id, "compute-task")
    assert copy["name"] == "copy"


@pytest.mark.parametrize("named", ["", "vw"])
def test_a_task_whose_inputs_are_at_both_ends_of_a_broken_link_goes_where_both_are_reached(named):
    s = Scheduler(*"vwz")
    holders = {}
    for key in "ab":
        holders[key], attempt = scatter(s, key)
        s.stimulus_add_keys(holders[key], [(key, attempt)])
    s.submit("x", "a", "b", workers=[f"name of {worker}" for worker in named])
    x = s.tasks["x"]
    for _ in "ab":
        at = x.processing_on.id
        (far,) = [key for key in "ab" if holders[key] != at]
        miss = (far, s.tasks[far].attempt, [holders[far]])
        s.stimulus_task_returned(at, x.attempt, [miss])
    assert (x.processing_on.id in holders.values()) == (named == "vw"), "z may not run it"


def test_a_task_that_has_twice_missed_what_is_computed_again_goes_where_none_of_it_is():
    s = Scheduler(*"vwz")
    for key, worker in ("av", "bw"):
        s.submit(key, workers=[f"name of {worker}"])
        s.finish(key, nbytes=10**9)
    s.submit("x", "a", "b")
    x = s.tasks["x"]
    for _ in "ab":
        far = {"v": "b", "w": "a"}[x.processing_on.id]
        holder = {"a": "v", "b": "w"}[far]
        miss = (far, s.tasks[far].attempt, [holder])
        s.stimulus_task_returned(x.processing_on.id, x.attempt, [miss])
        assert s.states() == {"a": "memory", "b": "memory", far: "processing", "x": "waiting"}
        s.finish(far, nbytes=10**9)
    assert x.processing_on.id == "z"


def test_what_was_missed_for_good_draws_its_task_there_however_often_that_was():
    s = Scheduler("v", "w")
    s.submit("a", workers=["name of v"])
    s.finish("a")
    s.submit("x", "a", workers=["name of w"])
    x = s.tasks["x"]
    for _ in range(ALLOWED_FAILURES):
        assert x.processing_on.id == "w"
        miss = ("a", s.tasks["a"].attempt, ["v"])
        s.stimulus_task_returned("w", x.attempt, [miss])
        if s.tasks["a"].state == "processing":
            s.finish("a")
    assert s.tasks["a"].stuck and x.processing_on.id == "v"


def test_what_a_leaving_worker_has_is_not_copied_twice():
    s = Scheduler("v", "w")
    holder, attempt = scattered(s, broadcast=True)
    (other,) = {"v", "w"} - {holder}
    (copy,) = told(s, other, "compute-task")
    s.stimulus_leave(holder)
    assert sent(s) == [], "it waits for the copy that is under way"
    s.stimulus_add_keys(other, [("d", attempt)])
    s.stimulus_task_returned(other, copy["attempt"], [])
    assert told(s, holder, "goodbye") and s.states() == {"d": "memory"}


def test_a_worker_may_be_silent_for_just_so_long():
    s = Scheduler("w")
    s.stimulus_time_passes(s.ttl_us)
    assert list(s.workers) == ["w"]
    s.stimulus_time_passes(s.ttl_us + 1)
    assert not s.workers and told(s, "w", "refused")


def test_silent_workers_are_dead_and_nothing_is_sent_from_one_to_the_next():
    s = Scheduler("v", "w")
    s.submit("x")
    s.stimulus_time_passes(20_000_000)
    s.stimulus_time_passes(31_000_000)
    assert s.states() == {"x": "no-worker"} and len(s.tasks["x"].deaths) == 1
    s.stimulus_register_worker("u", "u", 1, [], [])
    s.stimulus_time_passes(60_000_000)
    s.stimulus_heartbeat("u")
    s.stimulus_time_passes(85_000_000)
    assert list(s.workers) == ["u"]


def test_what_is_fired_and_forgotten_runs_though_nobody_wants_it_and_is_freed():
    s = Scheduler("w")
    s.submit("x")
    s.stimulus_fire_and_forget("c", [("x", 1)])
    s.stimulus_client_left("c")
    assert s.states() == {"x": "processing"}
    s.finish("x")
    assert s.states() == {} and not s.keeper.wants_what


def test_who_looks_inside_gets_rows_of_facts():
    s = Scheduler("w")
    s.submit(("x", 1))
    s.finish(("x", 1), nbytes=5)
    for what, rows in [
        ("who_has", [(("x", 1), ["w"])]),
        ("nbytes", [(("x", 1), 5)]),
        ("has_what", [("w", [("x", 1)])]),
        ("processing", [("w", [])]),
        ("workers", [("w", dict(id="w", name="name of w", nthreads=1, nbytes=5))]),
    ]:
        sent(s)
        s.stimulus_query("c", 1, what, [])
        assert told(s, "c", "answer") == [{"number": 1, "facts": rows}]
    s.stimulus_query("c", 2, "story", [("x", 1)])
    (story,) = told(s, "c", "answer")
    ends = [row[1:3] for _, row in story["facts"]]
    assert ends == [("released", "waiting"), ("waiting", "queued"), ("queued", "processing")] + [
        ("processing", "memory")
    ]


@pytest.mark.parametrize(
    "mind, role", [(ClientMind, "client"), (SchedulerMind, "scheduler"), (WorkerMind, "worker")]
)
def test_a_stimulus_takes_the_fields_of_its_message_in_the_order_of_the_table(mind, role):
    for op, line in MESSAGES.items():
        stimulus = getattr(mind, "stimulus_" + op.replace("-", "_"), None)
        receivers = line.partition(":")[0].partition(" > ")[2].replace("holder", "worker")
        if stimulus and role in receivers:
            _, _, *takes = inspect.signature(stimulus).parameters
            takes = " ".join(takes).replace("options", "workers loose retries")
            assert takes.split() == [name for name in OPS[op][1] if name != "id"], op


def test_an_answer_travels_as_it_is():
    answer = ["answer", 1, [["tcp://1.2.3.4:5", {"nthreads": 2}]]]
    came = json.loads(json.dumps(answer))
    assert check_message(came, [], "scheduler") == answer


def test_a_shutdown_says_good_bye_to_everybody():
    s = Scheduler("v", "w")
    s.stimulus_shutdown("c")
    assert [(peer, op) for peer, op, _ in sent(s)] == [(peer, "goodbye") for peer in "vwc"]


# ---- The client's and the worker's mind ----


def test_a_client_keeps_what_it_scatters_until_it_has_a_place():
    client = ClientMind()
    state = client.stimulus_scatter("d", (b"42",), 8, "int", [], False)
    sent(client)
    client.stimulus_put(SCHEDULER, "d", 1, 5, "w")
    assert sent(client) == [("w", "put-data", dict(key="d", attempt=5, value=(b"42",)))]
    client.stimulus_link_lost("w")
    assert sent(client) == [(SCHEDULER, "put-failed", dict(key="d", attempt=5))]
    client.stimulus_key_in_memory(SCHEDULER, "d", 1, 6, 8, "int", ["v"], ())
    assert (state.status, state.data, client.puts) == ("finished", (), {})


def test_a_worker_that_is_dead_is_never_asked_though_many_futures_name_it():
    """To look for it in each of them would cost 10 ms for each worker that is lost."""
    client = ClientMind()
    states = [client.stimulus_submit(f"x{n}", "f", (), [], 0) for n in range(3)]
    for n, state in enumerate(states, 1):
        client.stimulus_key_in_memory(SCHEDULER, state.key, n, n, 8, "int", ["u", "v", "w"], ())
    client.stimulus_ask(states[:1])
    client.stimulus_worker_left(SCHEDULER, "v")
    client.stimulus_ask(states[1:2])
    sent(client)
    client.stimulus_worker_left(SCHEDULER, "u")
    client.stimulus_ask(states)
    asked = [(peer, fields["names"]) for peer, _, fields in sent(client)]
    assert asked == [("w", [("x0", 1), ("x1", 2), ("x2", 3)])]
    client.validate()


def test_a_value_that_is_lost_while_it_is_fetched_is_not_expected_any_more():
    client = ClientMind()
    state = client.stimulus_submit("x", "f", (b"f",), [], 0)
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    client.stimulus_ask([state])
    client.stimulus_key_lost(SCHEDULER, "x", 1)
    sent(client)
    client.stimulus_data("w", "x", 5, "ok", (b"old",))
    assert (state.status, state.value, sent(client)) == ("pending", (), [])


def test_what_has_failed_is_pending_again_when_somebody_retries_it():
    client = ClientMind()
    x, y = (client.stimulus_submit(key, "f", (b"f",), [], 0) for key in "xy")
    client.stimulus_key_erred(SCHEDULER, "x", 1, (b"boom",), "", "")
    client.stimulus_key_in_memory(SCHEDULER, "y", 2, 5, 8, "int", ["w"], ())
    for state in (x, y):
        client.stimulus_key_retried(SCHEDULER, state.key, state.want)
    assert (x.status, x.exception, y.status) == ("pending", (), "finished")
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 6, 8, "int", ["w"], (b"1",))
    assert (x.status, x.value) == ("finished", (b"1",))


def test_a_cancelled_state_leaves_the_table_at_once():
    client = ClientMind()
    state = client.stimulus_submit("x", "f", (b"f",), [], 0)
    client.stimulus_cancel([state], False)
    assert (state.status, client.futures) == ("cancelled", {})
    client.stimulus_release(state)
    assert [op for _, op, _ in sent(client)] == ["submit", "cancel-keys"]


def compute(worker, number, *inputs, run_spec=(b"f",)):
    places = [(key, 1, ["v"]) for key in inputs]
    worker.stimulus_compute_task(SCHEDULER, "y", number, "f", run_spec, places, [0], False)


def test_a_copy_is_an_attempt_that_goes_back_as_soon_as_its_input_is_here():
    w = WorkerMind()
    compute(w, 7, "x", run_spec=())
    w.stimulus_data("v", "x", 1, "ok", (b"1",))
    ops = [(op, fields) for peer, op, fields in sent(w) if peer == SCHEDULER]
    returned = ("task-returned", {"attempt": 7, "misses": []})
    assert ops == [("add-keys", {"names": [("x", 1)]}), returned]


def test_an_attempt_that_misses_several_inputs_at_once_names_each_of_them():
    w = WorkerMind()
    compute(w, 7, *"xyz")
    w.stimulus_link_lost("v")
    (returned,) = told(w, SCHEDULER, "task-returned")
    assert returned["misses"] == [(key, 1, ["v"]) for key in "xyz"]


def test_a_holder_that_is_dead_is_not_asked():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [("x", 1, [*"uvw"])], [0], False)
    w.stimulus_worker_left(SCHEDULER, "v")
    sent(w)
    w.stimulus_data("u", "x", 1, "missing", ())
    assert [(peer, op) for peer, op, _ in sent(w)] == [("w", "get-data")]


def test_what_has_been_ready_for_too_long_goes_back():
    w = WorkerMind()
    for number in (1, 2):
        compute(w, number)
    compute(w, 3, "x")
    w.stimulus_take()
    w.stimulus_time_passes(1_000_000)
    w.stimulus_time_passes(1_009_999)
    assert not told(w, SCHEDULER, "task-returned")
    w.stimulus_time_passes(1_010_000)
    assert [f["attempt"] for f in told(w, SCHEDULER, "task-returned")] == [2]
    assert set(w.attempts) == {1, 3}, "what runs, or waits for an input, stays"


def test_a_worker_without_threads_is_refused_before_it_is_in_any_table():
    s = Scheduler("w")
    with pytest.raises(ProtocolError, match="a worker with 0 threads"):
        s.stimulus_register_worker("v", "v", 0, [], [])
    assert list(s.workers) == ["w"]
    s.validate()


def test_of_what_goes_back_the_first_to_run_is_the_first_to_be_placed_again():
    """It may get the only thread that is free; what came back before it would keep that."""
    for happens in (WorkerMind.stimulus_leave, lambda w: w.stimulus_time_passes(2_000_000)):
        w = WorkerMind()
        for attempt in range(1, 5):
            compute(w, attempt)
        w.stimulus_take()
        w.stimulus_time_passes(1_000_000)
        happens(w)
        assert [f["attempt"] for f in told(w, SCHEDULER, "task-returned")] == [2, 3, 4]
    w = WorkerMind()
    for attempt in range(1, 4):
        w.stimulus_compute_task(SCHEDULER, "y", attempt, "f", (b"f",), [], -attempt, False)
    for now_us in (1_000_000, 2_000_000):
        w.stimulus_time_passes(now_us)
    assert [f["attempt"] for f in told(w, SCHEDULER, "task-returned")] == [3, 2, 1]


def test_two_goals_that_contradict_each_other_are_an_error_and_not_a_loop_for_ever(monkeypatch):
    w = WorkerMind()
    goals = cycle(["ready", "executing"])
    monkeypatch.setitem(w.actions, ("executing", "ready"), w.actions["waiting", "ready"])
    monkeypatch.setattr(w, "goal", lambda attempt: next(goals))
    with pytest.raises(AssertionError, match="does not settle"):
        compute(w, 1)


def test_what_has_begun_is_not_given_back():
    w = WorkerMind()
    compute(w, 1)
    compute(w, 2)
    w.stimulus_take()
    w.stimulus_give_back(SCHEDULER, [1, 2, 99])
    assert [f["attempt"] for f in told(w, SCHEDULER, "task-returned")] == [2]


def test_a_worker_that_leaves_gives_back_what_has_not_begun_and_takes_nothing_new():
    w = WorkerMind()
    compute(w, 1)
    compute(w, 2)
    w.stimulus_take()
    w.stimulus_leave()
    compute(w, 3)
    said = [(op, fields.get("attempt")) for _, op, fields in sent(w)]
    assert said == [("leave", None), ("task-returned", 2), ("task-returned", 3)]


def test_a_retry_reaches_an_input_that_failed_behind_one_that_was_let_go():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    s.submit("z", "y")
    s.stimulus_task_erred("w", 1, (b"boom",))
    s.release("y")
    assert s.states() == {"x": "erred", "y": "released", "z": "erred"}
    s.stimulus_retry("c", "z", 2)
    assert s.states() == {"x": "processing", "y": "waiting", "z": "waiting"}


def test_a_failed_task_whose_data_was_let_go_cannot_be_retried_and_says_why():
    s = Scheduler("w")
    scattered(s)
    s.submit("y", "d")
    s.stimulus_task_erred("w", s.tasks["y"].attempt, (b"boom",))
    s.release("d")
    sent(s)
    s.stimulus_retry("c", "y", 2)
    (cancelled,) = told(s, "c", "key-cancelled")
    assert (
        "'y' cannot be computed again; it was made from 'd', which was let go" in cancelled["text"]
    )
    assert s.states() == {}


def test_a_failed_task_whose_data_was_lost_cannot_be_retried_and_says_with_whom():
    s = Scheduler("w")
    scattered(s)
    s.submit("y", "d")
    s.stimulus_task_erred("w", s.tasks["y"].attempt, (b"boom",))
    s.stimulus_worker_left("w", "exit code 3")
    sent(s)
    s.stimulus_retry("c", "y", 2)
    (cancelled,) = told(s, "c", "key-cancelled")
    assert "made from 'd', which was lost with w (name of w): exit code 3" in cancelled["text"]


def test_data_that_is_needed_no_more_when_other_data_is_lost_with_it_is_forgotten():
    s = Scheduler("w")
    for want, key in enumerate("de", 1):
        _, attempt = scatter(s, key, want)
        s.stimulus_add_keys("w", [(key, attempt)])
    s.submit("hold", priority=1)
    s.stimulus_submit("c", "z", 3, "z", (b"z",), [("d", 1), ("e", 2)], 0)
    s.stimulus_release_keys("c", [("d", 1), ("e", 2)])
    s.stimulus_worker_left("w")
    (cancelled,) = told(s, "c", "key-cancelled")
    assert "was lost with w" in cancelled["text"] and s.states() == {"hold": "no-worker"}


def test_lost_data_cancels_also_what_begins_to_wait_for_it_in_the_same_moment():
    s = Scheduler("v", "w")
    _, number = scattered(s, workers=["name of w"])
    s.submit("x", "d", workers=["name of v"])
    s.stimulus_add_keys("v", [("d", number)])
    s.finish("x")
    s.submit("z", "d", workers=["name of v"])
    sent(s)
    s.stimulus_time_passes(31_000_000)
    assert {fields["key"] for fields in told(s, "c", "key-cancelled")} == {"d", "x", "z"}
    assert s.states() == {}


def test_lost_data_cancels_also_what_begins_to_wait_for_what_waits_for_it_in_the_same_moment():
    s = Scheduler("v", "w")
    scattered(s, workers=["name of w"])
    for key, place in [("xd", "w"), ("yx", "v")]:
        s.submit(*key, workers=[f"name of {place}"])
        s.finish(key[0])
    s.submit("z", "x", workers=["name of v"])
    s.release("x")
    sent(s)
    s.stimulus_time_passes(31_000_000)
    assert {fields["key"] for fields in told(s, "c", "key-cancelled")} == {"d", "y", "z"}
    assert s.states() == {}
