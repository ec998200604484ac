"""What a program may rely on: one table of small programs, each with what must come of it.

A program is an ``async def`` in chapter 3, decorated with what it gives or raises; twenty more
stand in the textbook, ``test_minidist.py``.  Each is one claim, and the claim is true of minidist
and of dask.distributed, in an event loop and without one: ``load`` runs the source of chapters 2
and 3 and of those twenty with the names of the module under test, and for the synchronous variant
with the words ``async`` and ``await`` left out.  Where minidist is meant to do otherwise than dask,
what dask does stands beside it as ``dask=``, and why as ``differs=``.

A program runs on a cluster that it shares with all others, of two workers: "alice" with two
threads and "bob" with one.  When it has returned, the cluster must come to hold nothing of it.  It
waits for events, never for time.  The futures of a program that cancels have keys of their own: dask may
cancel whatever is submitted with the same key right afterwards.
"""

# Names such as Client, wait and connect are put into the namespace by ``load``.
# ruff: noqa: F821

import asyncio
import atexit
import collections
import concurrent.futures
import copy
import functools
import gc
import inspect
import io
import operator
import os
import shutil
import tempfile
import threading
import time
import tokenize
import traceback
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

# ---- 1. The table: Program, program(), load() ----


@dataclass(frozen=True)
class Gives:
    """The program returns ``value``."""

    value: object


@dataclass(frozen=True)
class Raises:
    """The program raises an exception of this ``kind``."""

    kind: type


NOT_RUN = "not run"  # on dask: it would be left to chance, or break the cluster for the others


@dataclass(frozen=True)
class Program:
    """One claim.  ``check(client, expected)`` tests it; in the asynchronous variant a coroutine."""

    name: str
    topic: str
    expected: "Gives | Raises"
    on_dask: "Gives | Raises | str"  # the same, unless ``differs`` says why not
    differs: str
    only: str  # "synchronous" where the call makes no sense in an event loop, else ""
    check: object


def new_table():
    """An empty table, {name: Program}, and the decorator that enters programs into it."""
    table = {}

    def program(topic, *, gives=None, raises=None, dask=None, differs="", only=""):
        expected = Raises(raises) if raises else Gives(gives)
        assert bool(dask) == bool(differs), "a difference has a reason, and a reason a difference"

        def enter(run):
            name = run.__name__
            assert name not in table, f"two programs are called {name}"
            check = functools.partial(run.__globals__["check"], run)
            table[name] = Program(name, topic, expected, dask or expected, differs, only, check)
            return run

        return enter

    return table, program


# Filled when this file is imported.  These programs are there to be counted; ``load`` makes those
# that run.
PROGRAMS, program = new_table()

NAMES = """Client Future KilledWorker as_completed default_client fire_and_forget futures_of
get_worker wait""".split()

# On the disk, because workers are other processes.
SCRATCH = tempfile.mkdtemp(prefix="contract-")
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)

TEXTBOOK = str(Path(__file__).parents[1] / "test_minidist.py")


def part(path, begin, end):
    """The source of a file from one heading to the next.

    Blank lines in front of it keep the line numbers in tracebacks right.
    """
    text = Path(path).read_text()
    start = text.index(f"\n{begin}")
    return "\n" * text.count("\n", 0, start) + text[start : text.index(f"\n{end}", start)] + "\n"


def in_the_textbook():
    """The source of the programs that stand there."""
    return part(TEXTBOOK, "# -- Twenty programs ", "# ---- 12. ")


def load(module, synchronous):
    """{name: Program} on ``module``: minidist or dask.distributed."""
    tasks = part(__file__, "# ---- 2. ", "# ---- 3. ")
    programs = part(__file__, "# ---- 3. ", "# ---- 4. ")
    change = without_async if synchronous else str
    table, decorator = new_table()
    # cloudpickle sends by value what is in no module that can be imported.  So tasks arrive at
    # workers that have never seen this file.
    namespace = {**globals(), "__name__": f"contract on {module.__name__}", "program": decorator}
    namespace |= {name: getattr(module, name) for name in NAMES if hasattr(module, name)}
    # Futures of minidist must be gone with the last reference to them.
    namespace["collect"] = collect_on_dask if "dask" in module.__name__ else lambda client: None
    if synchronous:
        namespace |= {"sleep": time.sleep, "start": in_thread, "connect": module.Client}
    else:
        connect = functools.partial(module.Client, asynchronous=True)
        namespace |= {"sleep": asyncio.sleep, "start": InTask, "connect": connect}
    exec(compile(tasks, __file__, "exec"), namespace)
    exec(compile(change(programs), __file__, "exec"), namespace)
    exec(compile(change(in_the_textbook()), TEXTBOOK, "exec"), namespace)
    return table


def without_async(source):
    """The synchronous program that an asynchronous one is if nothing has to be awaited."""
    lines = source.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    for token, after in reversed(list(zip(tokens, tokens[1:], strict=False))):
        row, start = token.start
        if token.string in ("async", "await"):
            lines[row - 1] = lines[row - 1][:start] + lines[row - 1][after.start[1] :]
        elif token.string == "anext":
            lines[row - 1] = lines[row - 1][:start] + "next" + lines[row - 1][token.end[1] :]
    return "".join(lines)


def collect_on_dask(client):
    """Let go of the futures that dask keeps for ever once their error has been raised.

    The client refers to the error, the error to the frames it passed, and those to the future.
    """
    for state in list(client.futures.values()):
        if state.exception is not None:
            state.exception.__traceback__ = state.traceback = None
    gc.collect()


class InTask:
    """``start`` in an event loop: a call that goes on beside the program."""

    def __init__(self, call, *arguments):
        self.task = asyncio.ensure_future(call(*arguments))

    async def result(self):
        task, self.task = self.task, None
        try:
            return await task
        finally:
            del task  # Its error refers to this frame: break the cycle.


def in_thread(call, *arguments):
    """``start`` without one.  The thread is a daemon: a call that hangs does not keep us here."""
    outcome = concurrent.futures.Future()

    def run(outcome):
        try:
            outcome.set_result(call(*arguments))
        except BaseException as error:
            outcome.set_exception(error)
            del outcome  # The error refers to this frame: break the cycle.

    threading.Thread(target=run, args=[outcome], daemon=True).start()
    return outcome


# ---- 2. What runs on the workers: tasks, Gate, Tally ----


def inc(x):
    return x + 1


def fail(text, *_):
    raise ValueError(text)


def fail_with_cause():
    try:
        {}["missing"]
    except KeyError as error:
        raise ValueError("the text", 7) from error


async def inc_later(x):
    await asyncio.sleep(0)
    return x + 1


async def fail_later(text):
    await asyncio.sleep(0)
    raise ValueError(text)


def name_of_worker(_=None):
    return get_worker().name


def name_unless_bob(dask_worker):
    if dask_worker.name == "bob":
        raise ValueError("it is bob")
    return dask_worker.name


async def name_later(dask_worker):
    await asyncio.sleep(0)
    return dask_worker.name


class Box:
    """An object of the user's own."""

    def __init__(self, value):
        self.value = value

    def plus(self, x):
        return self.value + x

    __call__ = plus


class Words(list):
    """A container that is none of the builtin ones."""


Point = collections.namedtuple("Point", "x y")


class Unfortunate(Exception):
    """An exception of the user's own."""


class Unreadable:
    """What can be pickled, but not unpickled."""

    def __reduce__(self):
        return int, ("no number",)


class Gate:
    """Holds up the tasks that go through it, in whatever process, until it is opened."""

    def __init__(self):
        self.path = tempfile.mkdtemp(dir=SCRATCH)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.open()  # However the program ends, no thread is left behind.

    def through(self, value=None, *_):
        """A task: wait until the gate is open."""
        open(f"{self.path}/reached", "w").close()
        deadline = time.monotonic() + 30
        while not os.path.exists(f"{self.path}/open"):
            assert time.monotonic() < deadline, "nobody opened the gate"
            time.sleep(0.005)
        return value

    def open(self):
        open(f"{self.path}/open", "w").close()

    def reached(self):
        """Whether a task has come to it."""
        return os.path.exists(f"{self.path}/reached")


class Tally:
    """A list of words, to which tasks in any process add."""

    def __init__(self):
        self.path = tempfile.mktemp(dir=SCRATCH)

    def add(self, word="once", *_):
        """A task: add a word; return how many there are now."""
        with open(self.path, "a") as file:
            file.write(f"{word}\n")
        return len(self.words())

    def fail_until(self, count):
        """A task: fail until it runs for the ``count``-th time; return ``count`` then."""
        if self.add() < count:
            raise ValueError("not often enough")
        return count

    def words(self):
        if not os.path.exists(self.path):
            return []
        with open(self.path) as file:
            return file.read().split()


# ---- 3. The programs ----


async def check(run, client, expected):
    """Run a program, compare what comes of it, and wait until the cluster holds nothing of it."""
    # What was left by a program that failed is held by its traceback, and none of our business.
    before = set(await client.who_has())
    try:
        value = await run(client)
    except Exception as error:
        if not (isinstance(expected, Raises) and isinstance(error, expected.kind)):
            raise
    else:
        assert expected == Gives(value), f"{expected} was expected, and it gave {value!r}"

    async def empty():
        if set(await client.who_has()) <= before:
            return True
        collect(client)
        return False

    await until(empty)


async def until(condition):
    """Wait for something that nothing can be awaited for."""
    deadline = time.monotonic() + 10
    while True:
        met = condition()
        if inspect.isawaitable(met):
            met = await met
        if met:
            return
        assert time.monotonic() < deadline, f"{condition.__qualname__} is never met"
        await sleep(0.005)


async def error_of(call, *args, **kwargs):
    """The name of what the call raises, at once or when it is awaited; None if nothing."""
    try:
        result = call(*args, **kwargs)
        if inspect.isawaitable(result):
            await result
    except (CancelledError, TimeoutError) as error:
        # Both modules have subclasses of their own.
        return "CancelledError" if isinstance(error, CancelledError) else "TimeoutError"
    except Exception as error:
        return type(error).__name__
    finally:
        # The error may live on where it came from, and it refers to this frame: let it hold no
        # future.
        call = args = kwargs = result = None


async def is_forgotten(client, key):
    """Wait until the scheduler does not know the key any more."""

    async def forgotten():
        return key not in await client.who_has()

    await until(forgotten)


async def all_is_known(client):
    """Wait until the scheduler has read all that this client has sent so far."""
    await client.submit(inc, 0, pure=False).result()


