"""``validate`` knows every relation and every counter: whichever is wrong, it says so.

The fields of the records, and the tables of the minds, are found by reflection.  A mind is brought
into a state by stimuli; then one side of one relation, or one counter, is changed behind its back.
What is neither is in ``NEITHER``, with the reason.  A new field is in neither: then its test fails
until ``validate`` looks at it, and some history fills it.
"""

from functools import partial
from operator import setitem

import pytest
from test_minds import compute, scattered

from minidist import (
    SCHEDULER,
    Attempt,
    ClientMind,
    ClientState,
    FutureState,
    HeapSet,
    Mind,
    SchedulerMind,
    TaskState,
    WorkerMind,
    WorkerState,
)
from test_minidist import Scheduler

# ---- Histories: together they fill each field ----


def tasks_in_every_state():
    s = Scheduler("v", "w", clients="ce").measured("short", duration_us=10)
    s.submit("input")
    s.submit("result", "input", client="c")
    s.finish("input", nbytes=1_000_000)
    s.finish("result", nbytes=5)
    s.release("input")
    s.submit("bad")
    s.stimulus_task_erred(s.tasks["bad"].processing_on.id, s.tasks["bad"].attempt, (b"boom",))
    s.submit("abandoned", name="short")
    s.release("abandoned")
    s.submit("lone", workers=["nobody"])
    for key in "abc":
        s.submit(key)
    s.submit("d", "a", "result")
    s.submit("near", "result")
    s.submit("nearer", "result")
    s.submit("far", workers=["name of v"])
    s.submit("wished", workers=["name of w"])
    s.submit("a", client="e")
    s.stimulus_fire_and_forget("c", [("b", 1)])
    return s


def data_on_its_way():
    s = Scheduler("u", "v", "w", clients="ce")
    s.stimulus_scatter("c", "new", 1, 8, "int", [], False)
    s.outbox.clear()
    holder, attempt = scattered(s, broadcast=True)
    (other, *_) = [id for id in s.workers if id != holder]
    s.stimulus_add_keys(other, [("d", attempt)])
    s.submit("x", workers=["name of w"], client="e")
    s.finish("x")
    s.stimulus_leave("w")
    return s


def what_cannot_be_fetched():
    s = Scheduler("w")
    _, attempt = scattered(s)
    s.stimulus_fetch_missed("c", "d", 1, attempt, ["w"], True)
    return s


def suspects():
    s = Scheduler("v", "w", nthreads=2)
    for key in "abc":
        s.submit(key)
    (alone,) = [ws for ws in s.workers.values() if len(ws.processing) == 1]
    ((killer, _),) = alone.processing.values()
    s.stimulus_worker_left(alone.id)
    for key in {*"abc"} - {killer.key}:
        s.finish(key)
    assert killer.suspect and killer.processing_on.alone
    return s


def futures_in_every_state():
    c = ClientMind()
    for n, key in enumerate(["pending", "here", "there", "bad", "lost"]):
        state = c.stimulus_submit(key, "f", (b"f",), [], 0)
        if key in ("here", "there", "lost"):
            fields = (n, 8, "int", ["u", "v"], (b"1",) if key == "here" else ())
            c.stimulus_key_in_memory(SCHEDULER, key, state.want, *fields)
    c.stimulus_ask([c.futures["here"], c.futures["there"], c.futures["lost"]])
    c.stimulus_data("u", "lost", 4, "missing", ())
    c.stimulus_key_erred(SCHEDULER, "bad", 4, (b"boom",), "", "")
    for key in ("new", "put"):
        c.stimulus_scatter(key, (b"1",), 8, "int", [], False)
    c.stimulus_put(SCHEDULER, "put", c.futures["put"].want, 9, "w")
    return c


def attempts_in_every_state():
    w = WorkerMind()
    w.stimulus_put_data("c", "here", 1, (b"1",))
    for number in (1, 2, 3):
        compute(w, number, "here")
    compute(w, 4, "here", "far", "farther")
    compute(w, 5, "far")
    w.stimulus_take()
    w.stimulus_time_passes(1)
    return w


HISTORIES = [tasks_in_every_state, data_on_its_way, what_cannot_be_fetched, suspects]
HISTORIES += [futures_in_every_state, attempts_in_every_state]


# ---- Fields ----

KINDS = {
    kind.__name__: kind
    for kind in (SchedulerMind, ClientMind, WorkerMind, HeapSet, TaskState, WorkerState)
    + (ClientState, FutureState, Attempt)
}


def records(mind):
    """{kind: its records}: the mind, what stands in its tables, and their queues."""
    tables = [table for table in vars(mind).values() if isinstance(table, dict)]
    some = [mind, *(each for table in tables for item in table.items() for each in item)]
    if isinstance(mind, SchedulerMind):
        some.append(mind.keeper)
    some += [getattr(record, "queue", None) for record in some] + [getattr(mind, "ready", None)]
    found = {kind: [] for kind in KINDS}
    for record in some:
        for kind, of in KINDS.items():
            if isinstance(record, of) and not any(record is other for other in found[kind]):
                found[kind].append(record)
    return found


