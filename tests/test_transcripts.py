"""More transcripts of the three minds, in the manner of the textbook's chapters 2 to 4."""

from collections import Counter

import pytest

import minidist
from minidist import ALLOWED_FAILURES, CALL_US, SCHEDULER, ClientMind, WorkerMind
from test_minidist import Scheduler, client, sent  # noqa: F401


def test_a_value_that_rode_along_is_not_fetched(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], (b"42",))
    client.stimulus_ask([x])
    assert (x.status, x.value, sent(client)) == ("finished", (b"42",), [])


def test_a_value_that_is_here_is_final(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], (b"42",))
    client.stimulus_key_lost(SCHEDULER, "x", 1)
    client.stimulus_key_erred(SCHEDULER, "x", 1, (b"late",), "", "")
    client.stimulus_key_cancelled(SCHEDULER, "x", 1, "late")
    assert (x.status, x.value, sent(client)) == ("finished", (b"42",), [])


def test_a_value_that_outlived_its_want_goes_with_the_last_future(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], (b"42",))
    client.stimulus_cancel([x], False)
    sent(client)
    assert (x.status, x.value) == ("finished", (b"42",))
    client.stimulus_release(x)
    assert (x.status, x.value, sent(client)) == ("cancelled", (), [])


def test_what_is_submitted_on_a_cancelled_future_is_cancelled_saying_why(client):
    x = client.futures["x"]
    client.stimulus_key_cancelled(SCHEDULER, "x", 1, "its data was lost")
    y = client.stimulus_submit("y", "inc", (), [x], 0)
    assert (x.status, y.status, sent(client)) == ("cancelled", "cancelled", [])
    assert "'x' was cancelled: its data was lost" in y.text


def test_the_client_is_told_where_its_result_is_and_small_values_ride_along():
    s = Scheduler("w")
    s.submit("x")
    sent(s)
    s.finish("x", nbytes=8, value=(b"42",))
    fields = dict(key="x", want=1, attempt=1, nbytes=8, type="int", holders=["w"], value=(b"42",))
    assert sent(s) == [("c", "key-in-memory", fields)]


def test_a_task_goes_to_the_holder_of_its_input():
    s = Scheduler("v", "w")
    for key in "xy":
        s.submit(key)
    holders = {key: s.finish(key, nbytes=100_000_000)[0] for key in "xy"}
    sent(s)
    for key in "xy":
        s.submit(f"on {key}", key)
    assert s.computing() == [(holders["x"], "on x"), (holders["y"], "on y")]


def test_without_workers_a_task_has_no_worker_and_runs_when_one_joins():
    s = Scheduler()
    s.submit("x")
    assert s.states() == {"x": "no-worker"}
    s.stimulus_register_worker("w", "w", 1, [], [])
    assert s.states() == {"x": "processing"}


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


def test_an_exception_ends_an_attempt():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [], 0, True)
    w.stimulus_take()
    w.stimulus_failed(7, (b"boom",))
    assert sent(w)[-1] == (SCHEDULER, "task-erred", {"attempt": 7, "exception": (b"boom",)})


def test_inputs_are_fetched_from_each_holder_in_one_request():
    w = WorkerMind()
    w.stimulus_compute_task(
        SCHEDULER, "y", 7, "f", (b"f",), [("x", 1, ["v"]), ("z", 1, ["v"])], 0, True
    )
    assert sent(w) == [("v", "get-data", {"names": [("x", 1), ("z", 1)]})]
    w.stimulus_data("v", "x", 1, "ok", (b"1",))
    w.validate()
    assert w.attempts[7].state == "waiting"
    w.stimulus_data("v", "z", 1, "ok", (b"2",))
    assert w.attempts[7].state == "ready"
    assert sent(w) == [(SCHEDULER, "add-keys", {"names": [("x", 1), ("z", 1)]})]


def test_an_input_that_nobody_gives_sends_the_attempt_back():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [("x", 1, ["u", "v"])], 0, True)
    w.stimulus_data("u", "x", 1, "missing", ())
    sent(w)
    w.stimulus_link_lost("v")
    misses = [("x", 1, ["u", "v"])]
    assert sent(w) == [(SCHEDULER, "task-returned", {"attempt": 7, "misses": misses})]
    assert (w.attempts, w.needed_by) == ({}, {})