async def names(client):
    """{address: name} of the workers, told from each other by their threads."""
    return {a: {2: "alice", 1: "bob"}[n] for a, n in (await client.nthreads()).items()}


async def holders(client, future):
    """The names of the workers that hold the result of ``future``."""
    who_has = await client.who_has([future])
    name = await names(client)
    return sorted(name[address] for address in who_has[future.key])


async def words_of(tally, count):
    """The words of a tally when there are ``count`` of them."""
    await until(lambda: len(tally.words()) >= count)
    return tally.words()


# -- submit --


@program("submit", gives=3)
async def a_call_is_submitted_and_its_result_is_waited_for(client):
    future = client.submit(operator.add, 1, 2)
    return await future.result()


@program("submit", gives=6)
async def a_builtin_is_a_task(client):
    return await client.submit(sum, [1, 2, 3]).result()


@program("submit", gives=4)
async def a_lambda_is_a_task(client):
    return await client.submit(lambda x: x * 2, 2).result()


@program("submit", gives=12)
async def a_closure_is_a_task(client):
    ten = 10
    return await client.submit(lambda x: x + ten, 2).result()


@program("submit", gives=120)
async def a_recursive_function_is_a_task(client):
    def factorial(n):
        return n * factorial(n - 1) if n else 1

    return await client.submit(factorial, 5).result()


@program("submit", gives=7)
async def a_partial_is_a_task(client):
    return await client.submit(functools.partial(operator.add, 3), 4).result()


@program("submit", gives="loud")
async def a_method_of_a_builtin_object_is_a_task(client):
    return await client.submit("LOUD".lower).result()


@program("submit", gives=5)
async def a_method_of_a_users_object_is_a_task(client):
    return await client.submit(Box(2).plus, 3).result()


@program("submit", gives=5)
async def a_callable_object_is_a_task(client):
    return await client.submit(Box(2), 3).result()


@program("submit", gives=(True, 5))
async def a_class_is_a_task(client):
    box = await client.submit(Box, 5).result()
    return type(box) is Box, box.value


@program("submit", gives=None)
async def a_task_may_return_none(client):
    return await client.submit(print, end="").result()


@program("submit", gives=["Sized", "Sized"])
async def a_result_may_say_anything_of_its_size(client):
    class Sized:
        def __init__(self, nbytes):
            self.size = nbytes

        @property
        def nbytes(self):
            return self.size if self.size is True else 1 / 0

    results = await client.gather(client.map(Sized, [True, False]))
    return [type(result).__name__ for result in results]


@program("submit", gives=(1, 1_000_000))
async def large_arguments_and_results_arrive(client):
    return await client.submit(lambda data: (data[0], len(data)), b"\1" * 1_000_000).result()