def changes(mind, field):
    """Every way to make this field of one record wrong: [(what it is, do it)]."""
    kind, name = field.split(".")
    related = RELATED_ONLY.get(field, lambda mind, record: True)
    some = [record for record in records(mind)[kind] if related(mind, record)]
    values = [getattr(record, name) for record in some]
    found = []
    for record, value in zip(some, values, strict=True):
        others = [other for other in values if other is not value and other != value]
        if field == "HeapSet.heap":  # It may hold more than it has to, and that twice.
            found += [("emptied", value.clear)] if record else []
        elif isinstance(value, (dict, list)) and field != "TaskState.queue":
            found += changes_of_a_table(value, others)
        else:
            for other in wrong(value, others):
                change = partial(setattr, record, name, other)
                found.append((f"{other!r:.50} for {value!r:.50}", change))
    return found


def wrong(value, others):
    """What may stand in a field instead of its value; ``others`` are those of other records."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if value == ():
        tables = [other for other in others if other] or [(b"a frame",)]
        return [dict([*t.items()][:1]) if isinstance(t, dict) else t for t in tables[:1]]
    nothing = [type(value)()] if isinstance(value, (str, tuple)) else [None]
    return [*others[:1], *nothing] if value else others[:1]


def changes_of_a_table(table, others):
    """Without each of its items, with one of another record's, and the same in its items."""
    strangers = [other for other in others if type(other) is type(table) and other]
    if isinstance(table, list):
        new = [item for other in strangers for item in other if item not in table]
        yield from [(f"without {each!r:.50}", partial(table.remove, each)) for each in table]
        yield from [(f"with {each!r:.50}", partial(table.append, each)) for each in new[:1]]
    else:
        new = [item for other in strangers for item in other.items() if item[0] not in table]
        new = new or ([] if table else [("a stranger", None)])
        yield from [(f"without {key!r:.50}", partial(table.pop, key)) for key in table]
        yield from [(f"with {each!r:.50}", partial(setitem, table, *each)) for each in new[:1]]
    for item in [*table.values()] if isinstance(table, dict) else table:
        if isinstance(item, (dict, list)) and item:
            yield from changes_of_a_table(item, [])


# ---- What is neither a relation nor a counter ----

NEITHER = {  # {reason: fields}
    "it waits to be sent, or to be read": """
        SchedulerMind.outbox ClientMind.outbox WorkerMind.outbox ClientMind.news
        SchedulerMind.news ClientMind.warnings""",
    "it tells what has happened, which leaves no trace elsewhere": """
        SchedulerMind.story ClientMind.story WorkerMind.story SchedulerMind.durations SchedulerMind.endings
        ClientMind.dead WorkerMind.dead TaskState.misses TaskState.strikes
        TaskState.witness TaskState.deaths
        TaskState.stuck TaskState.lost TaskState.why WorkerState.late WorkerState.seen_us
        FutureState.text FutureState.misses ClientState.warned""",
    "it is a supply of numbers, a clock, or a constant": """
        SchedulerMind.number ClientMind.number WorkerMind.number
        SchedulerMind.submitted SchedulerMind.now_us SchedulerMind.ttl_us
        SchedulerMind.actions ClientMind.actions WorkerMind.actions""",
    "it is what a peer or a user said": """
        TaskState.name TaskState.priority TaskState.run_spec TaskState.restrictions
        TaskState.loose TaskState.retries TaskState.type WorkerState.name WorkerState.nthreads
        FutureState.nbytes FutureState.type FutureState.holders FutureState.data FutureState.call
        Attempt.key Attempt.name Attempt.run_spec Attempt.priority Attempt.wanted Attempt.told""",
    "its other side is not in this mind: a user's objects, a thread, the scheduler": """
        ClientMind.futures ClientMind.records ClientMind.puts FutureState.count
        WorkerMind.attempts WorkerMind.records WorkerMind.leaving""",
    "it is still to be done: with less of it, a worker goes too early, a copy is not made": """
        WorkerState.leaving WorkerState.tried TaskState.targets""",
}
RELATED_ONLY = {  # {field: when it is a relation or a counter}
    "TaskState.attempt": lambda mind, ts: ts.state == "processing",
    "TaskState.nbytes": lambda mind, ts: ts.state == "memory",
    "TaskState.suspect": lambda mind, ts: ts.state == "processing",
    "ClientState.id": lambda mind, cs: cs is not mind.keeper,
    "FutureState.asked": lambda mind, state: state.status == "finished" and not state.value,
    "Attempt.inputs": lambda mind, attempt: attempt.state != "executing",
    "FutureState.attempt": lambda mind, state: (state.key, state.attempt) in mind.fetching,
}

EMPTY = {kind: of() if issubclass(of, (Mind, HeapSet)) else of for kind, of in KINDS.items()}
FIELDS = [
    f"{kind}.{field}"
    for kind, of in EMPTY.items()
    for field in getattr(of, "__slots__", None) or vars(of)
]
EXEMPT = " ".join(NEITHER.values()).split()


@pytest.mark.parametrize("field", [field for field in FIELDS if field not in EXEMPT])
def test_a_wrong_field_is_noticed(field):
    found, unnoticed = 0, []
    for history in HISTORIES:
        for number in range(len(changes(history(), field))):
            mind = history()
            mind.validate()
            what, change = changes(mind, field)[number]
            change()
            try:
                mind.validate()
                unnoticed.append(f"{history.__name__}: {what}")
            except Exception:  # Most fail an assertion; over some it stumbles.
                found += 1
    assert found, "no history fills it"
    assert not unnoticed


def test_the_list_of_what_is_neither_names_fields_that_exist():
    assert {*EXEMPT, *RELATED_ONLY} <= {*FIELDS} and not {*EXEMPT} & {*RELATED_ONLY}