def test_a_freed_input_sends_back_what_has_not_started():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [("x", 1, ["v"])], 0, True)
    w.stimulus_compute_task(SCHEDULER, "z", 8, "f", (b"f",), [("x", 1, ["v"])], 1, True)
    w.stimulus_data("v", "x", 1, "ok", (b"1",))
    w.stimulus_take()
    sent(w)
    w.stimulus_free_keys(SCHEDULER, [("x", 1)])
    assert [attempt.state for attempt in w.attempts.values()] == ["executing"]
    assert sent(w) == [(SCHEDULER, "task-returned", {"attempt": 8, "misses": []})]


def test_releases_in_a_row_travel_in_one_message(client):
    x = client.futures["x"]
    y = client.stimulus_submit("y", "inc", (), [], 0)
    sent(client)
    client.stimulus_release(x)
    client.stimulus_release(y)
    assert sent(client) == [(SCHEDULER, "release-keys", {"names": [("x", 1), ("y", 2)]})]


def test_another_call_under_a_wanted_key_is_a_warning(client):
    x = client.futures["x"]
    assert client.stimulus_submit("x", "inc", (b"spec",), [], 0) is x and client.warnings == []
    for _ in range(2):
        assert client.stimulus_submit("x", "inc", (b"other",), [], 0) is x
    (text,) = client.warnings
    assert "'x' is known, perhaps with another call" in text


def test_other_data_under_a_wanted_key_is_a_warning_too():
    client, buffer = ClientMind(), memoryview(bytearray(8))
    d = client.stimulus_scatter("d", (b"pickle", buffer), 8, "array", [], False)
    assert client.stimulus_scatter("d", (b"pickle", buffer), 8, "array", [], False) is d
    assert client.warnings == []
    assert client.stimulus_scatter("d", (b"other",), 8, "int", [], False) is d
    assert len(client.warnings) == 1