@program("submit", gives=(False, "pending"))
async def submit_returns_before_the_task_is_done(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        return future.done(), future.status


@program("submit", gives=True)
async def equal_calls_have_equal_keys(client):
    return client.submit(inc, 1).key == client.submit(inc, 1).key


@program("submit", gives=3)
async def calls_with_other_arguments_have_other_keys(client):
    futures = [client.submit(int, "11"), client.submit(int, "12"), client.submit(int, "11", base=2)]
    return len({future.key for future in futures})


@program("submit", gives=True)
async def a_key_begins_with_the_name_of_the_function(client):
    return client.submit(inc, 1).key.startswith("inc-")


@program("submit", gives=["once", "once"])
async def a_call_runs_again_when_its_futures_are_gone(client):
    tally = Tally()
    future = client.submit(tally.add)
    key = future.key
    await wait(future)
    del future
    await is_forgotten(client, key)
    await wait(client.submit(tally.add))
    return tally.words()


@program("submit", gives=("mine", 2))
async def a_key_can_be_chosen(client):
    future = client.submit(inc, 1, key="mine")
    return future.key, await future.result()


@program("submit", gives=(("mine", 1), 2))
async def a_key_can_be_a_tuple(client):
    future = client.submit(inc, 1, key=("mine", 1))
    return future.key, await future.result()


@program("submit", gives=[2, 2])
async def of_two_calls_with_one_key_the_first_is_run(client):
    futures = [client.submit(inc, 1, key="both"), client.submit(inc, 7, key="both")]
    return await client.gather(futures)


@program("submit", gives=8)
async def a_key_is_free_when_its_futures_are_gone(client):
    future = client.submit(inc, 1, key="again")
    await wait(future)
    future.release()
    await is_forgotten(client, future.key)
    return await client.submit(inc, 7, key="again").result()


@program("submit", gives=["high", "middle", "low"])
async def tasks_of_higher_priority_run_first(client):
    tally = Tally()
    with Gate() as gate:
        gone = client.submit(gate.through, workers="bob")
        priorities = {"low": -10, "high": 10, "middle": 0}
        futures = [
            client.submit(tally.add, word, gone, workers="bob", priority=priority)
            for word, priority in priorities.items()
        ]
        # It is submitted last: when it runs, the scheduler knows of all the others.
        await client.submit(gate.open, workers="alice").result()
        await wait(futures)
    return tally.words()


@program("submit", gives=["most", "more", "less"])
async def a_priority_may_be_any_number(client):
    tally = Tally()
    with Gate() as gate:
        gone = client.submit(gate.through, workers="bob")
        futures = [
            client.submit(tally.add, word, gone, workers="bob", priority=priority)
            for word, priority in {"less": 0.25, "more": 0.5, "most": True}.items()
        ]
        await client.submit(gate.open, workers="alice").result()
        await wait(futures)
    return tally.words()


@program("submit", gives=3)
async def a_task_that_fails_is_retried_as_often_as_asked(client):
    tally = Tally()
    return await client.submit(tally.fail_until, 3, retries=2).result()


@program("submit", gives=("ValueError", 3))
async def a_task_that_fails_more_often_than_it_has_retries_has_failed(client):
    tally = Tally()
    future = client.submit(tally.fail_until, 9, retries=2)
    return await error_of(future.result), len(tally.words())


@program("submit", gives=("ValueError", 1))
async def a_task_that_fails_is_not_retried_unless_asked(client):
    tally = Tally()
    future = client.submit(tally.fail_until, 9)
    return await error_of(future.result), len(tally.words())


@program("submit", gives=["alice", "bob"])
async def a_worker_is_chosen_by_its_name(client):
    futures = [client.submit(name_of_worker, workers=name, pure=False) for name in ["alice", "bob"]]
    return await client.gather(futures)


@program("submit", gives=True)
async def workers_are_chosen_by_their_host(client):
    future = client.submit(name_of_worker, workers="127.0.0.1")
    return await future.result() in ("alice", "bob")


@program("submit", gives=["bob", "bob"])
async def workers_are_chosen_by_a_list_or_a_set(client):
    futures = [
        client.submit(name_of_worker, workers=chosen, pure=False)
        for chosen in [["bob", "nobody"], {"bob"}]
    ]
    return await client.gather(futures)


@program("submit", gives=True)
async def an_empty_list_of_workers_is_no_restriction(client):
    return await client.submit(name_of_worker, workers=[]).result() in ("alice", "bob")


@program("submit", gives=("TimeoutError", "pending"))
async def a_task_for_nobody_who_is_there_stays_pending(client):
    future = client.submit(inc, 1, workers="nobody")
    return await error_of(future.result, timeout=0.05), future.status


@program("submit", gives=2)
async def other_workers_may_be_allowed(client):
    return await client.submit(inc, 1, workers="nobody", allow_other_workers=True).result()


@program("submit", gives=["bob"])
async def the_result_stays_on_the_worker_that_ran_the_task(client):
    future = client.submit(inc, 1, workers="bob")
    await wait(future)
    return await holders(client, future)


@program("submit", gives=3)
async def tasks_run_side_by_side_in_the_threads_of_the_workers(client):
    gates = [Gate() for _ in range(3)]
    futures = [client.submit(gate.through, 1) for gate in gates]
    await until(lambda: all(gate.reached() for gate in gates))
    for gate in gates:
        gate.open()
    return sum(await client.gather(futures))


# -- futures as arguments --


@program("arguments", gives=11)
async def a_future_is_an_argument_before_it_is_done(client):
    with Gate() as gate:
        pending = client.submit(gate.through, 10)
        future = client.submit(inc, pending)
        gate.open()
        return await future.result()


@program("arguments", gives=[2, 3, 2])
async def futures_are_found_in_a_list(client):
    x, y = client.map(inc, [1, 2])
    return await client.submit(list, [x, y, x]).result()


@program("arguments", gives=(2, "x"))
async def futures_are_found_in_a_tuple(client):
    return await client.submit(tuple, (client.submit(inc, 1), "x")).result()


@program("arguments", gives={2, 7})
async def futures_are_found_in_a_set(client):
    return await client.submit(set, {client.submit(inc, 1), 7}).result()


@program("arguments", gives={"a": 2, "b": 0})
async def futures_are_found_among_the_values_of_a_dict(client):
    return await client.submit(dict, {"a": client.submit(inc, 1), "b": 0}).result()


@program("arguments", gives=(2, 5))
async def futures_are_found_in_a_namedtuple(client):
    return await client.submit(lambda p: (p.x, p.y), Point(client.submit(inc, 1), 5)).result()


@program("arguments", gives=[("a", 2)])
async def futures_are_found_in_an_ordered_dict(client):
    ordered = collections.OrderedDict(a=client.submit(inc, 1))
    return await client.submit(lambda d: list(d.items()), ordered).result()


@program("arguments", gives=5)
async def futures_are_keyword_arguments(client):
    x, y = client.map(inc, [1, 2])
    return await client.submit(lambda a, b: a + b[0], x, b=[y]).result()


@program("arguments", gives=4)
async def a_future_is_an_argument_twice(client):
    future = client.submit(inc, 1)
    return await client.submit(operator.add, future, future).result()


@program("arguments", gives=101)
async def a_chain_is_run_to_its_end(client):
    future = client.submit(inc, 0)
    for _ in range(100):
        future = client.submit(inc, future)
    return await future.result()


@program("arguments", gives=36)
async def a_tree_is_summed_up(client):
    futures = client.map(int, range(1, 9))
    while len(futures) > 1:
        futures = client.map(operator.add, futures[::2], futures[1::2])
    return await futures[0].result()


@program("arguments", gives=(2, ["bob"]))
async def an_input_is_fetched_from_another_worker(client):
    x = client.submit(int, 1, workers="alice")
    y = client.submit(inc, x, workers="bob")
    return await y.result(), await holders(client, y)


@program("arguments", gives=2)
async def an_input_is_kept_while_a_task_needs_it(client):
    with Gate() as gate:
        pending = client.submit(gate.through, 1)
        future = client.submit(inc, pending)
        del pending
        gate.open()
        return await future.result()


@program("arguments", gives=["named", 2])
async def a_string_that_equals_a_key_stays_a_string(client):
    future = client.submit(inc, 1, key="named")
    return await client.submit(list, ["named", future]).result()


IN_ANY_OBJECT = "a future is found at any depth of any object that is pickled with the call"


@program("arguments", gives=3, dask=Raises(TypeError), differs=IN_ANY_OBJECT)
async def a_future_is_found_in_an_object_of_the_users_own(client):
    return await client.submit(lambda box: box.value + 1, Box(client.submit(inc, 1))).result()


@program("arguments", gives=3, dask=Raises(TypeError), differs=IN_ANY_OBJECT)
async def a_future_is_found_in_a_deque(client):
    return await client.submit(sum, collections.deque([client.submit(inc, 1), 1])).result()


@program("arguments", gives=3, dask=Raises(TypeError), differs=IN_ANY_OBJECT)
async def a_future_is_found_in_a_partial(client):
    partial = functools.partial(operator.add, client.submit(inc, 1))
    return await client.submit(partial, 1).result()


@program("arguments", gives=3, dask=Raises(TypeError), differs=IN_ANY_OBJECT)
async def a_future_is_found_in_a_closure(client):
    future = client.submit(inc, 1)
    return await client.submit(lambda: future + 1).result()


# -- map --


@program("map", gives=[2, 3, 4])
async def map_calls_the_function_for_each_item(client):
    futures = client.map(inc, [1, 2, 3])
    return await client.gather(futures)


@program("map", gives=[3, 5])
async def map_gives_keyword_arguments_to_each_call(client):
    return await client.gather(client.map(int, ["11", "101"], base=2))


@program("map", gives=(list, 0))
async def map_of_nothing_is_an_empty_list(client):
    futures = client.map(inc, [])
    return type(futures), len(futures)


@program("map", gives=[[0, 1], ["a", "b"], ["k"], [5]])
async def map_goes_over_ranges_strings_dicts_and_sets(client):
    things = [range(2), "ab", {"k": 1}, {5}]
    return await client.gather([client.map(lambda x: x, thing) for thing in things])


@program("map", gives=[3, 4])
async def items_of_map_are_futures(client):
    return await client.gather(client.map(inc, client.map(inc, [1, 2])))


@program("map", gives=[4, 3])
async def items_of_map_contain_futures(client):
    two = client.submit(inc, 1)
    return await client.gather(client.map(sum, [[two, two], [1, two]]))


@program("map", gives=[3, 4])
async def keyword_arguments_of_map_are_futures(client):
    two = client.submit(inc, 1)
    return await client.gather(client.map(lambda x, y: x + y, [1, 2], y=two))


@program("map", gives=[100_001, 100_002])
async def keyword_arguments_of_map_are_large(client):
    futures = client.map(lambda n, data: n + len(data), [1, 2], data=bytes(100_000))
    return await client.gather(futures)


@program("map", gives=[2, 3])
async def map_takes_a_coroutine_function(client):
    return await client.gather(client.map(inc_later, [1, 2]))


@program("map", gives=(True, 2))
async def the_keys_of_map_have_a_common_prefix(client):
    keys = [future.key for future in client.map(inc, [1, 2], key="prefix")]
    return all(key.startswith("prefix-") for key in keys), len(set(keys))


@program("map", gives=([2, 3], [6], [0.0, 1.0]))
async def other_calls_have_other_keys_after_the_same_prefix(client):
    calls = [(inc, [1, 2]), (inc, [5]), (float, [0, 1])]
    futures = [client.map(func, items, key="prefix") for func, items in calls]
    return tuple([await client.gather(those) for those in futures])


@program("map", gives=(1, 2))
async def equal_calls_have_equal_keys_after_a_prefix_if_they_are_pure(client):
    pure = client.map(inc, [1, 1], key="prefix")
    other = client.map(inc, [1, 1], key="prefix", pure=False)
    return len({future.key for future in pure}), len({future.key for future in other})


@program("map", gives=["a", ("b", 1)])
async def the_keys_of_map_are_a_list(client):
    return [future.key for future in client.map(inc, [1, 2], key=["a", ("b", 1)])]


@program("map", gives=["a", "b"])
async def the_keys_of_map_are_a_tuple(client):
    return [future.key for future in client.map(inc, [1, 2], key=("a", "b"))]


@program("map", gives=(1, ["once", "once"]))
async def equal_items_of_map_have_equal_keys_and_run_once(client):
    tally = Tally()
    futures = client.map(tally.add, ["once"] * 3)
    await wait(futures)
    await wait(client.map(tally.add, ["once"], pure=False))
    return len({future.key for future in futures}), tally.words()


@program("map", gives=["x", "x", "x"])
async def equal_items_of_map_run_each_time_if_they_are_not_pure(client):
    tally = Tally()
    await wait(client.map(tally.add, "xxx", pure=False))
    return tally.words()


@program("map", gives=[3])
async def items_of_map_are_retried(client):
    tally = Tally()
    return await client.gather(client.map(tally.fail_until, [3], retries=2))


@program("map", gives=["bob", "bob"])
async def items_of_map_run_on_chosen_workers(client):
    return await client.gather(client.map(name_of_worker, [1, 2], workers=["bob"]))


@program("map", gives=[1, 2, 3, 4, 5])
async def map_sends_its_items_in_batches(client):
    return await client.gather(client.map(inc, range(5), batch_size=2))


@program("map", raises=TypeError)
async def map_needs_something_to_call(client):
    client.map("inc", [1])


@program("map", raises=TypeError)
async def map_needs_an_iterable(client):
    client.map(inc)


@program("map", raises=TypeError)
async def map_refuses_what_cannot_be_iterated_over(client):
    client.map(inc, 5)


@program("map", raises=TypeError)
async def map_refuses_a_future_instead_of_items(client):
    client.map(inc, client.submit(list))


@program(
    "map",
    gives=[2, 3],
    dask=Raises(TypeError),
    differs="map takes any iterable, generators too, as Python's own map does",
)
async def map_goes_over_an_iterator(client):
    return await client.gather(client.map(inc, iter([1, 2])))


@program(
    "map",
    raises=ValueError,
    dask=Gives(1),
    differs="dask makes as many futures as there are keys, and leaves the rest out",
)
async def map_refuses_a_list_of_keys_of_another_length(client):
    return len(client.map(inc, [1, 2], key=["a"]))


# -- gather --


@program("gather", gives=[3, 2])
async def gather_keeps_the_order_of_a_list(client):
    x, y = client.map(inc, [1, 2])
    return await client.gather([y, x])


@program("gather", gives=2)
async def gather_of_a_single_future_is_its_result(client):
    return await client.gather(client.submit(inc, 1))


@program("gather", gives=((2, 3), {2, 3}, {"a": 2}))
async def gather_keeps_the_type_of_the_container(client):
    x, y = client.map(inc, [1, 2])
    return await client.gather((x, y)), await client.gather({x, y}), await client.gather({"a": x})


@program("gather", gives=("OrderedDict", "a future"))
async def gather_leaves_a_dict_of_another_kind_as_it_is(client):
    gathered = await client.gather(collections.OrderedDict(a=client.submit(inc, 1)))
    kind = "a future" if isinstance(gathered["a"], Future) else "a value"
    return type(gathered).__name__, kind


@program("gather", gives=[1, "a", None, 2])
async def gather_leaves_everything_else_as_it_is(client):
    return await client.gather([1, "a", None, client.submit(inc, 1)])


@program("gather", gives=([], {}, 7, "abc"))
async def there_may_be_nothing_to_gather(client):
    values = [await client.gather(thing) for thing in ([], {}, 7, "abc")]
    return tuple(values)


@program("gather", gives=[2, 2, 2])
async def a_future_is_gathered_as_often_as_it_is_given(client):
    x, y = client.submit(inc, 1), client.submit(inc, 1)
    return await client.gather([x, x, y])


@program("gather", gives=[2, 3])
async def gather_waits_for_what_is_pending(client):
    with Gate() as gate:
        futures = [client.submit(gate.through, 2), client.submit(inc, 2)]
        gathering = start(client.gather, futures)
        gate.open()
        return await gathering.result()


@program("gather", gives=[2, 3])
async def gather_may_go_to_the_workers_directly(client):
    return await client.gather(client.map(inc, [1, 2]), direct=True)


@program("gather", raises=ZeroDivisionError)
async def gather_raises_the_error_of_a_task(client):
    await client.gather([client.submit(inc, 1), client.submit(operator.truediv, 1, 0)])


@program("gather", raises=ZeroDivisionError)
async def gather_raises_an_error_while_others_are_pending(client):
    with Gate() as gate:
        pending = client.submit(gate.through)
        await client.gather([pending, client.submit(operator.truediv, 1, 0)])


@program("gather", gives=[2, 4])
async def gather_skips_what_failed_in_a_list(client):
    bad = client.submit(fail, "bad")
    futures = [client.submit(inc, 1), bad, client.submit(inc, 3), bad]
    return await client.gather(futures, errors="skip")


@program("gather", gives={"good": 2, "bad": None})
async def gather_puts_none_for_what_failed_in_a_dict(client):
    futures = {"good": client.submit(inc, 1), "bad": client.submit(fail, "bad")}
    return await client.gather(futures, errors="skip")


@program("gather", gives=((2, None), Point(2, None), {2, None}))
async def gather_puts_none_for_what_failed_in_tuples_and_sets(client):
    x, bad = client.submit(inc, 1), client.submit(fail, "bad")
    shapes = ((x, bad), Point(x, bad), {x, bad})
    return tuple([await client.gather(shape, errors="skip") for shape in shapes])


@program("gather", gives=None)
async def gather_of_a_single_future_that_failed_is_none_if_errors_are_skipped(client):
    return await client.gather(client.submit(fail, "bad"), errors="skip")


@program(
    "gather",
    gives=[2, [3]],
    dask=Raises(TypeError),
    differs='dask looks for unhashable items in a set: errors="skip" with nested lists fails there',
)
async def gather_skips_what_failed_in_a_nested_list(client):
    x, y, bad = client.submit(inc, 1), client.submit(inc, 2), client.submit(fail, "bad")
    return await client.gather([x, [bad, y]], errors="skip")


@program("gather", raises=ValueError)
async def gather_refuses_a_future_of_another_client(client):
    async with connect(client.scheduler_info()["address"]) as other:
        await client.gather([other.submit(inc, 1)])


@program(
    "gather",
    raises=ValueError,
    dask=Gives([2]),
    differs="an unknown word is an error at the call; dask takes it for another one",
)
async def gather_refuses_an_unknown_way_to_treat_errors(client):
    return await client.gather([client.submit(inc, 1)], errors="nonsense")


# -- scatter --


@program("scatter", gives=(list, [1, "a"]))
async def a_list_is_scattered_item_by_item(client):
    futures = await client.scatter([1, "a"])
    return type(futures), await client.gather(futures)


@program("scatter", gives=(tuple, (1, 2)))
async def a_tuple_is_scattered_item_by_item(client):
    futures = await client.scatter((1, 2))
    return type(futures), await client.gather(futures)


@program("scatter", gives=[(set, {3, 4}), (frozenset, [3, 4])])
async def a_set_is_scattered_item_by_item(client):
    one, two = await client.scatter({3, 4}), await client.scatter(frozenset({3, 4}))
    frozen = sorted(await client.gather(list(two)))
    return [(type(one), await client.gather(one)), (type(two), frozen)]


@program("scatter", gives=(True, 5, 6))
async def a_namedtuple_is_scattered_field_by_field(client):
    futures = await client.scatter(Point(5, 6))
    return type(futures) is Point, await futures.x.result(), await futures.y.result()


@program("scatter", gives=([0, 1, 2], list))
async def a_range_is_scattered_as_a_list(client):
    futures = await client.scatter(range(3))
    return await client.gather(futures), type(futures)


@program("scatter", gives=[20, "text", None, b"bytes"])
async def anything_else_is_scattered_as_one_value(client):
    futures = [await client.scatter(thing) for thing in (20, "text", None, b"bytes")]
    return await client.gather(futures)


@program("scatter", gives=[("Words", ["x", "y"]), ("OrderedDict", ["a"])])
async def a_subclass_of_a_container_is_scattered_as_one_value(client):
    things = [Words("xy"), collections.OrderedDict(a=1)]
    values = [await (await client.scatter(thing)).result() for thing in things]
    return [(type(value).__name__, list(value)) for value in values]


@program("scatter", gives=("finished", True, int))
async def a_scattered_future_is_finished_at_once(client):
    future = await client.scatter(21)
    return future.status, future.done(), future.type


@program("scatter", gives=(True, False))
async def equal_data_has_an_equal_key(client):
    one, two, other = [await client.scatter(data) for data in (b"same", b"same", b"other")]
    return one.key == two.key, one.key == other.key


@program("scatter", gives=3)
async def equal_data_has_a_key_of_its_own_if_it_is_not_hashed(client):
    futures = await client.scatter(["same"] * 3, hash=False)
    return len({future.key for future in futures})


@program("scatter", gives=["bob"])
async def data_is_scattered_to_a_worker_by_name(client):
    return await holders(client, await client.scatter(24, workers="bob"))


@program("scatter", gives=["alice", "bob"])
async def data_is_scattered_to_workers_by_address(client):
    found = []
    for address in await client.nthreads():
        found += await holders(client, await client.scatter(b"for " + address.encode(), [address]))
    return sorted(found)


@program("scatter", gives=[["alice", "bob"], ["alice", "bob"]])
async def each_item_of_a_broadcast_list_is_on_every_worker(client):
    futures = await client.scatter([26, 27], broadcast=True)
    return [await holders(client, future) for future in futures]


@program("scatter", gives=["alice", "bob"])
async def data_that_was_gathered_is_broadcast_all_the_same(client):
    kept = await client.scatter(28)
    await client.gather(kept)
    return await holders(client, await client.scatter(28, broadcast=True))


@program("scatter", gives=["alice", "alice", "bob", "bob"])
async def items_go_to_one_worker_after_the_other(client):
    futures = await client.scatter([100, 101, 102, 103])
    return sorted([name for future in futures for name in await holders(client, future)])


@program("scatter", gives=["alice", "alice", "bob", "bob"])
async def items_go_to_one_worker_after_the_other_also_from_call_to_call(client):
    futures = [await client.scatter(number) for number in (200, 201, 202, 203)]
    return sorted([name for future in futures for name in await holders(client, future)])


@program("scatter", gives=True)
async def released_data_is_forgotten(client):
    future = await client.scatter(28)
    future.release()
    await is_forgotten(client, future.key)
    return True


@program("scatter", raises=TypeError)
async def an_iterator_cannot_be_scattered(client):
    await client.scatter(iter([1]))


@program("scatter", raises=TypeError)
async def what_cannot_be_pickled_cannot_be_scattered(client):
    await client.scatter(threading.Lock())


@program(
    "scatter",
    raises=TimeoutError,
    dask=Raises(ValueError),
    differs="scatter waits for a worker that is called so, up to its timeout, as submit does",
)
async def data_cannot_be_scattered_to_nobody(client):
    await client.scatter(29, workers=["nobody"], timeout=0.1)


@program(
    "scatter",
    gives=([], {}),
    dask=Raises(ValueError),
    differs="dask fails on an empty container, by accident",
)
async def an_empty_container_is_scattered(client):
    return await client.scatter([]), await client.scatter({})


@program(
    "scatter",
    raises=TypeError,
    dask=Gives("list"),
    differs="a Future is picklable only inside the arguments of a call; dask's arrives unbound",
)
async def a_future_cannot_be_scattered(client):
    return type(await client.scatter([client.submit(inc, 1)])).__name__


# -- cancel --


@program("cancel", gives=("cancelled", True, True))
async def a_cancelled_future_is_done(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        return future.status, future.cancelled(), future.done()


@program("cancel", gives=(None, "cancelled"))
async def a_future_cancels_itself(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        return await future.cancel(), future.status


@program("cancel", gives=("pending", False))
async def a_pending_future_is_not_cancelled(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        return future.status, future.cancelled()


@program("cancel", gives=(["cancelled"] * 3, "finished"))
async def a_list_of_futures_is_cancelled(client):
    with Gate() as gate:
        *futures, other = client.map(gate.through, range(4))
        await client.cancel(futures)
        gate.open()
        await wait(other)
        return [future.status for future in futures], other.status


@program("cancel", gives=("cancelled", "cancelled"))
async def futures_in_nested_containers_are_cancelled(client):
    with Gate() as gate:
        x, y = client.map(gate.through, range(2))
        await client.cancel({"a": [x], "b": (y,)})
        return x.status, y.status


@program("cancel", gives=[])
async def what_has_not_started_is_never_run(client):
    tally = Tally()
    with Gate() as gate:
        future = client.submit(tally.add, "x", client.submit(gate.through))
        await client.cancel(future)
        gate.open()
    await until(future.cancelled)
    return tally.words()


@program("cancel", gives="cancelled")
async def a_running_task_is_cancelled_without_waiting_for_it(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await until(gate.reached)
        await client.cancel(future)
        return future.status


@program(
    "cancel",
    gives=("finished", None),
    dask=Gives(("cancelled", "CancelledError")),
    differs="a value that is here stays readable, also when its task is cancelled afterwards",
)
async def a_finished_future_stays_readable_when_it_is_cancelled(client):
    future = client.submit(operator.add, "finished", "-cancelled")
    await future.result()
    await client.cancel(future)
    return future.status, await error_of(future.result)


@program("cancel", gives="cancelled")
async def an_erred_future_can_be_cancelled(client):
    future = client.submit(fail, "then cancelled")
    await wait(future)
    await client.cancel(future)
    return future.status


@program("cancel", gives="cancelled")
async def a_scattered_future_can_be_cancelled(client):
    future = await client.scatter("scattered-cancelled")
    await client.cancel(future)
    return future.status


@program(
    "cancel",
    gives="finished",
    dask=Gives("cancelled"),
    differs="a value that is here stays readable, also when its task is cancelled afterwards",
)
async def what_depends_on_a_cancelled_future_stays_readable_if_it_is_here(client):
    x = client.submit(operator.add, "input-", "cancelled")
    y = client.submit(str.upper, x)
    await y.result()
    await client.cancel(x)
    await all_is_known(client)
    return y.status


@program("cancel", gives="finished")
async def what_a_cancelled_future_depends_on_is_kept(client):
    with Gate() as gate:
        x = client.submit(inc, 30)
        y = client.submit(gate.through, x)
        await client.cancel(y)
        await wait(x)
        return x.status


@program("cancel", gives=("CancelledError", "cancelled"))
async def what_is_submitted_on_a_cancelled_future_is_cancelled(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        late = client.submit(str, [future])
        return await error_of(late.result), late.status


@program("cancel", gives=("cancelled", "cancelled"))
async def all_futures_of_the_key_are_cancelled(client):
    with Gate() as gate:
        one, two = client.submit(gate.through), client.submit(gate.through)
        await client.cancel(one)
        return one.status, two.status


@program("cancel", gives="CancelledError")
async def the_result_of_a_cancelled_future_is_an_error(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        return await error_of(future.result)


@program(
    "cancel",
    raises=CancelledError,
    dask=Gives((None, None)),
    differs="what was cancelled has neither result nor exception, and says so to who asks for one",
)
async def a_cancelled_future_has_no_exception(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        return await future.exception(), await future.traceback()


@program("cancel", raises=CancelledError)
async def gather_raises_if_a_future_was_cancelled(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        await client.gather([client.submit(inc, 1), future])


@program("cancel", gives=[2])
async def gather_skips_what_was_cancelled(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        return await client.gather([future, client.submit(inc, 1)], errors="skip")


@program("cancel", gives=["CancelledError", "CancelledError"])
async def wait_raises_if_a_future_was_cancelled(client):
    with Gate() as gate:
        future, fine = client.submit(gate.through), client.submit(inc, 1)
        await wait(fine)
        await client.cancel(future)
        return [
            await error_of(wait, [fine, future]),
            await error_of(wait, [fine, future], return_when="FIRST_COMPLETED"),
        ]


@program("cancel", gives=["CancelledError"] * 3)
async def those_who_wait_for_a_future_learn_that_it_is_cancelled(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        calls = [(future.result,), (client.gather, [future]), (wait, [future])]
        waiting = [start(*call) for call in calls]
        await until(gate.reached)
        await client.cancel(future)
        return [await error_of(call.result) for call in waiting]


@program("cancel", gives=[None, None, None])
async def there_may_be_nothing_to_cancel(client):
    return [await client.cancel(thing) for thing in ([], {}, ())]


@program("cancel", gives=("cancelled", "finished"))
async def what_another_client_wants_is_not_cancelled(client):
    async with connect(client.scheduler_info()["address"]) as other:
        with Gate() as gate:
            mine, theirs = client.submit(gate.through), other.submit(gate.through)
            await all_is_known(other)
            await client.cancel(mine)
            gate.open()
            await wait(theirs)
            return mine.status, theirs.status


@program("cancel", gives="CancelledError")
async def force_cancels_what_another_client_wants(client):
    async with connect(client.scheduler_info()["address"]) as other:
        with Gate() as gate:
            mine, theirs = client.submit(gate.through), other.submit(gate.through)
            await all_is_known(other)
            await mine.cancel(force=True)  # Which is client.cancel, of this future.
            return await error_of(theirs.result)


@program(
    "cancel",
    gives=6,
    dask=NOT_RUN,
    differs="what is submitted after a cancel is another call; dask mostly cancels it, too",
)
async def a_key_can_be_used_again_after_it_was_cancelled(client):
    future = client.submit(inc, 1, key="used again")
    await wait(future)
    await client.cancel(future)
    return await client.submit(inc, 5, key="used again").result()


# -- retry --


@program("retry", gives=(2, 2))
async def a_future_retries_itself(client):
    tally = Tally()
    future = client.submit(tally.fail_until, 2)
    await wait(future)
    await future.retry()
    return await future.result(), len(tally.words())


@program("retry", gives=("ValueError", 2))
async def a_retried_task_may_fail_again(client):
    tally = Tally()
    future = client.submit(tally.fail_until, 9)
    await wait(future)
    await client.retry([future])
    return await error_of(future.result), len(tally.words())


@program("retry", gives=[2, 2])
async def a_list_of_futures_is_retried(client):
    futures = [client.submit(Tally().fail_until, 2) for _ in range(2)]
    await wait(futures)
    await client.retry(futures)
    return await client.gather(futures)


@program("retry", gives=(3, 2))
async def to_retry_a_dependent_runs_what_failed_before_it_again(client):
    bad = client.submit(Tally().fail_until, 2)
    dependent = client.submit(inc, bad)
    await wait([bad, dependent])
    await client.retry(dependent)
    return await dependent.result(), await bad.result()


@program("retry", gives=(2, 3))
async def to_retry_what_failed_runs_its_dependents_again(client):
    bad = client.submit(Tally().fail_until, 2)
    dependent = client.submit(inc, bad)
    await wait([bad, dependent])
    await client.retry(bad)
    await until(lambda: dependent.status != "error")
    return await bad.result(), await dependent.result()


@program(
    "retry",
    gives=(1, ["once"]),
    dask=Gives((2, ["once", "once"])),
    differs="what has succeeded is not tried again",
)
async def a_finished_task_is_not_retried(client):
    tally = Tally()
    future = client.submit(tally.add)
    await wait(future)
    await client.retry(future)
    return await future.result(), tally.words()


@program("retry", gives=(2, ["once"]))
async def to_retry_a_dependent_does_not_run_what_is_finished_again(client):
    tally = Tally()
    finished = client.submit(tally.add)
    dependent = client.submit(inc, finished)
    await wait(dependent)
    await client.retry(dependent)
    return await dependent.result(), tally.words()


@program("retry", gives=[None, None])
async def there_may_be_nothing_to_retry(client):
    return [await client.retry(thing) for thing in ([], ())]


@program(
    "retry",
    gives="cancelled",
    dask=Raises(KeyError),
    differs="a cancelled future stays as it is; the scheduler of dask looks for its key in vain",
)
async def a_cancelled_future_is_not_retried(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        await all_is_known(client)
        await client.retry(future)
        return future.status


# -- status and exceptions --


@program("errors", gives=["pending", "finished"])
async def a_future_is_pending_and_then_finished(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await until(gate.reached)
        before = future.status
        gate.open()
        await wait(future)
        return [before, future.status]


@program("errors", gives=("error", True, False))
async def a_future_whose_task_failed_is_done(client):
    future = client.submit(fail, "bad")
    await wait(future)
    return future.status, future.done(), future.cancelled()


@program("errors", raises=ZeroDivisionError)
async def a_task_raises_its_error_where_its_result_is_asked_for(client):
    await client.submit(operator.truediv, 1, 0).result()


@program("errors", gives=("ValueError", ("the text", 7), "KeyError"))
async def an_exception_keeps_its_type_its_arguments_and_its_cause(client):
    error = await client.submit(fail_with_cause).exception()
    return type(error).__name__, error.args, type(error.__cause__).__name__


@program("errors", gives=(True, ("a", 1)))
async def an_exception_has_a_type_of_the_users_own(client):
    def raise_it():
        raise Unfortunate("a", 1)

    error = await client.submit(raise_it).exception()
    return type(error) is Unfortunate, error.args


@program("errors", gives=(None, None))
async def a_finished_future_has_no_exception(client):
    future = client.submit(inc, 1)
    return await future.exception(), await future.traceback()


@program("errors", gives=["fail"])
async def the_traceback_names_the_users_function(client):
    found = await client.submit(fail, "bad").traceback()
    return [frame.name for frame in traceback.extract_tb(found)][-1:]


@program("errors", gives=True)
async def the_raised_error_shows_the_users_frames(client):
    try:
        await client.submit(fail_with_cause).result()
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        return "fail_with_cause" in [frame.name for frame in frames]


@program("errors", gives=True)
async def the_traceback_of_a_dependent_names_the_function_that_failed(client):
    dependent = client.submit(inc, client.submit(fail, "bad"))
    frames = traceback.extract_tb(await dependent.traceback())
    return "fail" in [frame.name for frame in frames]


@program("errors", gives=([], "ValueError"))
async def a_dependent_of_what_failed_is_not_run(client):
    tally = Tally()
    future = client.submit(tally.add, client.submit(fail, "bad"))
    return tally.words(), await error_of(future.result)


@program("errors", gives=("ValueError", "ValueError"))
async def what_is_submitted_on_a_future_that_failed_fails_with_it(client):
    bad = client.submit(fail, "bad")
    await wait(bad)
    late = client.submit(sum, [1, bad])
    return await error_of(late.result), await error_of(bad.result)


@program("errors", gives=("ValueError", "ValueError"))
async def an_error_is_raised_as_often_as_it_is_asked_for(client):
    future = client.submit(fail, "bad")
    return await error_of(future.result), await error_of(future.result)


@program("errors", gives=("CancelledError", "error"))
async def a_task_that_raises_the_error_of_a_cancelled_one_has_failed(client):
    def raise_it():
        raise CancelledError

    future = client.submit(raise_it)
    return await error_of(future.result), future.status


@program("errors", gives="ValueError")
async def a_coroutine_function_fails_like_any_other(client):
    return await error_of(client.submit(fail_later, "bad").result)


@program("errors", raises=TypeError)
async def a_result_that_cannot_be_pickled_is_an_error(client):
    await client.submit(threading.Lock).result()


@program("errors", gives=("RuntimeError", "ValueError"))
async def an_argument_that_cannot_be_unpickled_is_an_error_with_its_cause(client):
    error = await client.submit(str, Unreadable()).exception()
    return type(error).__name__, type(error.__cause__).__name__


@program(
    "errors",
    raises=RuntimeError,
    dask=Raises(ValueError),
    differs="the error says that it is the result which cannot be unpickled; dask raises its cause",
)
async def a_result_that_cannot_be_unpickled_is_an_error(client):
    await client.submit(Unreadable).result()


# -- as_completed --


@program("as_completed", gives=["quick", "slow"])
async def futures_come_in_the_order_in_which_they_complete(client):
    with Gate() as gate:
        futures = [client.submit(gate.through, "slow"), client.submit(str, "quick")]
        results = []
        async for future in as_completed(futures):
            results.append(await future.result())
            gate.open()
        return results


@program("as_completed", gives=True)
async def the_very_futures_are_given_back(client):
    future = client.submit(inc, 1)
    return await anext(as_completed([future])) is future


@program("as_completed", gives=[(True, 2)])
async def with_results_there_are_pairs(client):
    future = client.submit(inc, 1)
    pairs = as_completed([future], with_results=True)
    return [(one is future, result) async for one, result in pairs]


@program("as_completed", raises=ZeroDivisionError)
async def with_results_an_error_is_raised(client):
    bad = client.submit(operator.truediv, 1, 0)
    await anext(as_completed([bad], with_results=True))


@program("as_completed", gives=(True, "ZeroDivisionError"))
async def an_error_is_a_result_like_any_other_if_errors_are_not_raised(client):
    bad = client.submit(operator.truediv, 1, 0)
    pairs = as_completed([bad], with_results=True, raise_errors=False)
    future, (kind, error, frames) = await anext(pairs)
    return future is bad and type(error) is kind, kind.__name__


@program("as_completed", gives=(True, 1))
async def a_result_comes_as_itself_if_errors_are_not_raised(client):
    good = client.submit(abs, -1)
    future, result = await anext(as_completed([good], with_results=True, raise_errors=False))
    return future is good, result


@program("as_completed", gives=["error"])
async def futures_that_failed_come_too(client):
    return [future.status async for future in as_completed([client.submit(fail, "bad")])]


@program("as_completed", gives=["cancelled", "finished"])
async def futures_that_were_cancelled_come_too(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        futures = as_completed([future, client.submit(inc, 1)])
        return sorted([future.status async for future in futures])


@program("as_completed", gives="cancelled")
async def a_future_comes_when_it_is_cancelled(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        coming = start(anext, as_completed([future]))
        await until(gate.reached)
        await client.cancel(future)
        return (await coming.result()).status


@program("as_completed", gives=True)
async def with_results_a_cancelled_future_comes_with_its_error(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await client.cancel(future)
        _, result = await anext(as_completed([future], with_results=True))
        return isinstance(result, CancelledError)


@program("as_completed", gives=[2, 2, 2])
async def a_future_comes_as_often_as_it_was_given(client):
    future = client.submit(inc, 1)
    return [await one.result() async for one in as_completed([future] * 3)]


@program("as_completed", gives=[2, 3])
async def several_futures_are_added_at_once(client):
    futures = as_completed()
    futures.update(client.map(inc, [1, 2]))
    return sorted([await future.result() async for future in futures])


@program("as_completed", gives=([2], [3], []))
async def futures_are_added_after_it_has_run_dry(client):
    futures = as_completed([client.submit(inc, 1)])
    first = [await future.result() async for future in futures]
    futures.add(client.submit(inc, 2))
    second = [await future.result() async for future in futures]
    return first, second, [future async for future in futures]


@program("as_completed", gives=[2, 3])
async def any_iterable_of_futures_will_do(client):
    futures = as_completed(client.submit(inc, x) for x in [1, 2])
    return sorted([await future.result() async for future in futures])


@program("as_completed", gives="nothing")
async def nothing_comes_of_nothing(client):
    return await anext(as_completed([]), "nothing")


@program("as_completed", gives=[(2, False), (1, False), (0, True)])
async def it_counts_what_has_not_come_yet(client):
    with Gate() as gate:
        futures = as_completed([client.submit(gate.through), client.submit(inc, 1)])
        seen = [(futures.count(), futures.is_empty())]
        async for _ in futures:
            seen.append((futures.count(), futures.is_empty()))
            gate.open()
        return seen


@program("as_completed", gives=(False, True))
async def it_says_whether_a_future_is_ready(client):
    with Gate() as gate:
        futures = as_completed([client.submit(gate.through)])
        before = futures.has_ready()
        gate.open()
        await until(futures.has_ready)
        return before, futures.has_ready()


@program("as_completed", gives=[])
async def a_batch_is_empty_if_nothing_is_ready_and_it_does_not_wait(client):
    with Gate() as gate:
        return as_completed([client.submit(gate.through)]).next_batch(block=False)


@program("as_completed", gives=([2], 1))
async def a_batch_is_all_that_is_ready(client):
    with Gate() as gate:
        futures = as_completed([client.submit(gate.through), client.submit(inc, 1)])
        await until(futures.has_ready)
        batch = futures.next_batch(block=True)
        return await client.gather(batch), futures.count()


@program("as_completed", gives=[(True, 2)])
async def a_batch_with_results_is_a_list_of_pairs(client):
    future = client.submit(inc, 1)
    futures = as_completed([future], with_results=True)
    await until(futures.has_ready)
    return [(one is future, result) for one, result in futures.next_batch()]


@program("as_completed", gives=[["quick"], ["slow"]], only="synchronous")
async def batches_come_as_they_complete(client):
    with Gate() as gate:
        futures = [client.submit(gate.through, "slow"), client.submit(str, "quick")]
        results = []
        for batch in as_completed(futures).batches():
            results.append(await client.gather(batch))
            gate.open()
        return results


@program("as_completed", gives=(0, True, "nothing"))
async def it_can_be_cleared(client):
    with Gate() as gate:
        futures = as_completed([client.submit(gate.through)])
        futures.clear()
        return futures.count(), futures.is_empty(), await anext(futures, "nothing")


@program("as_completed", gives=[], only="synchronous")
async def who_waits_for_futures_that_are_cleared_is_told(client):
    with Gate() as gate:
        futures = as_completed([client.submit(gate.through)])
        waiting = start(list, futures)
        await until(gate.reached)
        futures.clear()
        return waiting.result(timeout=10)


@program("as_completed", gives=[1, 2, 3, 4], only="synchronous")
async def threads_share_an_iterator(client):
    futures = as_completed(client.map(inc, range(4)))
    shares = [start(list, futures) for _ in range(3)]
    return sorted(future.result() for share in shares for future in share.result(timeout=10))


@program("as_completed", gives=["TimeoutError", "TimeoutError"])
async def it_waits_until_a_timeout(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        iterators = [as_completed([future], timeout=timeout) for timeout in (0.02, "20 ms")]
        return [await error_of(anext, futures) for futures in iterators]


@program("as_completed", raises=TypeError)
async def it_takes_nothing_but_futures(client):
    as_completed([client.submit(inc, 1), 1])


@program("as_completed", raises=TypeError)
async def only_a_future_is_added(client):
    as_completed([]).add(1)


@program(
    "as_completed",
    raises=ValueError,
    dask=Gives([2, 3]),
    differs="futures that are waited for together are those of one client",
)
async def as_completed_goes_over_the_futures_of_one_client(client):
    async with connect(client.scheduler_info()["address"]) as other:
        futures = as_completed([client.submit(inc, 1), other.submit(inc, 2)])
        return sorted([await future.result() async for future in futures])


# -- wait --


@program("wait", gives=(("done", "not_done"), 2, 0))
async def wait_waits_for_all(client):
    futures = client.map(inc, [1, 2])
    waited = await wait(futures)
    return waited._fields, len(waited.done), len(waited.not_done)


@program("wait", gives=(True, True))
async def wait_gives_two_sets_of_the_very_futures(client):
    future = client.submit(inc, 1)
    done, not_done = await wait([future])
    return done == {future}, not_done == set()


@program(
    "wait",
    gives=2,
    dask=Gives(0),
    differs="futures are also found in an iterator, or the values of a dict; dask passes them over",
)
async def wait_goes_over_an_iterator(client):
    done, _ = await wait(iter(client.map(inc, [1, 2])))
    return len(done)


@program("wait", gives=["finished", "error"])
async def wait_does_not_raise_what_a_task_raised(client):
    done, _ = await wait([client.submit(inc, 1), client.submit(fail, "bad")])
    return sorted([future.status for future in done], reverse=True)


@program("wait", gives=("error", "pending"))
async def a_future_that_failed_is_completed(client):
    with Gate() as gate:
        slow, bad = client.submit(gate.through), client.submit(fail, "bad")
        done, not_done = await wait([slow, bad], return_when="FIRST_COMPLETED")
        return done.pop().status, not_done.pop().status


@program("wait", gives=["TimeoutError", "TimeoutError", "TimeoutError"])
async def wait_raises_after_a_timeout(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        return [await error_of(wait, [future], timeout) for timeout in (0, 0.02, "20 ms")]


@program("wait", gives=["pending", "finished"])
async def a_task_goes_on_after_a_timeout(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        await error_of(wait, [future], timeout=0.02)
        before = future.status
        gate.open()
        await wait([future], timeout="20 s")
        return [before, future.status]


@program("wait", gives=(0, 0))
async def there_may_be_nothing_to_wait_for(client):
    done, not_done = await wait([])
    return len(done), len(not_done)


@program("wait", gives=(1, 3, 2))
async def wait_takes_a_future_a_nested_container_or_a_dict(client):
    x, y, z = client.map(inc, [1, 2, 3])
    waited = [await wait(things) for things in (x, [x, (y, {z})], {"a": x, "b": [y]})]
    return tuple(len(done) for done, _ in waited)


@program("wait", gives=1)
async def wait_counts_a_future_once(client):
    future = client.submit(inc, 1)
    done, _ = await wait([future, future])
    return len(done)


@program("wait", raises=TypeError)
async def wait_takes_one_collection_of_futures(client):
    x, y = client.map(inc, [1, 2])
    await wait(x, y)


@program(
    "wait",
    gives=("error", "pending"),
    dask=Raises(NotImplementedError),
    differs="FIRST_EXCEPTION is built, as in concurrent.futures",
)
async def wait_can_wait_for_the_first_exception(client):
    with Gate() as gate:
        slow, bad = client.submit(gate.through), client.submit(fail, "bad")
        done, not_done = await wait([slow, bad], return_when="FIRST_EXCEPTION")
        return done.pop().status, not_done.pop().status


@program(
    "wait",
    raises=ValueError,
    dask=Gives(2),
    differs="futures that are waited for together are those of one client",
)
async def wait_waits_for_the_futures_of_one_client(client):
    async with connect(client.scheduler_info()["address"]) as other:
        return len((await wait([client.submit(inc, 1), other.submit(inc, 2)])).done)


@program(
    "wait",
    raises=ValueError,
    dask=Raises(NotImplementedError),
    differs="a word that means nothing is a ValueError, as in concurrent.futures",
)
async def wait_refuses_an_unknown_word(client):
    await wait([client.submit(inc, 1)], return_when="nonsense")


# -- fire_and_forget, futures_of, get_worker --

# Fired and forgotten is here what is known to the scheduler and has not run: dask loses what is not
# known yet, and keeps what has run for ever.


@program("others", gives=["once"])
async def what_is_fired_and_forgotten_runs_although_its_future_is_gone(client):
    tally = Tally()
    with Gate() as gate:
        future = client.submit(tally.add, "once", client.submit(gate.through))
        await all_is_known(client)
        fire_and_forget(future)
        del future
        await all_is_known(client)
    return await words_of(tally, 1)


@program("others", gives=["x", "y"])
async def nested_futures_are_fired_and_forgotten(client):
    tally = Tally()
    with Gate() as gate:
        x, y = client.map(tally.add, "xy", [client.submit(gate.through)] * 2)
        await all_is_known(client)
        fire_and_forget({"a": [x], "b": y})
        del x, y
        await all_is_known(client)
    return sorted(await words_of(tally, 2))


@program("others", gives=["once"])
async def what_depends_on_what_is_fired_and_forgotten_runs_once(client):
    tally = Tally()
    with Gate() as gate:
        future = client.submit(tally.add, "once", client.submit(gate.through))
        dependent = client.submit(inc, future)
        await all_is_known(client)
        fire_and_forget([future, dependent])
        await all_is_known(client)
    await wait(dependent)
    return tally.words()


@program("others", gives=("error", "ValueError"))
async def what_is_fired_and_forgotten_may_fail(client):
    with Gate() as gate:
        future = client.submit(fail, "bad", client.submit(gate.through))
        await all_is_known(client)
        fire_and_forget(future)
        await all_is_known(client)
    await wait(future)
    return future.status, await error_of(future.result)


@program("others", gives=(True, list))
async def futures_of_finds_futures_in_nested_containers(client):
    x, y, z = client.map(inc, [1, 2, 3])
    found = futures_of([x, (y, {"a": {z}}), 1, "a"])
    return set(found) == {x, y, z}, type(found)


@program("others", gives=1)
async def futures_of_finds_a_future_once(client):
    future = client.submit(inc, 1)
    return len(futures_of([future, [future]]))


@program("others", gives=(1, 0, 0))
async def futures_of_takes_anything(client):
    return len(futures_of(client.submit(inc, 1))), len(futures_of(1)), len(futures_of([]))


@program("others", gives=True)
async def a_task_asks_for_its_worker(client):
    name, address = await client.submit(
        lambda: (get_worker().name, get_worker().address), workers="bob"
    ).result()
    return (await names(client))[address] == name


@program("others", raises=ValueError)
async def there_is_no_worker_outside_of_a_task(client):
    get_worker()


@program("others", gives=True)
async def a_worker_that_was_killed_is_an_exception(client):
    return issubclass(KilledWorker, Exception)


# -- Future --


@program("Future", gives=[int, str, type(None)])
async def the_type_of_a_result_is_known(client):
    futures = [client.submit(inc, 1), client.submit(str, "a"), client.submit(print, end="")]
    await wait(futures)
    return [future.type for future in futures]


@program("Future", gives=(None, None))
async def there_is_no_type_without_a_result(client):
    with Gate() as gate:
        pending, bad = client.submit(gate.through), client.submit(fail, "bad")
        await wait(bad)
        return pending.type, bad.type


@program(
    "Future",
    gives=("Box", False),
    dask=Gives(("Box", True)),
    differs="a type travels by its name: one that is in no module here stays a name",
)
async def the_type_of_a_result_may_be_in_no_module(client):
    future = client.submit(Box, 1)
    await wait(future)
    return getattr(future.type, "__name__", future.type), isinstance(future.type, type)


@program("Future", gives=True)
async def a_future_knows_its_client(client):
    return client.submit(inc, 1).client is client


@program("Future", gives=True)
async def a_future_is_an_instance_of_its_class(client):
    return isinstance(client.submit(inc, 1), Future)


@program("Future", gives=(False, True, 2))
async def a_future_is_equal_to_itself_only(client):
    one, two = client.submit(inc, 1), client.submit(inc, 1)
    return one == two, one == one, len({one, two})


@program(
    "Future",
    gives=[
        "<Future: finished, type: int, key: w>",
        "<Future: error, key: x>",
        "<Future: pending, key: y>",
        "<Future: cancelled, key: z>",
    ],
)
async def a_future_shows_its_status_its_type_and_its_key(client):
    with Gate() as gate:
        good, bad = client.submit(inc, 1, key="w"), client.submit(fail, "bad", key="x")
        pending, stopped = client.map(gate.through, [1, 2], key=["y", "z"])
        await wait([good, bad])
        await client.cancel(stopped)
        return [repr(future) for future in (good, bad, pending, stopped)]


@program("Future", gives=[2, 2])
async def a_result_is_asked_for_twice(client):
    future = client.submit(inc, 1)
    return [await future.result(), await future.result()]


@program("Future", gives=[False, False])
async def each_result_is_a_value_of_its_own(client):
    future = client.submit(list, "ab")
    one, two = await future.result(), await future.result()
    return [one is two, one != two]


@program("Future", gives=["TimeoutError"] * 4)
async def a_result_is_waited_for_until_a_timeout(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        timeouts = (0, 0.02, "20 ms", "0.02s")
        return [await error_of(future.result, timeout=timeout) for timeout in timeouts]


@program("Future", gives=["TimeoutError", "TimeoutError"])
async def exception_and_traceback_are_waited_for_until_a_timeout(client):
    with Gate() as gate:
        future = client.submit(gate.through)
        calls = [future.exception, future.traceback]
        return [await error_of(call, timeout=0.02) for call in calls]


@program("Future", gives=[2, 2, 2, 2])
async def a_timeout_is_a_number_or_a_string(client):
    future = client.submit(inc, 1)
    return [await future.result(timeout=timeout) for timeout in (None, 20, "20 s", "20000ms")]


@program("Future", gives=True)
async def a_future_is_released_twice(client):
    future = client.submit(inc, 1)
    await wait(future)
    future.release()
    future.release()
    await is_forgotten(client, future.key)
    return True


@program("Future", gives=2)
async def a_result_is_kept_while_another_future_of_its_key_lives(client):
    one, two = client.submit(inc, 1), client.submit(inc, 1)
    await wait(one)
    one.release()
    return await two.result()


@program("Future", gives=[(True, "finished")])
async def a_callback_is_called_with_the_future_when_it_is_done(client):
    seen = []
    with Gate() as gate:
        future = client.submit(gate.through)
        future.add_done_callback(lambda done: seen.append((done is future, done.status)))
    await until(lambda: seen)
    return seen


@program("Future", gives=["finished"])
async def a_callback_is_called_if_the_future_is_done_already(client):
    seen = []
    future = client.submit(inc, 1)
    await wait(future)
    future.add_done_callback(lambda done: seen.append(done.status))
    await until(lambda: seen)
    return seen


@program("Future", gives=["cancelled", "error"])
async def a_callback_is_called_if_the_task_failed_or_was_cancelled(client):
    seen = []
    with Gate() as gate:
        pending, bad = client.submit(gate.through), client.submit(fail, "bad")
        for future in (pending, bad):
            future.add_done_callback(lambda done: seen.append(done.status))
        await client.cancel(pending)
        await until(lambda: len(seen) == 2)
        return sorted(seen)


@program("Future", gives=[1, 2, 3])
async def all_callbacks_are_called(client):
    seen = []
    future = client.submit(inc, 1)
    for number in [1, 2, 3]:
        future.add_done_callback(lambda _, number=number: seen.append(number))
    await until(lambda: len(seen) == 3)
    return sorted(seen)


@program("Future", gives=[True, True])
async def a_copy_of_a_future_is_a_future_of_the_same_key(client):
    future = client.submit(inc, 1)
    copies = [copy.copy(future), copy.deepcopy([future])[0]]
    return [isinstance(c, Future) and c.key == future.key for c in copies]


@program("Future", gives="a note")
async def users_keep_notes_at_a_future(client):
    future = client.submit(inc, 1)
    future.note = "a note"
    return future.note


@program("Future", gives=(None, False))
async def a_callback_is_called_in_another_thread(client):
    threads = []
    future = client.submit(inc, 1)
    returned = future.add_done_callback(lambda _: threads.append(threading.get_ident()))
    await until(lambda: threads)
    return returned, threads == [threading.get_ident()]


# -- looking inside --


@program("look", gives=[1, 2])
async def nthreads_are_those_of_each_worker_by_address(client):
    return sorted((await client.nthreads()).values())


@program("look", gives=True)
async def ncores_is_another_name_of_nthreads(client):
    return await client.ncores() == await client.nthreads()


@program("look", gives=([2], [1]))
async def nthreads_are_those_of_chosen_workers(client):
    (bob,) = [address for address, name in (await names(client)).items() if name == "bob"]
    alice, bob = await client.nthreads(["alice"]), await client.nthreads([bob])
    return list(alice.values()), list(bob.values())


@program("look", gives={"x": ["alice"], "y": ["bob"]})
async def who_has_says_which_workers_hold_each_result(client):
    x = client.submit(inc, 1, key="x", workers="alice")
    y = client.submit(inc, 2, key="y", workers="bob")
    await wait([x, y])
    name = await names(client)
    who_has = await client.who_has()
    return {key: [name[address] for address in who_has[key]] for key in ("x", "y")}


@program("look", gives=[1, 1, 2])
async def who_has_takes_a_future_or_several(client):
    x, y = client.map(inc, [1, 2])
    await wait([x, y])
    return [len(await client.who_has(things)) for things in (x, [x], [x, y])]


@program("look", gives=[{}] * 5)
async def nothing_is_told_of_nothing(client):
    future = client.submit(inc, 1)
    await wait(future)
    asked = (client.who_has, client.has_what, client.nthreads, client.processing, client.nbytes)
    return [await ask([]) for ask in asked]


@program("look", gives={"unfinished": 0})
async def nobody_has_what_is_pending(client):
    with Gate() as gate:
        future = client.submit(gate.through, key="unfinished")
        await until(gate.reached)
        return {key: len(who) for key, who in (await client.who_has([future])).items()}


@program("look", gives={"alice": ["x"], "bob": ["y"]})
async def has_what_says_which_results_each_worker_holds(client):
    x = client.submit(inc, 1, key="x", workers="alice")
    y = client.submit(inc, 2, key="y", workers="bob")
    await wait([x, y])
    name = await names(client)
    has_what = await client.has_what()
    return {name[a]: [key for key in keys if key in ("x", "y")] for a, keys in has_what.items()}


@program("look", gives=[1, 1])
async def has_what_takes_names_or_addresses(client):
    future = client.submit(inc, 2, key="y", workers="bob")
    await wait(future)
    ((address, _),) = (await client.nthreads(["bob"])).items()
    found = [await client.has_what(chosen) for chosen in (["bob"], [address])]
    return [future.key in has_what[address] and len(has_what) for has_what in found]


@program("look", gives={"alice": [], "bob": ["busy"]})
async def processing_says_what_each_worker_runs(client):
    with Gate() as gate:
        future = client.submit(gate.through, key="busy", workers="bob")
        await until(gate.reached)
        name = await names(client)
        found = await client.processing()
        assert not future.done()
        return {name[address]: list(keys) for address, keys in found.items()}


@program("look", gives=[[], []])
async def nothing_is_processed_when_all_is_done(client):
    await client.submit(inc, 1).result()

    async def idle():
        return not any((await client.processing()).values())

    await until(idle)
    return [list(keys) for keys in (await client.processing()).values()]


@program("look", gives=True)
async def nbytes_are_those_of_each_result(client):
    future = client.submit(bytes, 100_000)
    await wait(future)
    return (await client.nbytes(summary=False))[future.key] >= 100_000


@program("look", gives=True)
async def nbytes_are_summed_up_by_the_names_in_the_keys(client):
    futures = [client.submit(bytes, 100_000 + n, key=f"blob-{n}") for n in range(2)]
    await wait(futures)
    return (await client.nbytes())["blob"] >= 200_001


@program("look", gives=["blob-2"])
async def nbytes_are_those_of_chosen_keys(client):
    futures = [client.submit(bytes, n, key=f"blob-{n}") for n in (1, 2)]
    await wait(futures)
    return list(await client.nbytes(["blob-2"], summary=False))


@program("look", gives=("Scheduler", True))
async def the_scheduler_tells_its_address(client):
    info = client.scheduler_info()
    return info["type"], info["address"].startswith("tcp://127.0.0.1:")


@program("look", gives=[("alice", 2), ("bob", 1)], only="synchronous")
async def the_scheduler_tells_its_workers(client):
    workers = client.scheduler_info()["workers"]
    return sorted((worker["name"], worker["nthreads"]) for worker in workers.values())


@program("look", gives=True)
async def the_story_of_a_key_is_a_list_of_what_happened_to_it(client):
    future = client.submit(inc, 1, key="told")
    await wait(future)
    return any("memory" in event for event in await client.story("told"))


# -- run --


@program("run", gives=[5, 5])
async def run_takes_keyword_arguments(client):
    return list((await client.run(int, "101", base=2)).values())


@program("run", gives=True)
async def run_gives_the_worker_to_a_parameter_that_asks_for_it(client):
    return await client.run(lambda dask_worker: dask_worker.name) == await names(client)


@program("run", gives=True)
async def run_gives_the_worker_to_a_parameter_with_a_default(client):
    return await client.run(lambda dask_worker=None: dask_worker.name) == await names(client)


@program("run", gives=True)
async def run_takes_a_coroutine_function(client):
    return await client.run(name_later) == await names(client)


@program("run", gives=["bob"])
async def run_takes_the_addresses_of_workers(client):
    (bob,) = [address for address, name in (await names(client)).items() if name == "bob"]
    return list((await client.run(name_later, workers=[bob])).values())


@program("run", gives=True)
async def run_takes_the_keys_of_a_dict_of_workers(client):
    return await client.run(name_later, workers=(await names(client)).keys()) == await names(client)


@program("run", gives={})
async def run_may_run_nowhere(client):
    return await client.run(inc, 1, workers=[])


@program("run", raises=ValueError)
async def run_raises_what_the_function_raised(client):
    await client.run(name_unless_bob)


@program("run", raises=ValueError)
async def run_raises_errors_if_asked(client):
    await client.run(name_unless_bob, on_error="raise")


@program("run", gives=["'alice'", "ValueError('it is bob')"])
async def run_returns_errors_if_asked(client):
    results = await client.run(name_unless_bob, on_error="return")
    return sorted(map(repr, results.values()))


@program("run", gives=["alice"])
async def run_ignores_errors_if_asked(client):
    return list((await client.run(name_unless_bob, on_error="ignore")).values())


@program("run", raises=ValueError)
async def run_refuses_an_unknown_way_to_treat_errors(client):
    await client.run(name_unless_bob, on_error="nonsense")


@program("run", raises=TypeError)
async def run_refuses_what_cannot_be_pickled(client):
    await client.run(str, threading.Lock())


@program("run", raises=TypeError)
async def run_needs_something_to_call(client):
    await client.run(1)


@program(
    "run",
    gives=["bob"],
    dask=Raises(ValueError),
    differs="workers= means the same everywhere; in dask run takes addresses only",
)
async def run_takes_the_names_of_workers(client):
    return list((await client.run(name_later, workers=["bob"])).values())


@program(
    "run",
    raises=TypeError,
    dask=Gives(["Future", "Future"]),
    differs="a Future is picklable only inside the arguments of a call; dask's arrives unbound",
)
async def a_future_is_no_argument_of_run(client):
    results = await client.run(lambda future: type(future).__name__, client.submit(inc, 1))
    return list(results.values())


# -- clients --


@program("client", gives=(True, True))
async def the_current_client_is_the_one_that_was_made(client):
    return Client.current() is client, default_client() is client


@program("client", gives=True)
async def the_default_client_is_the_one_that_is_given(client):
    async with connect(client.scheduler_info()["address"]) as other:
        return default_client(client) is client and default_client() is other


@program("client", gives=(True, True))
async def the_current_client_is_the_one_that_was_made_last(client):
    async with connect(client.scheduler_info()["address"]) as other:
        inside = Client.current() is other
    return inside, Client.current() is client


@program("client", gives=["finished", "finished"])
async def two_clients_share_what_they_submit(client):
    async with connect(client.scheduler_info()["address"]) as other:
        tally = Tally()
        mine, theirs = client.submit(tally.add), other.submit(tally.add)
        await wait(mine)
        await wait(theirs)
        assert tally.words() == ["once"]
        return [mine.status, theirs.status]


@program("client", gives=2)
async def a_client_keeps_what_another_has_released(client):
    mine = client.submit(inc, 1)
    async with connect(client.scheduler_info()["address"]) as other:
        await other.submit(inc, 1).result()
    return await mine.result()


@program("client", gives="cancelled")
async def what_is_pending_when_its_client_is_closed_is_cancelled(client):
    with Gate() as gate:
        async with connect(client.scheduler_info()["address"]) as other:
            future = other.submit(gate.through)
        return future.status


@program(
    "client",
    raises=RuntimeError,
    dask=Raises(Exception),
    differs="a closed client raises RuntimeError; dask a ClosedClientError, which is an Exception",
)
async def nothing_is_submitted_to_a_closed_client(client):
    async with connect(client.scheduler_info()["address"]) as other:
        pass
    other.submit(inc, 1)


@program(
    "client",
    gives="finished",
    dask=Gives("cancelled"),
    differs="what is here when the client is closed stays readable; dask cancels it",
)
async def a_finished_future_stays_so_when_its_client_is_closed(client):
    async with connect(client.scheduler_info()["address"]) as other:
        future = other.submit(inc, 1)
        await future.result()
    return future.status


@program(
    "client",
    raises=ValueError,
    dask=Gives(3),
    differs="a client submits its own futures; dask finds those of others by their keys",
)
async def a_future_of_another_client_is_no_argument(client):
    async with connect(client.scheduler_info()["address"]) as other:
        future = other.submit(inc, 1)
        await wait(future)
        return await client.submit(inc, future).result()


@program("client", gives=[None, None])
async def one_can_wait_for_workers(client):
    return [await client.wait_for_workers(n, timeout=20) for n in (1, 2)]


@program("client", gives=["TimeoutError", "TimeoutError"])
async def workers_are_waited_for_until_a_timeout(client):
    timeouts = (0.02, "20 ms")
    return [await error_of(client.wait_for_workers, 99, timeout) for timeout in timeouts]


@program("client", gives=["ValueError", "ValueError"])
async def the_number_of_workers_is_a_positive_whole_number(client):
    return [await error_of(client.wait_for_workers, n) for n in (0, 1.5)]


# -- bad input --


@program("bad input", raises=TypeError)
async def submit_needs_something_to_call(client):
    client.submit(1)


@program("bad input", raises=TypeError)
async def submit_needs_a_function(client):
    client.submit()


@program("bad input", raises=TypeError)
async def a_future_is_no_function(client):
    client.submit(client.submit(inc, 1), 1)


@program("bad input", raises=TypeError)
async def an_unknown_keyword_goes_to_the_function(client):
    await client.submit(inc, 1, nonsense=2).result()


@program("bad input", raises=TypeError)
async def an_argument_that_cannot_be_pickled_is_refused_at_the_call(client):
    client.submit(str, threading.Lock())


@program("bad input", raises=TypeError)
async def a_nested_argument_that_cannot_be_pickled_is_refused_at_the_call(client):
    client.submit(str, {"a": [threading.Lock()]})


@program("bad input", raises=TypeError)
async def a_function_that_cannot_be_pickled_is_refused_at_the_call(client):
    lock = threading.Lock()
    client.submit(lambda: lock, key="locked")


@program("bad input", raises=TypeError)
async def an_item_that_cannot_be_pickled_is_refused_at_the_call(client):
    client.map(str, [threading.Lock()], pure=False)


@program("bad input", raises=TypeError)
async def a_list_is_no_key(client):
    await client.submit(inc, 1, key=["a"]).result()


@program("bad input", raises=TypeError)
async def bytes_are_no_key(client):
    await client.submit(inc, 1, key=b"a").result()


@program("bad input", raises=TypeError)
async def a_tuple_with_none_is_no_key(client):
    await client.submit(inc, 1, key=("a", None)).result()


@program("bad input", raises=ValueError)
async def other_workers_are_allowed_only_beside_chosen_ones(client):
    client.submit(inc, 1, allow_other_workers=True)


@program("bad input", raises=TypeError)
async def other_workers_are_allowed_by_a_yes_or_a_no(client):
    client.submit(inc, 1, workers="alice", allow_other_workers=["bob"])


@program("bad input", raises=TypeError)
async def gather_has_no_timeout(client):
    await client.gather([client.submit(inc, 1)], timeout=1)


@program(
    "bad input",
    raises=TypeError,
    dask=NOT_RUN,
    differs="it fails at the call; dask's scheduler keeps a broken task for ever",
)
async def a_word_is_no_priority(client):
    client.submit(inc, 1, priority="high")


@program(
    "bad input",
    raises=TypeError,
    dask=NOT_RUN,
    differs='names are strings, also "0", "1" of a local cluster\'s workers; in dask these are numbers',
)
async def a_number_is_no_worker(client):
    client.submit(inc, 1, workers=1)


@program(
    "bad input",
    raises=TypeError,
    dask=Gives(2),
    differs="keys are strings or tuples; dask takes numbers, too",
)
async def a_number_is_no_key(client):
    return await client.submit(inc, 1, key=1).result()


@program(
    "bad input",
    raises=ValueError,
    dask=Gives(2),
    differs="nothing is run less often than once; dask takes it for 0",
)
async def there_are_no_negative_retries(client):
    return await client.submit(inc, 1, retries=-1).result()


@program(
    "bad input",
    raises=ValueError,
    dask=Raises(KeyError),
    differs="what is no time is a ValueError that says how to write one",
)
async def a_word_is_no_timeout(client):
    await client.submit(inc, 1).result(timeout="soon")


@program(
    "bad input",
    raises=TypeError,
    dask=Gives(2),
    differs="an option of dask's that is not built is a TypeError at the call, never ignored",
)
async def an_option_that_is_not_built_is_refused(client):
    return await client.submit(inc, 1, fifo_timeout="1 s").result()


@program(
    "bad input",
    raises=TypeError,
    dask=Raises(ValueError),
    differs="an unknown keyword is a TypeError, as everywhere in Python",
)
async def a_client_refuses_an_unknown_keyword(client):
    async with connect(client.scheduler_info()["address"], nonsense=1):
        pass


# ---- 4. Twenty more, in the textbook ----

# They stand in ``test_minidist.py``, and are tested there, too, on its own clusters.  Here they are
# entered into the table; ``load`` runs them like those of chapter 3.
exec(compile(in_the_textbook(), TEXTBOOK, "exec"))