def test_an_error_that_was_fetched_is_final_too(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    client.stimulus_ask([x])
    client.stimulus_data("w", "x", 5, "error", (b"cannot pickle",))
    client.stimulus_key_lost(SCHEDULER, "x", 1)
    assert (x.status, x.exception) == ("error", (b"cannot pickle",))


def test_a_value_whose_holders_are_all_gone_is_reported_and_not_waited_for(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    client.stimulus_worker_left(SCHEDULER, "w")
    client.stimulus_ask([x])
    fields = dict(key="x", want=1, attempt=5, holders=[], again=False)
    assert (x.status, sent(client)) == ("pending", [(SCHEDULER, "fetch-missed", fields)])
    assert x.misses == 0, "nobody was asked"


@pytest.mark.parametrize("duration_us, fit", [(50, 100), (CALL_US, 250), (0, 250)])
def test_short_tasks_are_sent_five_milliseconds_deep(duration_us, fit):
    s = Scheduler("w").measured("f", duration_us=duration_us)
    for n in range(1_000):
        s.submit(f"x{n}", name="f")
    assert fit <= len(s.computing()) <= fit + 2, "what takes no time costs its worker some"


def test_several_attempts_may_bear_one_key():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [], 0, True)
    w.stimulus_compute_task(SCHEDULER, "y", 8, "f", (b"f",), [], 0, True)
    w.stimulus_take()
    w.stimulus_take()
    w.stimulus_finished(8, 2, 1, "int", 10, ())
    w.stimulus_finished(7, 1, 1, "int", 10, ())
    assert set(w.data) == {("y", 7), ("y", 8)}


def test_long_tasks_are_not_hoarded():
    s = Scheduler("w", nthreads=3).measured("f", duration_us=2_000_000)
    for n in range(20):
        s.submit(f"x{n}", name="f")
    assert len(s.computing()) == 3


def test_what_has_a_value_is_no_witness_of_a_death_any_more():
    s = Scheduler("v", nthreads=2)
    s.submit("x")
    s.submit("y")
    s.stimulus_worker_left("v")
    s.stimulus_register_worker("w", "w", 2, [], [])
    s.finish("x")
    assert [s.tasks[key].witness for key in "xy"] == [False, True]


def test_what_nobody_needs_any_more_is_no_suspect():
    s = Scheduler("w")
    s.submit("x")
    s.submit("y", "x")
    s.finish("x")
    s.finish("y")
    s.release("x")
    s.submit("busy")
    s.stimulus_register_worker("v", "v", 1, [], [])
    s.submit("x", want=2)
    s.stimulus_worker_left("v")
    assert s.tasks["x"].suspect
    s.release("x", want=2)
    assert s.states() == {"x": "released", "y": "memory", "busy": "processing"}
    assert not (s.tasks["x"].suspect or s.tasks["x"].witness)


def test_a_retry_goes_through_each_input_once():
    class Counted(dict):
        looked_at = 0

        def __iter__(self):
            Counted.looked_at += 1
            return super().__iter__()

    s = Scheduler("w")
    s.submit("x0")
    s.submit("y0")
    for n in range(1, 9):  # Each needs both before it: there are hundreds of ways to the first.
        s.submit(f"x{n}", f"x{n - 1}", f"y{n - 1}")
        s.submit(f"y{n}", f"x{n - 1}", f"y{n - 1}")
    for key in ("x0", "y0"):
        s.stimulus_task_erred("w", s.tasks[key].attempt, (b"error",))
    for ts in s.tasks.values():
        ts.dependencies = Counted(ts.dependencies)
    s.stimulus_retry("c", "x8", 2)
    assert 17 <= Counted.looked_at <= 4 * len(s.tasks)


def test_a_second_worker_of_one_name_is_refused():
    s = Scheduler("w")
    s.stimulus_register_worker("v", "name of w", 1, [], [])
    (answer,) = sent(s)
    assert answer[:2] == ("v", "refused") and "name of w" in answer[2]["text"]
    s.stimulus_worker_left("v")
    assert list(s.workers) == ["w"]


def test_the_name_of_a_worker_that_is_leaving_is_free_for_its_successor():
    s = Scheduler("w", "u")
    s.submit("x")
    worker, _ = s.finish("x")
    s.stimulus_leave(worker)  # It stays until "x" has been copied.
    s.stimulus_register_worker("v", f"name of {worker}", 1, [], [])
    assert [op for peer, op, _ in sent(s) if peer == "v"] == ["registered"]
    s.stimulus_worker_left(worker)
    assert [ws.name for ws in s.named([f"name of {worker}"])] == [f"name of {worker}"]
    assert s.states() == {"x": "processing"}


def test_a_submit_with_an_input_that_this_client_does_not_want_is_cancelled():
    s = Scheduler("w", clients="cd")
    s.submit("x", client="c")
    sent(s)
    s.submit("y", "x", client="d")
    ((peer, op, fields),) = sent(s)
    assert (peer, op, fields["key"]) == ("d", "key-cancelled", "y") and "'x'" in fields["text"]
    assert s.states() == {"x": "processing"}


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


def test_a_client_that_missed_is_told_of_another_holder_first():
    s = Scheduler("v", "w")
    s.submit("x")
    holder, attempt = s.finish("x")
    other = "w" if holder == "v" else "v"
    s.stimulus_add_keys(other, [("x", attempt)])
    sent(s)
    s.stimulus_fetch_missed("c", "x", 1, attempt, [holder], True)
    ((_, op, fields),) = sent(s)
    assert (op, fields["holders"]) == ("key-in-memory", [other, holder])


def test_a_client_that_cannot_reach_a_result_gets_a_copy_elsewhere_and_costs_nobody_a_run():
    s = Scheduler("v", "w")
    s.submit("x")
    holder, attempt = s.finish("x")
    other = "w" if holder == "v" else "v"
    sent(s)
    s.stimulus_fetch_missed("c", "x", 1, attempt, [holder], False)
    ((peer, op, fields),) = sent(s)
    assert (peer, op) == (holder, "compute-task"), "a link may be broken for once: does it live?"
    s.stimulus_task_returned(holder, fields["attempt"], [])
    assert [fields["holders"] for _, _, fields in sent(s)] == [[holder]]
    s.stimulus_fetch_missed("c", "x", 1, attempt, [holder], True)
    copies = {peer: f["attempt"] for peer, op, f in sent(s) if op == "compute-task"}
    assert {*copies} == {holder, other}
    s.stimulus_task_returned(holder, copies[holder], [])
    assert sent(s) == [], "the other copy is under way"
    s.stimulus_add_keys(other, [("x", attempt)])
    s.stimulus_task_returned(other, copies[other], [])
    assert sent(s)[-1][2]["holders"] == [other, holder]
    for _ in range(2 * ALLOWED_FAILURES):
        s.stimulus_fetch_missed("c", "x", 1, attempt, [other, holder], True)
        for peer, op, fields in sent(s):
            assert op in ("compute-task", "key-in-memory")
            if op == "compute-task":
                s.stimulus_task_returned(peer, fields["attempt"], [])
    assert s.states() == {"x": "memory"}


def test_what_is_cancelled_at_once_is_cancelled_in_one_message(client):
    x = client.futures["x"]
    y = client.stimulus_submit("y", "inc", (b"spec",), [x], 0)
    sent(client)
    client.stimulus_cancel([x, y, x], False)
    assert [fields["names"] for _, _, fields in sent(client)] == [[("x", 1), ("y", 2)]]
    client.stimulus_cancel([x, y], False)
    assert sent(client) == []


def test_of_many_holders_those_that_a_client_missed_are_named_last():
    workers = [f"w{n}" for n in range(20)]
    s = Scheduler(*workers)
    s.submit("x")
    holder, attempt = s.finish("x")
    for worker in workers:
        s.stimulus_add_keys(worker, [("x", attempt)])
    asked, named = [], [holder]
    for _ in range(3):
        s.stimulus_fetch_missed("c", "x", 1, attempt, named, True)
        named = sent(s)[-1][2]["holders"]
        asked += named
    assert (len({*asked[:16]}), len({*asked})) == (16, 20)


def test_deaths_of_holders_are_no_misses_of_the_value_that_comes_after_them(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    client.stimulus_ask([x])
    for attempt in range(6, 16):
        client.stimulus_link_lost("w")
        assert (x.status, x.misses) == ("pending", 1)
        client.stimulus_key_in_memory(SCHEDULER, "x", 1, attempt, 8, "int", ["w"], ())


def test_while_copies_are_under_way_whoever_misses_the_value_waits_for_them():
    s = Scheduler("v", "w", clients="ce")
    s.submit("x"), s.submit("x", client="e")
    holder, attempt = s.finish("x")
    sent(s)
    s.stimulus_fetch_missed("c", "x", 1, attempt, [holder], False)
    ((_, _, copy),) = sent(s)
    s.stimulus_fetch_missed("e", "x", 1, attempt, [holder], True)
    assert sent(s) == []
    s.stimulus_task_returned(holder, copy["attempt"], [])
    assert [(peer, op) for peer, op, _ in sent(s)] == [(c, "key-in-memory") for c in "ce"]


def test_a_value_that_a_client_misses_too_often_is_an_error_there_until_it_is_retried(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    for want in (1, 2):
        client.stimulus_ask([x])
        for n in range(ALLOWED_FAILURES):
            client.stimulus_data("w", "x", 5, "missing", ())
            ((_, op, fields),) = sent(client)[-1:]
            assert (x.status, op, fields["again"]) == ("pending", "fetch-missed", n > 0)
            client.stimulus_key_in_memory(SCHEDULER, "x", want, 5, 8, "int", ["w"], ())
        client.stimulus_data("w", "x", 5, "missing", ())
        assert (x.status, x.type) == ("error", "ConnectionError")
        assert x.text == "'x' could not be fetched from w"
        assert [op for _, op, _ in sent(client)] == ["get-data"]
        client.stimulus_retry([x])
        client.stimulus_key_in_memory(SCHEDULER, "x", want + 1, 5, 8, "int", ["w"], ())


def test_a_result_that_a_worker_cannot_fetch_is_made_again_but_not_for_ever_then_it_draws_tasks():
    s = Scheduler("v", "w")
    s.submit("x", workers=["name of v"])
    s.submit("y", "x", workers=["name of w"])
    for n in range(1, ALLOWED_FAILURES + 1):
        _, attempt = s.finish("x")
        y = s.tasks["y"]
        assert y.processing_on.id == "w"
        s.stimulus_task_returned("w", y.attempt, [("x", attempt, ["v"])])
        assert s.states()["x"] == ("processing" if n < ALLOWED_FAILURES else "memory")
    assert y.processing_on.id == "v"
    s.finish("y")
    assert s.states() == {"x": "memory", "y": "memory"}


def test_a_retry_forgets_how_often_a_value_was_struck():
    s = Scheduler("v", "w")
    s.submit("x", workers=["name of v"])
    s.submit("y", "x", workers=["name of w"])
    _, attempt = s.finish("x")
    x = s.tasks["x"]
    s.stimulus_task_returned("w", s.tasks["y"].attempt, [("x", attempt, ["v"])])
    s.stimulus_task_erred("v", x.attempt, (b"error",))
    assert (x.state, x.strikes) == ("erred", 1)
    s.stimulus_retry("c", "x", 2)
    assert (x.state, x.strikes) == ("processing", 0)


def test_an_input_that_was_missed_is_not_counted_against_a_value_that_was():
    s = Scheduler("v", "w")
    s.submit("i", workers=["name of v"])
    s.submit("x", "i", workers=["name of v"])
    s.finish("i")
    for n in range(ALLOWED_FAILURES):
        _, attempt = s.finish("x")
        s.submit("y", "x", workers=["name of w"], want=n)
        s.stimulus_task_returned("w", s.tasks["y"].attempt, [("x", attempt, ["v"])])
        s.release("y", want=n)
    s.stimulus_worker_left("v")
    s.stimulus_register_worker("v2", "name of v", 1, [], [])
    s.finish("i")
    x = s.tasks["x"]
    for _ in range(ALLOWED_FAILURES):
        s.stimulus_task_returned("v2", x.attempt, [("i", s.tasks["i"].attempt, ["elsewhere"])])
    assert x.state == "processing"


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
        s.stimulus_task_returned(worker, y.attempt, [("x", attempt, ["elsewhere"])])
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


def test_a_result_that_is_lost_and_fails_then_fails_the_dependents_that_have_not_fetched_it():
    s = Scheduler("v", "w")
    s.submit("x", workers=["name of v"])
    s.finish("x")
    for key in ("y", "busy", "z"):
        s.submit(key, "x", workers=["name of w"])
    assert s.tasks["z"].state == "queued"
    s.stimulus_worker_left("v")
    s.stimulus_register_worker("v2", "name of v", 1, [], [])
    s.stimulus_task_erred("v2", s.tasks["x"].attempt, (b"error",))
    assert s.states() == {"x": "erred", "y": "processing", "busy": "processing", "z": "erred"}


def test_a_suspect_that_is_let_go_makes_way_for_what_waits_behind_it():
    s = Scheduler("u", "w").measured("f", duration_us=10)
    s.submit("running", workers=["name of w"], name="f")
    s.submit("suspect", name="f")
    s.stimulus_worker_left("u")
    s.submit("short", workers=["name of w"], name="f")
    assert s.states()["suspect"] == s.states()["short"] == "queued"
    sent(s)
    s.release("suspect")
    assert s.computing() == [("w", "short")]


def test_news_of_a_replica_that_nobody_needs_is_answered_by_free_keys():
    s = Scheduler("w")
    s.stimulus_add_keys("w", [("x", 7)])
    assert sent(s) == [("w", "free-keys", {"names": [("x", 7)]})]


def test_an_error_at_the_head_of_a_long_chain_reaches_its_end():
    s = Scheduler("w")
    s.submit("0")
    for n in range(1, 5_000):
        s.submit(str(n), str(n - 1))
    s.stimulus_task_erred("w", 1, (b"boom",))
    assert set(s.states().values()) == {"erred"}


def test_an_input_that_its_holder_cannot_pickle_fails_the_attempt():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [("x", 1, ["v"])], 0, True)
    w.stimulus_data("v", "x", 1, "error", (b"cannot pickle",))
    assert sent(w)[-1][:2] == (SCHEDULER, "task-erred")


def test_a_dead_holder_is_not_waited_for():
    w = WorkerMind()
    w.stimulus_compute_task(SCHEDULER, "y", 7, "f", (b"f",), [("x", 1, ["u", "v"])], 0, True)
    sent(w)
    w.stimulus_worker_left(SCHEDULER, "u")
    assert sent(w) == [("v", "get-data", {"names": [("x", 1)]})]
    w.stimulus_worker_left(SCHEDULER, "v")
    assert (w.attempts, sent(w)[0][1]) == ({}, "task-returned")


def test_a_failed_future_that_is_cancelled_has_no_exception_any_more(client):
    x = client.futures["x"]
    client.stimulus_key_erred(SCHEDULER, "x", 1, (b"boom",), "", "")
    assert (x.status, x.exception) == ("error", (b"boom",))
    client.stimulus_cancel([x], False)
    assert (x.status, x.exception, x.text) == ("cancelled", (), "it was cancelled here")


def test_when_the_scheduler_is_lost_what_is_not_here_is_cancelled(client):
    x = client.futures["x"]
    y = client.stimulus_submit("y", "inc", (), [], 0)
    client.stimulus_key_in_memory(SCHEDULER, "y", 2, 6, 8, "int", [], (b"1",))
    client.stimulus_scheduler_left("the scheduler is gone")
    assert (x.status, x.text, y.status) == ("cancelled", "the scheduler is gone", "finished")


def test_a_late_release_does_not_touch_a_newer_want():
    s = Scheduler("w")
    s.submit("x", want=2)
    s.release("x", want=1)
    assert s.states() == {"x": "processing"}


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


def test_a_client_tries_each_holder_and_then_reports_those_that_missed(client):
    x = client.futures["x"]
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w", "v"], ())
    client.stimulus_ask([x])
    client.stimulus_link_lost("w")
    client.stimulus_data("v", "x", 5, "missing", ())
    assert [(peer, op) for peer, op, _ in sent(client)[:-1]] == [
        ("w", "get-data"),
        ("v", "get-data"),
    ]
    assert x.status == "pending"


@pytest.mark.parametrize("value", [(), (b"1",)], ids=["elsewhere", "here"])
def test_a_broadcast_of_data_that_is_known_is_a_new_want_of_it(value):
    client = ClientMind()
    x = client.stimulus_scatter("x", (b"1",), 8, "int", [], False)
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    client.stimulus_ask([x] if value else [])
    client.stimulus_data("w", "x", 5, "ok", value)
    sent(client)
    again = (b"2",) if value else (b"1",)
    assert client.stimulus_scatter("x", again, 8, "int", [], True) is x
    ((_, op, fields),) = sent(client)
    assert (op, fields["want"], fields["broadcast"]) == ("scatter", 2, True)
    assert x.status == ("finished" if value else "pending"), (
        "it may be lost; but what is here is final"
    )
    client.stimulus_key_cancelled(SCHEDULER, "x", 1, "lost, while that was under way")
    client.stimulus_put(SCHEDULER, "x", 2, 6, "v")
    given = dict(key="x", attempt=6, value=(b"1",))
    assert sent(client) == [("v", "put-data", given)], "it is given once more"
    assert x.data == (b"1",) and not minidist.settled(x), "until each worker has it"
    client.stimulus_key_in_memory(SCHEDULER, "x", 2, 6, 8, "int", ["v", "w"], ())
    assert minidist.settled(x) and (x.data, x.value, sent(client)) == ((), value, [])


def test_data_that_is_known_and_not_to_be_broadcast_is_not_scattered_again():
    client = ClientMind()
    x = client.stimulus_scatter("x", (b"1",), 8, "int", [], False)
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], ())
    sent(client)
    assert client.stimulus_scatter("x", (b"1",), 8, "int", [], False) is x
    assert (x.count, x.data, sent(client)) == (2, (), [])


def test_what_is_retried_is_pending_at_once():
    client = ClientMind()
    x = client.stimulus_submit("x", "f", (b"f",), [], 0)
    client.stimulus_key_erred(SCHEDULER, "x", 1, (b"error",), "", "")
    client.stimulus_retry([x])
    assert (x.status, x.exception, x.want) == ("pending", (), 2)


@pytest.mark.parametrize("notice", ["lost", "erred", "cancelled", "none"])
def test_a_value_that_is_here_stays_here_while_it_is_broadcast_and_whatever_comes_of_that(notice):
    client = ClientMind()
    x = client.stimulus_scatter("x", (b"1",), 8, "int", [], False)
    client.stimulus_key_in_memory(SCHEDULER, "x", 1, 5, 8, "int", ["w"], (b"1",))
    client.stimulus_scatter("x", (b"1",), 8, "int", [], True)
    if notice == "lost":
        client.stimulus_key_lost(SCHEDULER, "x", 2)
        assert not minidist.settled(x), "it is being put once more"
    elif notice == "erred":
        client.stimulus_key_erred(SCHEDULER, "x", 2, (b"error",), "", "")
    elif notice == "cancelled":
        client.stimulus_key_cancelled(SCHEDULER, "x", 2, "by another client")
    client.validate()
    client.stimulus_scheduler_left("closed")
    client.validate()
    assert (x.status, x.value) == ("finished", (b"1",)) and minidist.settled(x)


def test_a_miss_at_a_worker_that_holds_the_value_no_longer_strikes_nothing():
    s = Scheduler("v", "w")
    s.submit("x")
    holder, attempt = s.finish("x")
    sent(s)
    s.stimulus_fetch_missed("c", "x", 1, attempt, ["v" if holder == "w" else "w"], True)
    assert [(op, fields["holders"]) for _, op, fields in sent(s)] == [("key-in-memory", [holder])]
    assert s.states() == {"x": "memory"}
