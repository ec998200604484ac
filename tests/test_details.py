"""Details of chapters 5 to 12, for which the textbook has no room."""

import ast
import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import errno
import functools
import gc
import inspect
import math
import operator
import os
import pickle
import random
import re
import signal
import smtplib
import socket
import sys
import threading
import time
import traceback
import types
import typing
import unittest.mock
import urllib.error
import warnings
import weakref
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_api import GATES, RUNS, gates, slow_pow, through, until  # noqa: F401
from test_faults import call_home, listener  # noqa: F401

import minidist
from minidist import (
    LIMITS,
    OPS,
    Client,
    ProtocolError,
    RemoteError,
    Worker,
    check_message,
    dumps,
    loads,
    pack,
    pack_exception,
    read_batch,
    unpack_exception,
    wait,
)
from test_minidist import (  # noqa: F401
    ROOT,
    SCRIPT,
    Process,
    anything_in_json,
    environment,
    on_cluster,
    plain,
    scheduler,
    some_batches,
)


def read(stream, sender):
    """The batch that comes with a stream, which then ends."""

    async def feed():
        reader = asyncio.StreamReader()
        reader.feed_data(stream)
        reader.feed_eof()
        return await read_batch(reader, sender)

    return asyncio.run(feed())


deep = functools.reduce(lambda key, _: ("x", key), range(900), ())


@pytest.mark.parametrize(
    "key", [["x", {}], ["x", None], [], deep], ids=["{}", "None", "()", "deep"]
)
def test_what_is_no_key_is_a_protocol_error(key):
    message = ["fetch-missed", key, 1, 1, [], False]
    with pytest.raises(ProtocolError):
        read(b"".join(pack([message])), "client")


def test_sizes_are_bounded_before_anything_is_read():
    too_long = minidist.PREFIX.pack(LIMITS["header_bytes"] + 1)
    header = f"[[],[{LIMITS['frame_bytes'] + 1}]]".encode()
    too_large = minidist.PREFIX.pack(len(header)) + header
    for stream in [too_long, too_large]:
        with pytest.raises(ProtocolError):
            read(stream, "client")


@pytest.mark.parametrize(
    "header",
    ["5", "[5,[]]", "[[],5]", "[[],[0.5]]", "[[],[-1]]", "[[]]", "{", "[" * 200_000],
    ids=lambda header: header[:10],
)
def test_what_is_no_header_is_a_protocol_error(header):
    with pytest.raises(ProtocolError, match="no header"):
        read(minidist.PREFIX.pack(len(header)) + header.encode(), "client")


def test_large_frames_arrive_in_a_writable_buffer_of_their_own():
    frames = [b"small", b"x" * 300_000, b"y" * 200_000]
    message = ["data", "k", 1, "ok", frames]
    (got,) = read(b"".join(pack([message])), "holder")
    value = got[-1]
    assert list(value) == frames
    value[1][0] = 0


def test_a_writable_buffer_is_not_copied_when_it_becomes_a_value():
    data, buffer = dumps(pickle.PickleBuffer(bytearray(100_000)))
    arrived = bytearray(buffer)
    assert loads((data, arrived)) is arrived


def test_the_context_of_an_exception_arrives_too_unless_it_is_suppressed():
    def fail(suppress):
        try:
            {}["inner"]
        except KeyError:
            if suppress:
                raise ValueError("outer") from None
            raise ValueError("outer")  # noqa: B904

    for suppress in [False, True]:
        with pytest.raises(ValueError) as info:
            fail(suppress)
        got = unpack_exception(pack_exception(info.value))
        assert got.__cause__ is None
        text = "".join(traceback.format_exception(got))
        assert ("During handling" in text) is not suppress


def test_an_exception_that_ends_whoever_looks_at_it_is_known_by_its_type():
    class Exits(Exception):
        @property
        def __notes__(self):
            raise SystemExit

    assert minidist.text_of(Exits()).endswith("Exits")


class Hidden(Exception):
    """Looked at in the usual way, it ends whoever does."""

    @property
    def hidden(self):
        raise SystemExit

    __cause__ = __traceback__ = __suppress_context__ = hidden


def test_the_cause_of_an_exception_arrives_whatever_its_class_makes_of_that_name():
    error = Hidden("the text")
    BaseException.__cause__.__set__(error, KeyError("why"))
    got = unpack_exception(pack_exception(error))
    assert (type(got), str(got)) == (Hidden, "the text")
    assert repr(BaseException.__cause__.__get__(got)) == "KeyError('why')"


def test_of_a_long_chain_of_exceptions_the_last_twenty_arrive():
    error = None
    for number in range(30):
        error, cause = ValueError(number), error
        error.__cause__ = cause
    arrived, link = [], unpack_exception(pack_exception(error))
    while link:
        arrived.append(link.args[0])
        link = link.__cause__
    assert arrived == [*range(29, 9, -1)]


def test_the_traceback_of_an_exception_names_files_lines_and_functions():
    def inner():
        raise ValueError("deep")

    with pytest.raises(ValueError) as info:
        inner()
    got = unpack_exception(pack_exception(info.value))
    there, here = (
        [(f.filename, f.lineno, f.name) for f in traceback.extract_tb(e.__traceback__)]
        for e in [info.value, got]
    )
    assert here == there and here[-1][2] == "inner"


class NeedsTwo(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} failed")
        self.second = second


class NeedsFile(OSError):
    def __init__(self, path, second):
        super().__init__(2, "not there", path)
        self.second = second


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    second: int


class Slotted(Exception):
    __slots__ = ("second", "never_set")

    def __init__(self, second):
        super().__init__("the text")
        self.second, self.beside = second, "in its dict"


LARGE_VALUE = pickle.PickleBuffer(bytearray(100_000))


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(NeedsTwo("it", 2), id="its own"),
        pytest.param(NeedsFile("there", 2), id="a file's"),
        pytest.param(NeedsTwo("it", LARGE_VALUE), id="with an array"),
        pytest.param(Frozen(bytes(2)), id="frozen"),
        pytest.param(Slotted(2), id="with slots"),
    ],
)
def test_an_exception_comes_back_as_it_was_whatever_its_class_takes_to_make_one(error):
    got = unpack_exception(pack_exception(error))
    assert (type(got), str(got), got.args) == (type(error), str(error), error.args)
    assert len(bytes(got.second)) == len(bytes(error.second))
    for name in ("filename", "beside"):
        assert getattr(got, name, None) == getattr(error, name, None)
    (one, *_) = unpack_exception(pack_exception(ExceptionGroup("all", [error]))).exceptions
    assert (type(one), one.args) == (type(error), error.args)


class SetsItself(OSError):
    def __init__(self, second):
        super().__init__("the text")
        self.errno, self.filename = second, "there"


class Says(OSError):
    """What it says of itself is made from something else, and cannot be set."""

    strerror = property(lambda self: f"it said {self.args}")


class Known(OSError):
    errno = 77


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "not there", "a file"),
        OSError(18, "other device", "one", None, "another"),
        BlockingIOError(11, "try again", 5),
        OSError("the text"),
        smtplib.SMTPAuthenticationError(535, b"bad credentials"),
        urllib.error.HTTPError("http://localhost", 404, "not found", None, None),
        SetsItself(5),
        Says(5),
        Known(1, "the text"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_the_system_has_the_fields_that_its_class_has_set(error):
    got = unpack_exception(pack_exception(error))
    assert (type(got), str(got), got.args) == (type(error), str(error), error.args)
    for name in ("errno", "strerror", "filename", "filename2", "characters_written"):
        assert getattr(got, name, "unset") == getattr(error, name, "unset")


class Group(ExceptionGroup):
    def __new__(cls, errors, code):
        self = super().__new__(cls, f"exit code {code}", errors)
        self.code = code
        return self


class Stateful(Exception):
    def __setstate__(self, state):
        self.__dict__.update(state)


class Method:
    """A method as a class has it that a library has compiled (pydantic's ValidationError)."""

    __class__ = types.MethodDescriptorType

    def __init__(self, function):
        self.function = function

    def __set_name__(self, owner, name):
        self.__objclass__ = owner

    def __get__(self, error, kind):
        return self if error is None else functools.partial(self.function, error)


class Compiled(Exception):
    @Method
    def __reduce__(self):
        return Compiled.again, self.args

    @classmethod
    def again(cls, text):
        return cls(text)


@pytest.mark.parametrize(
    "error", [Group([ValueError("one")], 3), Stateful("the text"), Compiled("the text")]
)
def test_an_exception_comes_back_as_it_was_though_its_class_makes_it_in_its_own_way(error):
    got = unpack_exception(pack_exception(error))
    assert (type(got), str(got), vars(got)) == (type(error), str(error), vars(error))


class Pedantic(Exception):
    def __reduce__(self):
        return Pedantic, ("one", "argument", "too", many)  # noqa: F821


class Halved(Exception):
    def __reduce__(self):
        return int, ("no number",)


@pytest.mark.parametrize(
    "error", [ValueError("the text", threading.Lock()), Pedantic("the text"), Halved("the text")]
)
def test_an_exception_that_cannot_be_pickled_is_replaced_by_its_description(error):
    got = unpack_exception(pack_exception(error))
    assert type(got) is RemoteError
    assert type(error).__name__ in str(got) and "the text" in str(got)


@on_cluster
async def test_a_string_that_looks_like_a_key_stays_a_string(c, a, b):
    x = c.submit(abs, -1, key="x")
    assert await c.submit(lambda *args: args, "x", x) == ("x", 1)


@on_cluster
async def test_map_takes_futures_as_items_and_in_keyword_arguments(c, a, b):
    x, y = c.map(abs, [-1, -2])
    assert await c.gather(c.map(lambda i, base: i + base, [x, y], base=y)) == [3, 4]


@on_cluster
async def test_what_is_large_in_a_map_travels_once(c, a, b):
    data, sent, send = bytes(100_000), [], c._scheduler.send
    c._scheduler.send = lambda message: (sent.append(message), send(message))
    futures = c.map(lambda n, pair, by: (n, len(data), *pair, by), range(9), pair=(data, 1), by=7)
    assert await c.gather(futures) == [(n, 100_000, data, 1, 7) for n in range(9)]
    sizes = [sum(map(len, message[4])) for message in sent if message[0] == "submit"]
    assert len(sizes) == 11 and sum(sizes) < 300_000
    with pytest.raises(TypeError, match="argument 'rest' of pow .list. cannot be pickled"):
        c.map(pow, range(9), rest=[data, threading.Lock()])
    future = c.submit(abs, -1)
    calls = c.map(lambda n, pair: n + pair[1], range(2), pair=(data, future))
    assert await c.gather(calls) == [1, 2]


class Counts:
    """Large, with state, and once it is unpickled it cannot be pickled again."""

    def __init__(self, data=b"", lock=None):
        self.data, self.lock, self.calls = data, lock, 0

    def __reduce__(self):
        if self.lock:
            raise TypeError("it has a lock")
        return with_a_lock, (bytes(100_000),)

    def __call__(self, *_):
        self.calls += 1
        return self.calls


def with_a_lock(data):
    return Counts(data, threading.Lock())


@on_cluster
async def test_each_call_of_a_map_has_an_object_of_its_own_also_if_it_is_large(c, a, b):
    assert await c.gather(c.map(Counts(), range(8))) == [1] * 8
    assert await c.gather(c.map(lambda n, count: count(), range(8), count=Counts())) == [1] * 8


@on_cluster
async def test_what_is_large_in_a_map_waits_for_no_worker_that_only_another_map_named(c, a, b):
    data = bytes(100_000)
    waiting = c.map(lambda n, data: n, range(2), data=data, workers="nobody")
    assert await c.gather(c.map(lambda n, data: n, range(2, 4), data=data)) == [2, 3]
    assert {future.status for future in waiting} == {"pending"}


@on_cluster
async def test_map_names_its_tasks_by_a_prefix_or_a_list_of_keys(c, a, b):
    assert [f.key for f in c.map(abs, [1, 2], key=["one", ("two", 2)])] == ["one", ("two", 2)]
    first, second = c.map(abs, [1, 2], key="prefix")
    assert first.key != second.key and first.key.startswith("prefix-")
    assert await c.gather([first, second]) == [1, 2]


@on_cluster
async def test_gather_does_not_wait_for_others_when_one_has_failed(c, a, b):
    pending, bad = c.submit(through, 0), c.submit(int, "no number")
    with pytest.raises(ValueError):
        await c.gather([pending, bad])
    assert pending.status == "pending"


@on_cluster
async def test_wait_can_return_at_the_first_that_is_done(c, a, b):
    pending, good = c.submit(through, 0), c.submit(abs, -1)
    done, not_done = await wait([pending, good], return_when="FIRST_COMPLETED")
    assert (done, not_done) == ({good}, {pending})


@on_cluster
async def test_what_takes_longer_than_its_timeout_raises_the_builtin_timeout_error(c, a, b):
    pending = c.submit(through, 0, "late")
    for late in [
        wait([pending], timeout=0.01),
        wait(pending, timeout="10 ms"),
        pending.result(timeout=0.01),
        pending.result("0.01s"),
        pending.exception(timeout=0.01),
        pending.traceback(timeout=0.01),
    ]:
        with pytest.raises(TimeoutError):
            await late
    GATES[0].set()
    assert await pending.result(timeout=30) == "late"  # The task went on.


@on_cluster
async def test_futures_are_equal_only_to_themselves(c, a, b):
    x, y = c.submit(abs, -1), c.submit(abs, -1)
    assert x.key == y.key and x != y and len({x, y}) == 2


@on_cluster
async def test_impure_calls_run_each_time(c, a, b):
    GATES[0].set()
    futures = [c.submit(through, 0, "x", pure=False) for _ in range(3)]
    futures += c.map(through, [0, 0], ["x", "x"], pure=False)
    await c.gather(futures)
    assert RUNS == ["x"] * 5 and len({f.key for f in futures}) == 5


@on_cluster
async def test_the_first_call_of_a_key_wins(c, a, b):
    first, second = c.submit(abs, -1, key="k"), c.submit(abs, -2, key="k")
    assert await c.gather([first, second]) == [1, 1]


def test_who_uses_a_key_for_something_else_is_warned(caplog):
    async def test(c, a, b):
        one, same = c.submit(abs, -1, key="k"), c.submit(abs, -1, key="k")
        data, again = await c.scatter({"d": 1}), await c.scatter({"d": 1}, broadcast=True)
        assert await c.gather([one, same, data["d"], again["d"]]) == [1, 1, 1, 1]
        assert caplog.messages == []
        others = [c.submit(abs, -2, key="k"), (await c.scatter({"d": 2}))["d"]]
        assert await c.gather(others) == [1, 1]
        said = [text.partition(" is known, perhaps with")[0] for text in caplog.messages]
        assert said == ["the key 'k'", "the key 'd'"]

    on_cluster(test)("in this process")


@on_cluster
async def test_gather_leaves_as_they_are_containers_that_are_not_the_builtin_ones(c, a, b):
    class Two(list):
        def __init__(self, one, two):
            super().__init__([one, two])

    x, counts, two = c.submit(abs, -1), collections.Counter("aab"), Two(1, 2)
    got = await c.gather([x, counts, two, sys.version_info, {"x": x, "counts": counts}])
    assert got == [1, counts, [1, 2], sys.version_info, {"x": 1, "counts": counts}]
    assert got[1] is got[4]["counts"] is counts and got[2] is two


@on_cluster
async def test_only_a_tuple_is_taken_for_a_namedtuple(c, a, b):
    class Builder:
        _make = None

    (data,) = [await c.scatter(Builder())]
    gathered = await c.gather([data, builder := Builder()])
    assert type(gathered[0]).__name__ == "Builder" and gathered[1] is builder


@on_cluster
async def test_an_exception_that_counts_as_false_is_raised_like_any_other(c, a, b):
    class NoneFound(Exception):
        def __len__(self):
            return 0

    def check():
        raise NoneFound("the text")

    for call in (c.submit(check).result, functools.partial(c.run, check, workers="a")):
        with pytest.raises(NoneFound, match="the text"):
            await call()


@on_cluster
async def test_an_input_is_kept_for_the_task_that_needs_it(c, a, b):
    x = c.submit(through, 0, 1)
    y = c.submit(operator.add, x, 1)
    x.release()
    del x
    GATES[0].set()
    assert await y == 2


@on_cluster
async def test_what_was_released_is_not_waited_for(c, a, b):
    running, large, here = c.submit(through, 0), c.submit(bytes, 100_000), c.submit(abs, -1)
    await wait([large])
    assert await here == 1
    for future in (running, large, here):
        future.release()
        with pytest.raises(minidist.CancelledError, match="its last future was released"):
            await future


@on_cluster
async def test_an_error_in_an_input_is_the_error_of_its_dependents(c, a, b):
    bad = c.submit(slow_pow, 10, "0.5")
    last = c.submit(abs, c.submit(abs, bad))
    del bad
    with pytest.raises(TypeError) as info:
        await last
    assert traceback.extract_tb(info.tb)[-1].name == "slow_pow"


@on_cluster
async def test_even_an_exit_of_a_task_is_only_its_error(c, a, b):
    async def leave():
        sys.exit(3)

    for call in (lambda: sys.exit(3)), leave:
        with pytest.raises(SystemExit):
            await c.submit(call)
    assert await c.submit(abs, -1) == 1


@on_cluster
async def test_bad_calls_are_refused_at_the_call(c, a, b):
    x, y = c.map(abs, [-1, -2])
    for bad, words in [
        (lambda: c.submit(5), "must be callable, 5 is not"),
        (lambda: c.submit(abs, 1, key=5), "a key is a string or a tuple, not 5"),
        (lambda: c.submit(abs, 1, key=("x", [1])), "not .*'x', .1"),
        (lambda: c.submit(abs, 1, key=("x", math.nan)), "not .*nan"),
        (lambda: c.submit(abs, 1, key=["x"]), "not .*'x'"),
        (lambda: c.submit(abs, 1, priority="high"), "priority='high' is no number"),
        (lambda: c.submit(abs, 1, workers="a", allow_other_workers=["b"]), "is neither True nor"),
        (lambda: c.submit(abs, 1, workers=[1]), "workers=.1. is no address"),
        (lambda: c.submit(abs, 1, retries=-1), "retries=-1 is too small"),
        (lambda: c.submit(abs, 1, retries=1.5), "retries=1.5 is no whole number"),
        (lambda: c.scatter(1, broadcast=2), "broadcast=2 is neither True nor False"),
        (lambda: c.map(abs), "map needs iterables"),
        (lambda: c.map(abs, [1, 2], key=["only one"]), "map got 1 keys for 2 calls"),
        (lambda: c.map(abs, x), "map needs iterables"),
        (lambda: c.map(abs, [1], key=5), "a key is a string or a tuple, not 5"),
        (lambda: c.gather([x], errors="ignore"), "errors='ignore' is neither"),
        (lambda: wait(x, y), "one collection of futures"),
        (lambda: wait([x], return_when="SOMETIMES"), "return_when='SOMETIMES' is unknown"),
        (lambda: x.result(timeout="soon"), "timeout='soon' is no time"),
        (lambda: pickle.dumps(x), "only inside the arguments of submit"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            bad()


@on_cluster
async def test_a_scatter_takes_as_long_as_it_takes_while_a_worker_is_there_for_it(c, a, b):
    held, asked, ask = [], [], c._ask
    for worker in (a, b):
        happens = worker.happens

        def slowly(op, *args, happens=happens):
            held.append((happens, op, args)) if op == "put-data" else happens(op, *args)

        worker.happens = slowly

    async def ask_again(*args, **options):
        asked.append(args)
        if len(asked) >= 3 and len(held) == 2:
            for happens, op, fields in [held.pop(), held.pop()]:
                happens(op, *fields)
        return await ask(*args, **options)

    c._ask = ask_again
    futures = await c.scatter([1, 2], timeout=0.01)
    assert await c.gather(futures) == [1, 2] and len(asked) >= 3


@on_cluster
async def test_a_scatter_waits_as_long_as_its_client_and_says_who_is_there(c, a, b):
    async with Client(c._address, asynchronous=True, timeout=0.1) as d:
        for options, waited in [({}, 0.1), ({"timeout": 0.2}, 0.2)]:
            text = f"not scattered after {waited} s, with 0 workers called 'nobody': start one"
            with pytest.raises(TimeoutError, match=text):
                await d.scatter(1, workers="nobody", **options)
    async with minidist.Scheduler() as s, Client(s.address, asynchronous=True, timeout=0) as d:
        text = "not scattered after 0 s, with 0 workers: start one"
        with pytest.raises(TimeoutError, match=text):
            await d.scatter(1)


@on_cluster
async def test_who_scatters_what_is_cancelled_meanwhile_is_told(c, a, b):
    scattering = asyncio.ensure_future(c.scatter({"x": 1}, workers="nobody"))
    await c.who_has()
    async with Client(c._address, asynchronous=True) as d:
        await d.cancel(d.submit(abs, -1, key="x"), force=True)
        with pytest.raises(minidist.CancelledError, match="'x' was cancelled by client"):
            await scattering


@on_cluster
async def test_run_on_nobody_is_refused(c, a, b):
    with pytest.raises(ValueError, match="there is no worker called 'nobody'"):
        await c.run(abs, 1, workers="nobody")
    assert await c.run(abs, 1, workers=[]) == {}


@on_cluster
async def test_options_of_dask_that_are_not_built_are_refused_by_name(c, a, b):
    for option in ["resources", "actor", "actors", "fifo_timeout"]:
        with pytest.raises(TypeError, match=f"{option}= is not built"):
            c.submit(dict, **{option: None})
        with pytest.raises(TypeError, match=f"{option}= is not built"):
            c.map(abs, [1], **{option: None})
    for option in ["wait", "nanny"]:
        with pytest.raises(TypeError, match=f"{option}= is not built"):
            c.run(dict, **{option: False})


@on_cluster
async def test_a_future_of_another_client_is_refused(c, a, b):
    async with Client(c._address, asynchronous=True) as d:
        x = d.submit(abs, -1)
        with pytest.raises(ValueError, match="another client"):
            await c.gather([x])
        with pytest.raises(ValueError, match="another client"):
            c.submit(abs, x)
        for call in (c.cancel, c.retry):
            with pytest.raises(ValueError, match="another client"):
                call([x])
        assert await x == 1


def test_an_unknown_keyword_of_a_client_is_refused():
    with pytest.raises(TypeError, match="of a cluster that is there takes no security, nonsense"):
        Client("127.0.0.1:1", security=None, nonsense=1)
    with pytest.raises(TypeError, match="a local cluster does not know the option memory_limit="):
        Client(n_workers=1, memory_limit="2GB")


def test_where_no_scheduler_is_a_client_gives_up_in_time_and_names_the_address():
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # Bound but not listening: refuses.
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(OSError, match=address):
            Client(address, timeout=0.2)


def test_where_nobody_answers_a_client_gives_up_in_its_own_time():
    """As where a firewall drops what is sent: no refusal ends the wait."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="no answer"):
            Client(f"127.0.0.1:{silent.getsockname()[1]}", timeout=0.2)
        assert time.monotonic() - start < LIMITS["handshake_seconds"] / 2


def test_the_reason_why_no_scheduler_was_found_is_that_of_the_last_trial_that_had_one():
    refused = [OSError("Connection refused"), TimeoutError()]
    with unittest.mock.patch.object(minidist.Connection, "connect", side_effect=refused):
        with pytest.raises(ConnectionError, match=r"no scheduler at .*\(Connection refused\)"):
            Client("127.0.0.1:8786", timeout=0.15)
    worker = types.SimpleNamespace(role="worker")
    with unittest.mock.patch.object(minidist.Connection, "connect", side_effect=TimeoutError):
        with pytest.raises(ConnectionError, match=r"\(no answer\)"):
            asyncio.run(minidist.reach_scheduler("127.0.0.1:8786", worker, 0.01))


@on_cluster
async def test_a_name_with_an_address_where_nobody_answers_is_reached_by_its_other(c, a, b):
    _, port = minidist.split_address(c._address)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.socket() as first:
        first.connect(full.getsockname())  # The kernel ignores the next ones.
        addresses = [full.getsockname(), ("127.0.0.1", port)]

        async def resolve(*_, **__):
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", each) for each in addresses]

        asyncio.get_running_loop().getaddrinfo = resolve
        async with Client(f"head:{port}", asynchronous=True, timeout=8) as client:
            assert await client.submit(abs, -1) == 1


def test_a_connection_that_the_network_breaks_is_logged_and_one_that_its_peer_ends_is_not(caplog):
    for error in [ConnectionResetError(errno.ECONNRESET, "reset"), EOFError(), TimeoutError()]:
        with minidist.dropping("a"):
            raise error
    for number in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
        with minidist.dropping("b"):
            raise OSError(number, "not there")
    assert [text.partition(":")[0] for text in caplog.messages] == 3 * ["The connection to b broke"]


def test_where_nobody_listens_a_client_tries_ten_times_a_second_and_in_silence(monkeypatch, caplog):
    connect, tried = minidist.Connection.connect, []

    def count_and_connect(*args):
        tried.append(args)
        return connect(*args)

    monkeypatch.setattr(minidist.Connection, "connect", count_and_connect)
    with pytest.raises(ConnectionError):
        Client("127.0.0.1:1", timeout=0.25)
    assert len(tried) <= 3 and not caplog.records


def test_who_is_silent_in_the_handshake_is_dropped(monkeypatch):
    monkeypatch.setitem(LIMITS, "handshake_seconds", 0.05)

    async def main():
        async with minidist.Scheduler() as s:
            reader, writer = await asyncio.open_connection(*minidist.split_address(s.address))
            await asyncio.wait_for(reader.read(), 10)
            writer.close()

    asyncio.run(main())


def test_who_runs_another_python_is_refused_with_both_versions(monkeypatch):
    theirs = (minidist.MAGIC, minidist.PROTOCOL, 3, 5, 0, bytes(32), bytes(32))

    async def main():
        async def say_hello(reader, writer):
            writer.write(minidist.HELLO.pack(*theirs))

        server = await asyncio.start_server(say_hello, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PermissionError, match=rf"3\.5.*3\.{sys.version_info[1]}"):
            await minidist.Connection().connect(f"127.0.0.1:{port}", "client")
        server.close()

    asyncio.run(main())


@pytest.mark.parametrize("magic, role", [(b"somebody", 0), (minidist.MAGIC, len(minidist.ROLES))])
def test_who_says_something_else_than_hello_is_refused(magic, role):
    other = (magic, minidist.PROTOCOL, *sys.version_info[:2], role, bytes(32), bytes(32))

    async def main():
        async def say_something_else(reader, writer):
            writer.write(minidist.HELLO.pack(*other))

        server = await asyncio.start_server(say_something_else, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PermissionError, match="does not speak minidist"):
            await minidist.Connection().connect(f"127.0.0.1:{port}", "client")
        server.close()

    asyncio.run(main())


@pytest.mark.parametrize("host, here", [("0.0.0.0", "127.0.0.1"), ("::", "::1")])
def test_without_a_way_to_others_a_machine_is_reached_from_itself(monkeypatch, caplog, host, here):
    def no_way(*_):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "socket", no_way)
    assert minidist.reachable(host) == here
    assert "has no route to others" in caplog.text


@on_cluster
async def test_everybody_listens_only_where_told(c, a, b):
    async with minidist.Scheduler() as s:
        for body in (s, a, b):
            assert [end.getsockname()[0] for end in body.server.sockets] == ["127.0.0.1"]


def test_a_connection_to_a_host_that_is_gone_ends_by_itself():
    """The kernel sees to that: what the two ends have to say to it is all that is tested here."""

    async def main(host, patience):
        async with minidist.Scheduler(host) as s, Client(s.address, asynchronous=True) as c:
            for link, seconds in zip((*s.links.values(), *c.links.values()), patience, strict=True):
                end = link.writer.get_extra_info("socket")
                assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                if hasattr(socket, "TCP_USER_TIMEOUT"):
                    limit_ms, idle, pause = (
                        end.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                        for name in ("TCP_USER_TIMEOUT", "TCP_KEEPIDLE", "TCP_KEEPINTVL")
                    )
                    assert limit_ms == seconds * 1000
                    assert seconds - idle >= 10 * pause, "it may lose some of many probes"

    asyncio.run(main("127.0.0.1", [300, 300]))
    if sys.platform == "linux":  # There each address of this network is this host, as any other.
        asyncio.run(main("127.0.0.2", [300, 30]))


def test_who_takes_bytes_slowly_is_not_taken_for_stalled(monkeypatch):
    monkeypatch.setitem(LIMITS, "stall_seconds", 0.02)
    taken = []

    async def take(reader, writer):
        while chunk := await reader.read(1 << 18):
            taken.append(len(chunk))
            await asyncio.sleep(0.01)

    async def main():
        server = await asyncio.start_server(take, "127.0.0.1", 0)
        connection = minidist.Connection()
        address = server.sockets[0].getsockname()
        _, connection.writer = await asyncio.open_connection(*address)
        connection.send(["data", bytes(16 << 20)])
        await connection.written()
        assert not connection.writer.is_closing()
        await until(lambda: sum(taken) > 16 << 20)
        await connection.close()
        server.close()

    asyncio.run(main())


def test_what_is_sent_while_a_large_batch_is_written_comes_after_it():
    sizes = [4 << 20, 10, 4 << 20, 10]

    async def main():
        arrived = asyncio.get_running_loop().create_future()

        async def take(reader, writer):
            got = []
            while len(got) < len(sizes):
                got += [len(v[0]) for *_, v in await minidist.read_batch(reader, "holder")]
            arrived.set_result(got)

        server = await asyncio.start_server(take, "127.0.0.1", 0)
        connection = minidist.Connection()
        address = server.sockets[0].getsockname()
        _, connection.writer = await asyncio.open_connection(*address)
        for size in sizes:
            connection.send(["data", "x", 1, "ok", [bytes(size)]])
            connection.flush()
        assert await arrived == sizes
        await connection.close()
        server.close()

    asyncio.run(main())


def test_what_was_sent_before_a_connection_closes_arrives():
    async def main():
        arrived = asyncio.get_running_loop().create_future()

        async def take(reader, writer):
            arrived.set_result(len(await reader.read()))
            writer.close()

        server = await asyncio.start_server(take, "127.0.0.1", 0)
        connection = minidist.Connection()
        address = server.sockets[0].getsockname()
        _, connection.writer = await asyncio.open_connection(*address)
        connection.send(["data", "x", 1, "ok", [bytes(16 << 20)]])
        await connection.close()
        assert await arrived > 16 << 20
        server.close()

    asyncio.run(main())


@on_cluster
async def test_a_small_result_comes_with_its_notice_and_a_large_one_from_its_worker(c, a, b):
    large = c.submit(bytes, 100_000)
    assert await c.submit(abs, -1) == 1
    await wait([large])
    assert [*c.links] == [minidist.SCHEDULER]
    assert await large == bytes(100_000)
    assert len(c.links) == 2


@on_cluster
async def test_whatever_is_asked_of_a_worker_goes_by_one_connection(c, a, b):
    async with Client(a.scheduler_address, asynchronous=True) as d:
        assert await d.submit(bytes, 100_000, workers="a") == bytes(100_000)
        link = d.links[a.id]
        assert await d.submit(bytes, 200_000, workers="a") == bytes(200_000)
        await d.run(os.getpid, workers="a")
        assert d.links[a.id] is link and not link.writer.is_closing()
    assert link.writer.is_closing()


@on_cluster
async def test_of_a_small_call_nobody_is_warned(c, a, b):
    with warnings.catch_warnings(record=True) as said:
        assert await c.submit(abs, -1) == 1 and await c.gather(c.map(abs, [-2])) == [2]
    assert not [warning for warning in said if "10 MB" in str(warning.message)]


def test_a_function_is_pickled_apart_from_its_calls_with_its_buffers():
    buffer = bytearray(b"x" * 100_000)
    for func in (bytes, functools.partial(bytes, pickle.PickleBuffer(buffer))):
        frame, _, name = minidist.dump_function(func)
        assert name == "bytes"
        got, args, kwargs = minidist.load_call((frame, *dumps(((), {}))), {})
        assert got(*args, **kwargs) == (b"" if func is bytes else buffer)


class Model:
    alive = collections.Counter()

    def __setstate__(self, state):
        self.alive["ever"] += 1
        self.alive["now"] += 1

    def __getstate__(self):
        return {"large": "in a model"}

    def __del__(self):
        self.alive["now"] -= 1

    def predict(self, x):
        return x


def test_a_callable_with_state_is_unpickled_once_for_each_call_and_not_kept():
    model = Model()
    Model.alive.clear()
    assert minidist.load_callable(minidist.dump_function(len)[0]) is len
    run_spec, _ = minidist.dump_call(minidist.dump_function(model.predict), (2,), {})
    for times in (1, 2):
        func, args, kwargs = minidist.load_call(run_spec, {})
        assert func(*args, **kwargs) == 2 and Model.alive == {"ever": times, "now": 1}
        del func
        assert not Model.alive["now"]


def test_a_cached_method_of_an_object_is_refused_in_the_words_of_the_pickler():
    with pytest.raises(TypeError, match="cannot be pickled: .*lru_cache"):
        minidist.dump_function(functools.lru_cache("abc".count))


def test_a_plain_function_is_unpickled_once_and_not_kept_for_ever():
    frames = [minidist.dump_function(lambda n=n: n)[0] for n in range(300)]
    functions = [minidist.load_callable(frame) for frame in frames]
    assert minidist.load_callable(frames[-1]) is functions[-1]
    assert minidist.load_callable(frames[0]) is not functions[0]
    assert [func() for func in functions] == [*range(300)]


@on_cluster
async def test_who_waits_in_vain_leaves_nothing_behind(c, a, b):
    future = c.submit(abs, -1, workers="nobody")
    for waiting in (future.result(timeout=0.01), wait([future], timeout=0.01)):
        with pytest.raises(TimeoutError):
            await waiting
    assert not any(c._watchers.values())


@on_cluster
async def test_what_submits_while_the_loop_reads_its_inbox_breaks_nothing(c, a, b):
    """As a finalizer does that the collector runs there."""
    late = []
    c._post(lambda: late.append(c.submit(abs, -1)))
    c._post(lambda: late.append(c.submit(abs, -2)))
    await c._catch_up()
    assert sorted(await c.gather(late)) == [1, 2]


def test_what_submits_in_the_loop_of_a_synchronous_client_waits_for_its_turn():
    order, done = [], threading.Event()
    with Client(processes=False) as c:

        def submit():
            order.append(c.submit(abs, -1)._state)
            done.set()

        c._post(submit)
        assert done.wait(30) and order == [None]
        assert c.submit(abs, -1).result(30) == 1


@on_cluster
async def test_a_client_with_nothing_to_do_sleeps(c, a, b):
    future = c.submit(abs, -1)
    assert await future == 1 and await c.who_has()
    assert not c._inbox and not c.waking


@on_cluster
async def test_the_current_client_is_the_last_that_was_opened_to_be_it(c, a, b):
    async with Client(a.scheduler_address, asynchronous=True) as last:
        async with Client(a.scheduler_address, asynchronous=True, set_as_default=False):
            assert Client.current() is last
    assert Client.current() is c


@on_cluster
async def test_gather_takes_an_iterator_and_the_values_of_a_dict(c, a, b):
    futures = dict(zip("xy", c.map(abs, [-1, -2]), strict=True))
    assert await c.gather(iter(futures.values())) == await c.gather(futures.values()) == [1, 2]


def test_what_was_submitted_before_a_question_is_known_when_it_is_answered(monkeypatch):
    monkeypatch.setitem(LIMITS, "batch_messages", 2)
    with Client(n_workers=0) as c:
        futures = c.map(abs, range(-300, 0))
        assert len(c.who_has(futures)) == 300


@on_cluster
async def test_what_a_client_knows_of_workers_is_not_changed_by_other_questions(c, a, b):
    known = c.scheduler_info()["workers"]
    assert {*known} == {a.address, b.address}
    await c.who_has()
    await c.nthreads(["a"])
    assert c.scheduler_info()["workers"] == known


def test_the_threads_of_a_worker_that_have_nothing_to_do_end_with_it():
    async def main():
        async with minidist.Scheduler() as s:
            before = {*threading.enumerate()}
            async with Worker(s.address, nthreads=2):
                assert len({*threading.enumerate()} - before) == 2
        return before

    assert others_end(asyncio.run(main()))


@on_cluster
async def test_as_completed_leaves_no_task_behind_when_its_time_is_over(c, a, b):
    before = asyncio.all_tasks()
    futures = minidist.as_completed([c.submit(abs, -1, workers="nobody")], timeout=0.01)
    with pytest.raises(TimeoutError):
        await anext(futures)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before


@on_cluster
async def test_a_traceback_from_run_begins_in_the_users_function(c, a, b):
    with pytest.raises(ZeroDivisionError) as raised:
        await c.run(lambda: 1 / 0)
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert names[-1] == "<lambda>" and not {"answer_run", "call"} & {*names}


def test_where_one_frame_ends_and_the_next_begins_makes_another_call():
    assert minidist.pure_key("f", (b"ab", b"c")) != minidist.pure_key("f", (b"a", b"bc"))


def test_a_large_buffer_travels_once_whichever_pickler_takes_it():
    large = pickle.PickleBuffer(bytearray(1_000_000))
    for others in ([], [lambda: None]):
        data, buffer = minidist.dumps([large, *others])
        assert len(data) < 1_000 and len(buffer) == 1_000_000


def test_a_cached_function_of_a_module_is_the_one_that_is_there():
    assert pickle.loads(minidist.dump_by_value(minidist.callbacks)) is minidist.callbacks


def test_who_registers_a_second_time_is_dropped(caplog):
    async def main():
        async with minidist.Scheduler() as s:
            peer = minidist.Connection()
            await peer.connect(s.address, "client")
            peer.send(["register-client", "me", []])
            assert await peer.receive() == [["registered", s.state.ttl_us]]
            peer.send(["register-client", "me again", []])
            with pytest.raises(asyncio.IncompleteReadError):
                await peer.receive()
            assert not s.state.clients
            await peer.close()

    asyncio.run(main())
    assert "register-client a second time" in caplog.text


def test_who_has_left_shuts_nothing_down():
    async def main():
        async with minidist.Scheduler() as s:
            peer = minidist.Connection()
            await peer.connect(s.address, "client")
            for message in (["register-client", "me", []], ["leave"], ["shutdown"]):
                peer.send(message)
            await peer.written()
            peer.writer.write_eof()
            with pytest.raises(asyncio.IncompleteReadError):
                while True:
                    await peer.receive()
            assert not s.ended.is_set()
            await peer.close()

    asyncio.run(main())


def test_of_who_has_left_no_link_is_left():
    async def main():
        async with minidist.Scheduler() as s:
            async with Worker(s.address, 1), Client(s.address, asynchronous=True) as c:
                assert await c.submit(bytes, 100_000) == bytes(100_000)
                assert len(s.links) == len(c.links) == 2
            await until(lambda: not (s.state.workers or s.state.clients))
            assert not s.links

    asyncio.run(main())


def test_who_sends_what_cannot_be_is_dropped_and_others_are_served_on(caplog):
    async def main():
        async with minidist.Scheduler() as s, Client(s.address, asynchronous=True) as c:
            peer = minidist.Connection()
            await peer.connect(s.address, "worker")
            peer.send(["register-worker", "me", "me", 1, [], []])
            await peer.receive()
            peer.send(["task-finished", 12345, 1, "int", 1, []])  # It was never told to begin.
            with pytest.raises(asyncio.IncompleteReadError):
                await peer.receive()
            assert await c.nthreads() == {}
            await peer.close()

    asyncio.run(main())
    assert "Dropped me: what it sent cannot be" in caplog.text


def test_who_joined_is_logged_once_and_what_is_to_be_warned_of_too(caplog):
    caplog.set_level("INFO")

    async def main():
        async with minidist.Scheduler() as s, Client(s.address, asynchronous=True) as c:
            futures = [c.submit(abs, number, key="x") for number in range(2)]
            await c.who_has(futures)
            await c.who_has(futures)

    asyncio.run(main())
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if text.endswith(" joined")]) == 1
    assert len([text for text in said if text.startswith("the key 'x' is known")]) == 1


def test_a_scheduler_that_ends_does_not_log_that_all_leave(caplog):
    caplog.set_level("INFO")

    async def main():
        async with minidist.Scheduler() as s:
            worker = await Worker(s.address, 1)
            client = await Client(s.address, asynchronous=True)
        await asyncio.wait([worker.finished, client._scheduler.following])
        await client.close()
        await worker.close()

    asyncio.run(main())
    assert caplog.text.count(" joined") == 2 and " left" not in caplog.text


def test_who_connects_just_before_the_end_is_hung_up_on():
    async def main():
        accepted = asyncio.get_running_loop().create_future()
        listening = await asyncio.start_server(
            lambda *streams: accepted.set_result(streams), "127.0.0.1", 0
        )
        _, ours = await asyncio.open_connection(*listening.sockets[0].getsockname())
        reader, writer = await accepted
        scheduler = await minidist.Scheduler()
        scheduler.accept(reader, writer)
        await scheduler.close()
        assert writer.is_closing()
        ours.close()
        listening.close()

    asyncio.run(main())


@contextlib.asynccontextmanager
async def somebody(role, *scripts):
    """The address of who shakes hands as ``role``; then the next of ``scripts`` has its turn."""
    scripts, running = iter(scripts), []

    async def accept(reader, writer):
        running.append(asyncio.current_task())
        connection = minidist.Connection()
        with contextlib.suppress(asyncio.CancelledError):
            await connection.open(reader, writer, role, accepting=True)
            await next(scripts)(connection)
        writer.close()

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield "{}:{}".format(*server.sockets[0].getsockname())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def test_whose_registration_is_cut_off_registers_as_another_next_time():
    """Who was told of the first one's death would believe it of the second for ever."""
    ids = []

    async def cut_off(connection):
        ids.append((await connection.receive())[0][1])
        connection.hang_up()

    async def take(connection):
        ids.append((await connection.receive())[0][1])
        connection.send(["registered", 30_000_000])
        await connection.receive()

    async def main():
        async with somebody("scheduler", cut_off, take) as address, Worker(address) as worker:
            assert ids[0] != ids[1] == worker.id

    asyncio.run(main())


@pytest.mark.parametrize("proof", [b"", bytes(31)], ids=["none", "a part of one"])
def test_a_connection_that_breaks_in_the_handshake_says_nothing_of_secrets(proof):
    async def main():
        async def break_off(reader, writer):
            head = minidist.MAGIC, minidist.PROTOCOL, *sys.version_info[:2]
            nobody = minidist.hashlib.sha256(b"").digest()
            role = minidist.ROLES.index("scheduler")
            writer.write(minidist.HELLO.pack(*head, role, bytes(32), nobody) + proof)
            await reader.readexactly(minidist.HELLO.size + 32)
            writer.close()

        async with await asyncio.start_server(break_off, "127.0.0.1", 0) as server:
            address = "{}:{}".format(*server.sockets[0].getsockname())
            with pytest.raises(ConnectionError, match="no scheduler at .* within 0.2 s"):
                await Client(address, timeout=0.2, asynchronous=True)

    asyncio.run(main())


def test_a_client_waits_no_longer_than_its_timeout_for_a_scheduler_that_stalls(monkeypatch):
    monkeypatch.setitem(LIMITS, "close_seconds", 1)

    async def stall(connection):
        await connection.receive()
        connection.send(["registered", 30_000_000])
        await asyncio.Event().wait()

    async def main():
        async with somebody("scheduler", stall) as address:
            with pytest.raises(TimeoutError, match="no answer from the scheduler within"):
                async with Client(address, timeout=0.2, asynchronous=True):
                    pass

    asyncio.run(asyncio.wait_for(main(), 20))


def test_small_results_do_not_pile_up_for_a_client_that_does_not_read():
    """It is told that they are there, and fetches them from where they are."""
    n, size = 5_000, 10_000

    async def main():
        call, _ = minidist.dump_call(minidist.dump_function(bytes), (size,), {})
        async with minidist.Scheduler() as s, Worker(s.address, 2):
            slow = minidist.Connection()
            await slow.connect(s.address, "client")
            slow.reader._transport.pause_reading()
            slow.send(["register-client", "slow", []])
            for i in range(n):
                slow.send(["submit", f"x{i}", i + 1, "bytes", call, [], 0.0, [], False, 0])
            (ws,) = s.state.workers.values()
            await until(lambda: len(ws.has_what) == n)
            link = s.links["slow"]
            waiting = [len(message[-1][0]) for message in link.outbox if message[-1]]
            assert len(waiting) < 1_100 < len(link.outbox)
            slow.reader._transport.resume_reading()
            told = []
            while len(told) < n:
                told += [m for m in await slow.receive() if m[0] == "key-in-memory"]
            assert sorted(message[2] for message in told) == [*range(1, n + 1)]
            slow.hang_up()

    asyncio.run(asyncio.wait_for(main(), 60))


@on_cluster
async def test_nobody_can_connect_to_a_worker_that_has_closed(c, a, b):
    await a.close()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*minidist.split_address(a.address))


def test_a_body_checks_its_mind_before_it_sends_if_it_is_asked_to(monkeypatch):
    async def main():
        async with minidist.Scheduler() as s:
            s.state.crowded["no worker"] = None
            s.flush()
            s.state.crowded.clear()

    with pytest.raises(AssertionError):
        asyncio.run(main())
    monkeypatch.delenv("MINIDIST_VALIDATE")
    asyncio.run(main())


def test_a_data_connection_reaches_only_the_worker_process_that_it_means():
    async def main():
        async with minidist.Scheduler() as s, Worker(s.address, nthreads=1) as a:
            with pytest.raises(ConnectionError):
                await minidist.Connection().connect(a.address, "client", f"{a.address}#another")

    asyncio.run(main())


def test_who_sends_another_message_by_a_data_connection_is_dropped(caplog):
    async def main():
        async with minidist.Scheduler() as s, Worker(s.address, nthreads=1) as a:
            peer = minidist.Connection()
            await peer.connect(a.address, "client", a.id)
            peer.send(["leave"])
            with pytest.raises(asyncio.IncompleteReadError):
                await asyncio.wait_for(peer.receive(), 10)
            await peer.close()

    asyncio.run(main())
    assert "leave on a data connection" in caplog.text


def test_a_holder_that_hangs_up_in_the_handshake_is_one_that_is_gone(caplog):
    async def main():
        async def hang_up(reader, writer):
            await reader.read(1)
            writer.close()

        holder = await asyncio.start_server(hang_up, "127.0.0.1", 0)
        port = holder.sockets[0].getsockname()[1]
        async with minidist.Scheduler() as s, Client(s.address, asynchronous=True) as c:
            peer, id = minidist.Connection(), f"tcp://127.0.0.1:{port}#0"
            await peer.connect(s.address, "worker")
            peer.send(["register-worker", id, "nobody", 1, [], []])
            await peer.receive()
            with pytest.raises(ConnectionError, match=f"no connection to {id}"):
                await c.run(os.getpid)
            await peer.close()
        holder.close()

    asyncio.run(main())
    assert "Cannot reach tcp://127.0.0.1" in caplog.text


class Silent(Worker):
    """Takes data connections, and says nothing."""

    async def serve(self, connection):
        await asyncio.Event().wait()


def test_of_a_worker_that_is_taken_for_dead_no_answer_is_expected():
    async def main():
        async with (
            minidist.Scheduler() as s,
            Silent(s.address, 1) as a,
            Client(s.address, asynchronous=True) as c,
        ):
            asking = asyncio.ensure_future(c.run(os.getpid))
            await until(lambda: a.id in c.links and c.links[a.id].writer)
            s.happens("worker-left", a.id, "silent")
            with pytest.raises(ConnectionError, match=f"no connection to {a.id}"):
                await asyncio.wait_for(asking, 10)

    asyncio.run(main())


@on_cluster
async def test_whoever_uses_the_mind_of_a_worker_holds_its_lock(c, a, b):
    class Mind(type(a.state)):
        def __getattribute__(self, name):
            if name.startswith("stimulus_"):
                (safe if a.lock._is_owned() else unsafe).add(name.removeprefix("stimulus_"))
            return super().__getattribute__(name)

    safe, unsafe = set(), set()
    a.state.__class__ = Mind
    on_b = c.submit(bytes, 100_000, workers="b")
    assert await c.submit(len, on_b, workers="a") == 100_000
    with pytest.raises(ZeroDivisionError):
        await c.submit(operator.truediv, 1, 0, workers="a")
    await c.scatter(1, workers="a")
    assert {"compute_task", "take", "data", "finished", "failed", "put_data"} <= safe
    assert not unsafe


@on_cluster
async def test_a_coroutine_that_has_ended_is_not_kept(c, a, b):
    assert await c.submit(asyncio.sleep, 0, "done", workers="a") == "done"
    assert not [task for task in a.tasks if task.done()]


def test_a_future_of_a_known_task_looks_like_what_it_is_at_once(scheduler):
    with Process(SCRIPT, "worker", scheduler.address), Client(scheduler.address) as c:
        first = c.submit(abs, -1)
        wait(first)
        looks = [repr(c.submit(abs, -1)) for _ in range(20)]
        assert looks == [f"<Future: finished, type: int, key: {first.key}>"] * 20


def test_a_result_that_is_retried_before_it_is_taken_is_to_be_waited_for_again():
    with pytest.raises(RuntimeError, match="retried just now: wait for it again"):
        minidist.outcome(minidist.FutureState("x", 1))


class Unreadable:
    """It can be pickled, with more bytes than it says, and not be unpickled."""

    nbytes = 1

    def __reduce__(self):
        return refuse_to_be_made, (bytes(100_000),)


def refuse_to_be_made(data):
    raise ValueError("not here")


@on_cluster
async def test_what_cannot_be_unpickled_is_named_with_its_place_and_its_cause(c, a, b):
    call = c.submit(abs, Unreadable(), key="call", workers="a")
    text = "the call of 'call' cannot be unpickled on a: ValueError: not here: can that worker"
    with pytest.raises(RuntimeError, match=text):
        await call
    with pytest.raises(RuntimeError, match="the result of 'result' cannot be unpickled here"):
        await c.submit(Unreadable, key="result")


@on_cluster
async def test_a_result_that_is_larger_than_it_says_stays_on_its_worker(c, a, b):
    with pytest.raises(RuntimeError, match="cannot be unpickled"):
        await c.submit(Unreadable)
    assert len(c.links) == 2, "it was asked for there"


def test_a_value_that_is_freed_while_it_is_unpickled_is_not_kept():
    worker = Worker("127.0.0.1:8786")  # It is never started.
    assert worker.unpacked(("x", 1), minidist.Packed(dumps([1]))) == [1]
    assert not worker.data


def test_a_value_is_unpickled_once():
    worker = Worker("127.0.0.1:8786")  # It is never started.
    worker.state.data["x", 1] = minidist.Packed(dumps([1]))
    assert worker.data["x"] == [1] and worker.data["x"] is worker.data["x"]


def test_who_cannot_count_the_cores_has_one_thread(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert Worker("127.0.0.1:8786").nthreads == 1
    cluster = minidist.LocalCluster(asynchronous=True)  # Neither is started.
    assert (cluster.n_workers, cluster.threads_per_worker) == (1, 1)


def test_a_future_can_be_looked_at_in_the_loop_and_while_that_is_busy():
    with Client(n_workers=0) as c:
        busy, go_on = threading.Event(), threading.Event()
        asyncio.run_coroutine_threadsafe(hold_up(busy, go_on, looks := [], c), c.loop)
        busy.wait(30)
        future = c.submit(abs, -1)
        assert re.fullmatch("<Future: pending, key: abs-.*>", repr(future))
        looks.append(future)
        go_on.set()
        c.who_has()  # It is answered when the loop has gone on.
        assert looks == [future, f"<Future: pending, key: {future.key}>"]


async def hold_up(busy, go_on, looks, c):
    """Hold up a client's loop; then look at a future of it, from there."""
    busy.set()
    go_on.wait(30)
    looks.append(repr(looks[0]))


def test_a_synchronous_client_serves_many_threads(scheduler):
    def use(n):
        return c.submit(operator.add, c.submit(abs, -n), 1).result(30)

    with Process(SCRIPT, "worker", scheduler.address), Client(scheduler.address) as c:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(use, range(100))) == list(range(1, 101))


def test_in_a_forked_process_what_waits_for_a_cluster_raises_and_nothing_is_closed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, minidist\n"
        "with minidist.Client(processes=False) as c, minidist.Client(c.cluster) as d:\n"
        "    f = d.submit(pow, 2, 3, workers='nobody')\n"
        "    if not os.fork():\n"
        "        for wait in (f.result, d.scheduler_info, d.cancel):\n"
        "            try:\n"
        "                wait(*[f][: wait == d.cancel])\n"
        "            except RuntimeError as error:\n"
        "                assert 'parent' in str(error), error\n"
        "        repr(d), d.close(), c.close(), os._exit(7)\n"
        "    assert os.WEXITSTATUS(os.wait()[1]) == 7\n"
        "    assert d.submit(abs, -1).result() == 1\n"
    )
    with Process(script, PYTHONPATH=str(ROOT)) as p:
        _, err = p.communicate(timeout=30)
        assert p.returncode == 0, err


def test_a_call_from_the_own_loop_of_a_synchronous_client_raises(scheduler):
    async def from_the_loop():
        with pytest.raises(RuntimeError, match="deadlock"):
            pending.result()
        with pytest.raises(RuntimeError, match="deadlock"):
            c.gather([pending])
        with pytest.raises(RuntimeError, match="deadlock"):
            c.close()
        assert repr(c).startswith(f"<Client: {c._address}, ")  # What it was told last.
        assert repr(pending) == f"<Future: pending, key: {pending.key}>"

    with Client(scheduler.address) as c:
        pending = c.submit(abs, -1)
        asyncio.run_coroutine_threadsafe(from_the_loop(), c.loop).result(30)


def test_a_name_in_use_is_refused_with_exit_code_1(scheduler):
    worker = [SCRIPT, "worker", scheduler.address, "--nthreads", 1, "--name", "alice"]
    with Process(*worker) as first:
        assert first.address
        with Process(*worker) as second:
            _, err = second.communicate(timeout=30)
            assert second.returncode == 1
            assert "alice" in err and len(err.splitlines()) == 1
        with Client(scheduler.address) as c:
            assert c.submit(os.getpid).result(30) == first.pid


def test_a_port_that_was_asked_for_and_is_in_use_is_an_error(scheduler):
    port = scheduler.address.rpartition(":")[2]
    with Process(SCRIPT, "scheduler", "--port", port) as second:
        _, err = second.communicate(timeout=30)
        assert second.returncode == 1
        assert port in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "option, value",
    [("--port", 70_000), ("--port", -1), ("--worker-ttl", "inf"), ("--worker-ttl", 0)],
)
def test_a_number_that_makes_no_sense_is_refused_in_one_line(option, value):
    with Process(SCRIPT, "scheduler", "--port", 0, option, value) as p:
        out, err = p.communicate(timeout=30)
        assert p.returncode == 1 and out == "" and len(err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--nthreads", "--nworkers"])
def test_no_threads_or_no_workers_are_no_arguments(option):
    with Process(SCRIPT, "worker", "127.0.0.1:1", option, 0) as p:
        out, err = p.communicate(timeout=30)
        assert p.returncode == 2 and out == "" and "must be at least 1" in err


def test_only_a_port_in_use_makes_a_scheduler_try_the_next():
    with Process(SCRIPT, "scheduler", "--host", "192.0.2.1") as p:
        _, err = p.communicate(timeout=30)
        assert p.returncode == 1
        assert "192.0.2.1" in err and len(err.splitlines()) == 1


NEXT_PORT = """
import sys, minidist
minidist.DEFAULT_PORT = int(sys.argv[1])
sys.exit(minidist.main(["scheduler"]))
"""


def test_the_next_port_is_taken_with_a_warning_when_the_default_one_is_in_use():
    assert minidist.DEFAULT_PORT == 8786, "as dask's; which others on this machine may use"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with Process("-c", NEXT_PORT, port) as p:
            assert port < int(p.address.rpartition(":")[2]) < port + 100
            assert f"Port {port} is in use" in p.stderr.readline()


def has_ipv6():
    """Whether this machine has an address of that kind: most containers have the kind alone."""
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::"])
def test_a_scheduler_for_all_hosts_prints_an_address_that_others_can_reach(host):
    if host == "::" and not has_ipv6():
        pytest.skip("no IPv6 here")
    with Process(SCRIPT, "scheduler", "--port", 0, "--host", host) as p:
        address = p.address
        assert "0.0.0.0" not in address and ":::" not in address
        with Process(SCRIPT, "worker", address), Client(address) as c:
            assert c.submit(abs, -1).result(30) == 1


def test_a_worker_started_before_its_scheduler_keeps_trying_and_says_so_once():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Process(SCRIPT, "worker", f"127.0.0.1:{port}") as worker:
        assert str(port) in worker.stderr.readline()
        with Process(SCRIPT, "scheduler", "--port", port):
            assert worker.address
            worker.send_signal(signal.SIGTERM)
            assert "trying" not in worker.communicate(timeout=30)[1]


def test_a_worker_of_a_local_cluster_that_is_just_ending_says_nothing():
    with socket.create_server(("127.0.0.1", 0)) as ending:
        address = f"127.0.0.1:{ending.getsockname()[1]}"
        with Process(SCRIPT, "worker", address, "--quiet") as worker:
            for _ in range(2):  # It is cut off, and tries again.
                ending.accept()[0].close()
            worker.kill()
            assert worker.communicate(timeout=30) == ("", "")


def test_modules_in_the_current_directory_of_a_worker_are_importable(
    scheduler, tmp_path, monkeypatch
):
    (tmp_path / "beside_the_user.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    import beside_the_user

    with Process(SCRIPT, "worker", scheduler.address, cwd=tmp_path), Client(scheduler.address) as c:
        assert c.submit(beside_the_user.double, 21).result(30) == 42


def test_what_tasks_print_is_there_however_their_worker_ends(scheduler):
    run = Process(SCRIPT, "worker", scheduler.address, PYTHONUNBUFFERED="")
    with run as worker, Client(scheduler.address) as c:
        assert worker.address
        c.run(print, "said")
        worker.kill()
        assert worker.stdout.read() == "said\n"


@pytest.mark.parametrize(
    "command, flags",
    [("scheduler", ["--host", "--port"]), ("worker", ["IP:PORT", "--nthreads", "--name"])],
)
def test_help_explains_every_flag(command, flags):
    with Process(SCRIPT, command, "--help") as p:
        out, _ = p.communicate(timeout=30)
        assert p.returncode == 0
        for flag in flags:
            assert re.search(rf"^  {flag}.*\s\w+", out, re.MULTILINE), flag


def test_large_data_of_a_function_is_pickled_once_for_a_whole_map():
    data = pickle.PickleBuffer(bytearray(300_000))
    function = minidist.dump_function(lambda x: (x, len(bytes(data))))
    (one, _), (two, _) = (minidist.dump_call(function, (x,), {}) for x in (1, 2))
    assert one[0] is two[0] and len(one[0]) > 300_000 > 1_000 > sum(map(len, one[1:]))
    for frame in (one[0], bytearray(one[0])):  # As it comes from far, it is large.
        func, args, kwargs = minidist.load_call((frame, *two[1:]), {})
        assert func(*args, **kwargs) == (2, 300_000)


@on_cluster
async def test_a_function_may_have_a_future_and_large_data(c, a, b):
    def add(future, data, x):
        return future + len(bytes(data)) + x

    data = pickle.PickleBuffer(bytearray(300_000))
    (y,) = c.map(functools.partial(add, c.submit(abs, -1), data), [2])
    assert await y == 300_003


@pytest.mark.parametrize("kind", [typing.NewType, typing.ParamSpec, typing.TypeVarTuple])
def test_a_type_of_a_script_can_travel_on_from_where_it_came(kind):
    one = kind("Number", int) if kind is typing.NewType else kind("Number")
    one.__module__ = "__main__"
    for _ in range(2):
        one = loads(dumps(one))
        assert (type(one), one.__module__, one.__name__) == (kind, "__main__", "Number")
    assert getattr(one, "__supertype__", int) is int


def test_objects_of_a_class_with_slots_come_back(scheduler):
    class Named:
        __slots__ = ("__name",)

        def name(self):
            return self.__name

    @dataclasses.dataclass(slots=True)
    class Point(Named):
        x: int = 1

    class One(Point):
        __slots__ = "one"

    # A process of its own: here, the classes would be found, and not be made anew.
    with Process(SCRIPT, "worker", scheduler.address), Client(scheduler.address) as c:
        sent = One(2)
        sent._Named__name, sent.one = "p", sent
        back = c.submit(lambda x: x, sent).result(30)
        assert (type(back), back.x, back.name(), back.one) == (One, 2, "p", back)
        assert c.submit(Point).result(30) == Point(1)


@on_cluster
async def test_what_a_method_of_a_builtin_changes_is_of_its_task_alone(c, a, b):
    for method in (random.Random(1).random, collections.deque([1, 2]).popleft, [1, 2].pop):
        tasks = [c.submit(method, pure=False, workers="a") for _ in range(2)]
        assert len(set(await c.gather(tasks))) == 1


def test_a_module_that_is_to_go_by_value_does():
    module = types.ModuleType("only_here")
    exec("def double(x):\n    return 2 * x\n", vars(module))
    with unittest.mock.patch.dict(sys.modules, only_here=module):
        minidist.cloudpickle.register_pickle_by_value(module)
        frames = dumps(module.double)
        minidist.cloudpickle.unregister_pickle_by_value(module)
    assert loads(frames)(2) == 4


def test_a_function_without_an_importable_name_goes_by_value():
    base = 10
    assert loads(dumps(lambda x: base + x))(1) == 11


@on_cluster
async def test_wait_can_return_at_the_first_exception(c, a, b):
    pending, good = c.submit(through, 0), c.submit(abs, -1)
    await good
    bad = c.submit(int, "no number")
    done, not_done = await wait([pending, good, bad], return_when="FIRST_EXCEPTION")
    assert (done, not_done) == ({good, bad}, {pending})


@on_cluster
async def test_wait_takes_any_time_that_others_take(c, a, b):
    x, y = c.submit(through, 0), c.submit(abs, -1)
    with pytest.raises(TimeoutError):
        await wait([x], timeout=datetime.timedelta(milliseconds=20))
    with pytest.raises(ValueError, match="is no time"):
        await wait([x], timeout=[y])
    with pytest.raises(TypeError, match="not wait"):
        wait(x, y)


@on_cluster
async def test_an_exception_comes_back_with_its_cause(c, a, b):
    def fail():
        try:
            slow_pow(1, "x")
        except TypeError as error:
            raise RuntimeError("outer") from error

    async def fail_in_a_group():
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.to_thread(fail))

    async def fail_in_groups():
        async with asyncio.TaskGroup() as group:
            group.create_task(fail_in_a_group())

    for function in fail, fail_in_a_group, fail_in_groups:
        error = await c.submit(function).exception()
        (first, *_) = traceback.extract_tb(error.__traceback__)
        assert first.name == function.__name__, "there are no lines of ours"
        while isinstance(error, ExceptionGroup):
            (error,) = error.exceptions
        assert traceback.extract_tb(error.__traceback__)[-1].name == "fail"
        assert type(error.__cause__) is TypeError and error.__suppress_context__
        assert traceback.extract_tb(error.__cause__.__traceback__)[-1].name == "slow_pow"


def test_what_is_due_to_its_own_group_travels():
    def fail():
        try:
            raise ExceptionGroup("all", [ValueError(1), KeyError(2)])
        except* ValueError as group:
            raise group.exceptions[0]

    with pytest.raises(ExceptionGroup) as info:
        fail()
    frames = pack_exception(info.value)
    assert len(frames[0]) < 10_000, "it goes round and round"
    error = unpack_exception(frames)
    assert [type(one) for one in error.exceptions] == [ValueError, ExceptionGroup]
    assert isinstance(error.exceptions[0].__context__, ExceptionGroup)


class SlowToUnpickle:
    def __reduce__(self):
        return time.sleep, (0.05,)


def test_the_time_that_a_task_takes_includes_that_of_unpickling_it():
    """Else many would be sent ahead of calls that are quick, but have a thousand inputs."""

    async def main():
        async with (
            minidist.Scheduler() as s,
            Worker(s.address, 1),
            Client(s.address, asynchronous=True) as c,
        ):
            assert await c.submit(str, SlowToUnpickle()) == "None"
            assert s.state.durations["str"] >= 50_000

    asyncio.run(main())


class Misnamed(ExceptionGroup):
    exceptions = property(lambda self: ["no exceptions"])


@on_cluster
async def test_a_group_may_call_something_else_its_exceptions(c, a, b):
    def fail():
        raise Misnamed("all", [ValueError(1)])

    for _ in range(4):  # More than there are threads.
        error = await c.submit(fail, pure=False).exception()
        assert type(error) is Misnamed and error.exceptions == ["no exceptions"]


def test_a_group_to_which_all_its_exceptions_are_due_is_packed_once():
    def fail(n):
        try:
            raise ExceptionGroup("first", [ValueError(i) for i in range(n)])
        except ExceptionGroup as group:
            errors = []
            for i in range(n):
                try:
                    raise KeyError(i)
                except KeyError as error:
                    errors.append(error)
            raise ExceptionGroup("second", errors) from group

    sizes = []
    for n in (100, 400):
        with pytest.raises(ExceptionGroup) as info:
            fail(n)
        sizes.append(len(pack_exception(info.value)[0]))
    assert sizes[1] < 5 * sizes[0]


def test_what_is_in_a_group_is_pickled_once():
    error = ValueError()
    error.large = bytes(100_000)
    assert len(pack_exception(ExceptionGroup("all", [error]))[0]) < 110_000


def test_an_exception_may_have_something_that_is_called_exceptions():
    error = ValueError("they are no group")
    error.exceptions = 5
    got = unpack_exception(pack_exception(error))
    assert (type(got), got.exceptions) == (ValueError, 5)


@on_cluster
async def test_tasks_wait_while_no_worker_is_there(c, a, b):
    await a.close()
    await b.close()
    x = c.submit(abs, -1)
    with pytest.raises(TimeoutError):
        await x.result(timeout=0.05)
    async with Worker(c._address, nthreads=1):
        assert await x == 1


def test_small_buffers_travel_within_the_pickle_and_arrive_writable():
    frames = dumps([pickle.PickleBuffer(bytearray(8)) for _ in range(1_000)])
    assert len(frames) == 1
    loads(frames)[0][:] = b"writable"


def test_nobody_can_take_the_scheduler_s_place():
    async def main():
        async with minidist.Scheduler() as s, Client(s.address, asynchronous=True) as c:
            impostor = minidist.Connection()
            await impostor.connect(s.address, "worker")
            impostor.send(["register-worker", minidist.SCHEDULER, "x", 1, [], []])
            with pytest.raises(EOFError):
                await impostor.receive()
            assert await c.who_has() == {}

    asyncio.run(main())


def test_a_large_buffer_is_not_copied_into_the_pickle_and_arrives_writable():
    data = bytearray(100_000)
    _, frame = frames = dumps(pickle.PickleBuffer(data))
    data[0] = 7
    assert frame[0] == 7, "the frame is the buffer itself"
    copy = loads([frames[0], bytes(frame)])
    memoryview(copy)[0] = 8
    assert copy == bytes([8]) + bytes(99_999)


class Unprintable(Exception):
    def __str__(self):
        raise KeyError("no words")

    def __reduce__(self):
        raise KeyError("no pickle")


class Unmeasurable:
    @property
    def nbytes(self):
        raise OSError("no size")


def raise_unprintable():
    raise Unprintable


@on_cluster
async def test_what_cannot_be_printed_or_measured_harms_nobody_else(c, a, b):
    with pytest.raises(RemoteError, match="Unprintable"):
        await c.submit(raise_unprintable)
    assert isinstance(await c.submit(Unmeasurable), Unmeasurable)
    assert await c.gather(c.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]


@on_cluster
async def test_a_timeout_says_how_many_futures_it_left_undone(c, a, b):
    with pytest.raises(TimeoutError, match="2 of 3 futures"):
        await wait([c.submit(abs, -1), c.submit(through, 0), c.submit(through, 0, 1)], "100 ms")


def test_a_connection_writes_what_waits_before_it_closes():
    frames = [b"x" * 3_000_000] * 2

    async def main():
        got = asyncio.get_running_loop().create_future()

        async def serve(reader, writer):
            connection = minidist.Connection()
            await connection.open(reader, writer, "holder", accepting=True)
            got.set_result([*await connection.receive(), *await connection.receive()])
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection = minidist.Connection()
        await connection.connect(f"127.0.0.1:{port}", "worker")
        connection.send(["task-erred", 1, frames])
        await asyncio.sleep(0)
        while connection.writing:  # The slow write ends, and what comes next is a new flush.
            await asyncio.sleep(0)
        connection.send(["task-erred", 2, ()])
        await connection.close()
        server.close()
        return await got

    messages = asyncio.run(main())
    (_, *first), (_, *second) = messages
    assert (first, second) == ([1, tuple(frames)], [2, ()])


@settings(deadline=None, max_examples=50)
@given(plain, plain)
def test_equal_calls_have_equal_keys_and_others_have_not(x, y):
    assume(repr(x) != repr(y))

    async def main():
        async with (
            minidist.Scheduler() as s,
            Client(s.address, asynchronous=True) as c,
            Client(s.address, asynchronous=True) as d,
        ):
            key = c.submit(max, x, key=None).key
            assert key.startswith("max-")
            assert key == c.submit(max, x).key == d.submit(max, x).key
            other = [c.submit(max, y), c.submit(min, x), c.submit(max, x, x), c.submit(max, x=x)]
            assert len({key, *(f.key for f in other)}) == 5

    asyncio.run(main())


def test_a_lost_scheduler_ends_workers_and_futures_and_says_so(scheduler):
    with Process(SCRIPT, "worker", scheduler.address, "--nthreads", 1) as p:
        assert p.address
        with Client(scheduler.address) as c:
            here = c.submit(abs, -1)
            assert here.result(30) == 1
            pending = c.submit(signal.pause)
            scheduler.kill()
            with pytest.raises(minidist.CancelledError, match="scheduler"):
                pending.result(30)
            assert here.result() == 1
            with pytest.raises(ConnectionError, match=scheduler.address):
                c.submit(abs, 1)
        assert p.wait(30) == 1
        assert p.stderr.read().strip().splitlines()[-1].endswith("is gone")


def test_a_wrong_secret_is_refused_in_one_line_that_says_where_it_is_looked_for(scheduler):
    with Process(SCRIPT, "worker", scheduler.address, MINIDIST_TOKEN="wrong") as p:
        _, err = p.communicate(timeout=30)
        assert p.returncode == 1
        assert "MINIDIST_TOKEN" in err and len(err.splitlines()) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIDIST_TOKEN", "wrong")
        with pytest.raises(PermissionError, match="MINIDIST_TOKEN"):
            Client(scheduler.address)
    with Client(scheduler.address):
        pass  # It still serves those who hold the secret.


def test_a_secret_that_cannot_be_read_is_the_end_at_once_and_said_in_one_line(scheduler, tmp_path):
    (tmp_path / ".minidist").touch()  # No folder: nothing can be in it.
    for command in (["scheduler", "--port", 0], ["worker", scheduler.address]):
        with Process(SCRIPT, *command, MINIDIST_TOKEN="", HOME=str(tmp_path)) as p:
            _, err = p.communicate(timeout=30)
            assert p.returncode == 1
            assert "no secret" in err and len(err.splitlines()) == 1


def test_a_secret_is_the_same_however_its_file_ends_and_an_empty_one_is_none(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIDIST_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    made, path = minidist.secret(), tmp_path / ".minidist" / "token"
    assert not (path.parent.stat().st_mode | path.stat().st_mode) & 0o077, "nobody else reads it"
    path.write_bytes(made + b"\n")
    assert minidist.secret() == made
    path.write_bytes(b"\n")
    with pytest.raises(PermissionError, match="empty"):
        minidist.secret()
    monkeypatch.setenv("MINIDIST_TOKEN", os.fsdecode(b"\xff"))
    assert minidist.secret() == b"\xff"


def test_who_is_second_to_make_the_secret_takes_that_of_the_first(monkeypatch, tmp_path):
    link = Path.hardlink_to

    def be_second(path, draft):
        path.write_text("of the first")
        path.chmod(0o600)
        link(path, draft)

    monkeypatch.delenv("MINIDIST_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(Path, "hardlink_to", be_second)
    (tmp_path / ".minidist").mkdir()
    assert minidist.secret() == b"of the first"
    assert [path.name for path in (tmp_path / ".minidist").iterdir()] == ["token"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_workers_and_schedulers_at_once_and_without_a_traceback(
    scheduler, listener, number
):
    with Process(SCRIPT, "worker", scheduler.address, "--nthreads", 1) as worker:
        with Client(scheduler.address) as c:
            f = c.submit(call_home, listener.getsockname()[1], "never")
            home, _ = listener.accept()  # It runs now; nobody waits for it.
            for p in [worker, scheduler]:
                p.send_signal(number)
                _, err = p.communicate(timeout=30)
                assert p.returncode == 0 and "Traceback" not in err
            home.close()
            with pytest.raises(minidist.CancelledError):
                f.result(30)


@on_cluster
async def test_an_argument_that_a_worker_cannot_unpickle_fails_that_task_alone(c, a, b):
    class Bomb:
        def __reduce__(self):
            return int, ("no number",)

    good, bad = c.submit(abs, -1), c.submit(abs, Bomb(), key="the-bomb")
    with pytest.raises(RuntimeError, match="the-bomb") as info:
        await bad
    assert type(info.value.__cause__) is ValueError
    assert await good == 1 and await c.submit(abs, -2) == 2


@on_cluster
async def test_a_result_that_cannot_be_pickled_fails_alone_and_says_which(c, a, b):
    lock, good = c.submit(threading.Lock, key="the-lock"), c.submit(abs, -1)
    with pytest.raises(TypeError, match="the-lock.*pickle"):
        await lock
    assert await good == 1


class Unpicklable:
    def __init__(self, how):
        self.how = how

    def __reduce__(self):
        raise self.how


class UnpicklableError(Unpicklable, Exception):
    pass


def fail(how):
    raise UnpicklableError(how)


@on_cluster
async def test_what_has_come_is_not_kept_when_it_is_needed_no_more(c, a, b):
    x = await c.scatter("x" * 1_000_000, workers=[a.address])  # From the client to a worker, ...
    y = c.submit(str.upper, x, workers=[b.address])  # ... from there to another, and back.
    assert await y == "X" * 1_000_000
    del x, y
    # With a call, of each kind.
    assert await c.submit(len, "y" * 1_000_000) == 1_000_000
    assert {*(await c.run(len, "z" * 1_000_000)).values()} == {1_000_000}
    await until(lambda: not a.data and not b.data and not c.state.futures)

    def large_frames():
        packed = [o for o in gc.get_objects() if isinstance(o, minidist.Packed)]
        return [frame for frames in packed for frame in frames if len(frame) >= 1_000_000]

    await until(lambda: not large_frames())  # (The thread of ``run`` may not be over yet.)


@on_cluster
async def test_what_a_task_has_raised_keeps_none_of_its_inputs(c, a, b):
    def refuse(value):
        raise ValueError

    async def refuse_slowly(value):
        raise ValueError

    for func in refuse, refuse_slowly:
        x = c.submit(set, key="x", workers=[b.address])
        assert type(await c.submit(func, x, workers=[b.address]).exception()) is ValueError
        gc.disable()
        try:
            value = weakref.ref(*b.data.values())
            del x
            await until(lambda: not b.data)
            await c.submit(abs, -1, workers=[b.address], pure=False)  # In its only thread.
            assert value() is None
        finally:
            gc.enable()


def test_what_a_client_raises_keeps_nothing_of_who_handles_it():
    def handle(fail):
        value = set()
        with pytest.raises(ZeroDivisionError):
            fail()
        return weakref.ref(value)

    def divide():
        return 1 / 0

    with Client(processes=False) as c:
        gc.disable()
        try:
            assert handle(lambda: c.submit(divide).result())() is None
            assert handle(lambda: c.gather([c.submit(divide)]))() is None
            assert handle(lambda: c.run(divide))() is None
        finally:
            gc.enable()


def test_a_worker_gives_small_values_many_at_a_time_and_large_ones_one_by_one():
    worker = Worker("127.0.0.1:8786")  # It is never started.
    sizes = [1] * 1000 + [LIMITS["ride_along_bytes"]] * 3
    worker.state.data = {(f"x{n}", n): bytes(size) for n, size in enumerate(sizes)}
    names, turns = iter([*worker.state.data, ("freed", 1)]), []
    while answers := worker.next_answers(names):
        turns.append([status for *_, status, _ in answers])
    assert turns == [["ok"] * 1001, ["ok"], ["ok"], ["missing"]]


class Asker:
    """A connection to who takes one value after the other, and is gone after the third."""

    def __init__(self):
        self.writer, self.sent, self.taken = self, 0, 0

    def send(self, answer):
        self.sent += 1

    async def written(self):
        self.taken += 1
        assert self.sent == self.taken, "nothing is made before it is taken"

    def is_closing(self):
        return self.taken == 3


def test_who_asks_sets_the_pace_and_for_who_is_gone_nothing_is_made():
    worker, asker = Worker("127.0.0.1:8786"), Asker()  # It is never started.
    worker.state.data = {(f"x{n}", n): bytes(LIMITS["ride_along_bytes"]) for n in range(9)}
    asyncio.run(worker.give(asker, iter(worker.state.data)))
    assert asker.sent == 3


@on_cluster
async def test_an_exception_that_cannot_be_pickled_does_not_end_the_thread(c, a, b):
    for how in StopIteration, SystemExit:
        with pytest.raises(minidist.RemoteError, match="UnpicklableError"):
            await c.submit(fail, how, key=f"an error {how.__name__}").result(30)
    assert await c.gather(c.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]


@on_cluster
async def test_however_a_result_cannot_be_pickled_its_worker_goes_on(c, a, b):
    for how in StopIteration, SystemExit:
        with pytest.raises(TypeError, match="a result.*pickle"):
            await c.submit(Unpicklable, how, key=f"a result {how.__name__}").result(30)
    assert await c.gather(c.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]


@on_cluster
async def test_a_run_that_stops_an_iteration_is_answered(c, a, b):
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(c.run(next, iter(())), 30)


def test_a_task_that_stops_an_iteration_does_not_end_a_loop_over_results():
    with Client(processes=False) as c:
        futures = c.map(lambda x: next(iter(x)), [[1], [], [3]])
        with pytest.raises(RuntimeError, match="StopIteration") as info:
            list(map(lambda future: future.result(), futures))
        assert isinstance(info.value.__cause__, StopIteration)
        assert isinstance(futures[1].exception(), StopIteration)
        with pytest.raises(RuntimeError, match="StopIteration"):
            list(minidist.as_completed(futures, with_results=True))
        with pytest.raises(RuntimeError, match="StopIteration"):
            c.run(next, iter(()))


@on_cluster
async def test_a_task_that_is_cancelled_does_not_cancel_who_awaits_it(c, a, b):
    async def give_up():
        task = asyncio.ensure_future(asyncio.sleep(30))
        task.cancel()
        await task

    future = c.submit(give_up)
    with pytest.raises(RuntimeError, match="the task raised CancelledError"):
        await future
    assert isinstance(await future.exception(), asyncio.CancelledError)


def test_the_warning_of_a_large_call_names_the_line_of_the_user():
    with Client(n_workers=0) as c, pytest.warns(UserWarning, match="scatter large") as warned:
        large = bytes(11_000_000)
        lines = [inspect.currentframe().f_lineno + n for n in (1, 2, 3)]
        c.submit(len, large)
        c.map(len, [large])
        c.map(min, [[1], [2]], default=large)
    assert [(w.filename, w.lineno) for w in warned] == [(__file__, line) for line in lines]


FAILS = [True]


def fail_once():
    if FAILS:
        raise ArithmeticError("once")
    return "at last"


@pytest.mark.parametrize("raise_errors", [True, False])
def test_what_was_retried_before_its_turn_comes_as_it_was_when_it_was_done(raise_errors):
    FAILS[:] = [True]
    with Client(processes=False) as c:
        future = c.submit(fail_once)
        done = minidist.as_completed([future], with_results=True, raise_errors=raise_errors)
        wait([future])
        while not done._ready:
            c.run(abs, 1)
        FAILS.clear()
        future.retry()
        with pytest.raises(ArithmeticError) if raise_errors else contextlib.nullcontext():
            ((one, (kind, error, _)),) = done.next_batch(block=False)
            assert (one, kind, str(error)) == (future, ArithmeticError, "once")
        assert future.result() == "at last" and done.is_empty()


def test_threads_may_share_batches():
    with Client(n_workers=1, processes=False) as c:
        for n in range(20):
            done = minidist.as_completed(c.map(abs, range(10 * n, 10 * n + 6)))
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                shares = list(pool.map(lambda share: list(share.batches()), [done] * 4))
            assert sum(len(batch) for batches in shares for batch in batches) == 6


@pytest.mark.parametrize(
    "text, value",
    [("10 ms", 0.01), ("0.5s", 0.5), ("2 minutes", 120), ("1 hour", 3600), ("1e3 us", 1e-3)]
    + [("500 milliseconds", 0.5), ("1 day", 86400), ("7", 7), (3, 3), (None, None)]
    + [(datetime.timedelta(minutes=1), 60)],
)
def test_a_timeout_is_a_number_of_seconds_or_says_its_unit(text, value):
    assert minidist.seconds(text) == value


@pytest.mark.parametrize("text", ["soon", "10 parsecs", "", "ms", True, "1.2.3 s", math.nan])
def test_what_is_no_time_is_no_timeout(text):
    with pytest.raises(ValueError):
        minidist.seconds(text)


def test_who_hangs_up_in_the_handshake_has_not_shown_a_wrong_secret(caplog):
    async def main():
        async with minidist.Scheduler() as s:
            reader, writer = await asyncio.open_connection(*minidist.split_address(s.address))
            writer.write(await reader.readexactly(minidist.HELLO.size))
            writer.close()
            while len(s.tasks) > 1:  # Until it has met that end: then only time is told.
                await asyncio.sleep(0)

    asyncio.run(main())
    assert "secret" not in caplog.text


@pytest.mark.parametrize("address", ["http://127.0.0.1:80", "tls://127.0.0.1:80", "tcp:///1:80"])
def test_an_address_of_another_protocol_is_none(address):
    with pytest.raises(ValueError, match="is no address"):
        Client(address)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "here:there", "127.0.0.1:-1", "127.0.0.1:65536", ":8786", "10.0..5:8786"],
)
def test_an_address_is_a_host_and_the_number_of_a_port(address):
    for kind in (Client, Worker):
        with pytest.raises(ValueError, match="is no address"):
            kind(address)


@on_cluster
async def test_a_holder_whose_address_is_none_cannot_be_reached_like_any_that_is_gone(c, a, b):
    b.state.send("tcp://10.0..5:8786#x", "get-data", [("x", 1)])
    b.flush()
    assert len(b.links) == 2
    await until(lambda: list(b.links) == ["scheduler"])


@on_cluster
async def test_what_cannot_be_pickled_is_refused_at_the_call_and_named(c, a, b):
    lock = threading.Lock()
    with pytest.raises(TypeError, match="argument 1 of abs"):
        c.submit(abs, 1, lock)
    with pytest.raises(TypeError, match="argument 'mod' of pow"):
        c.map(pow, [1], [2], mod=lock)
    with pytest.raises(TypeError, match="function '.*lambda"):
        c.submit(lambda: lock)


@on_cluster
async def test_a_closed_client_keeps_its_values_cancels_the_rest_and_refuses_calls(c, a, b):
    here, pending, failed = c.submit(abs, -1), c.submit(through, 0), c.submit(int, "x")
    assert await here == 1
    await wait([failed])
    await c.close()
    await c.close()
    assert await here == 1 and pending.status == "cancelled"
    assert await c.gather([here, {"again": here}]) == [1, {"again": 1}]
    for waiting in [pending.result(), pending.exception(), wait([pending])]:
        with pytest.raises(minidist.CancelledError, match="closed"):
            await waiting
    assert issubclass(minidist.CancelledError, concurrent.futures.CancelledError)
    for call in [lambda: c.submit(abs, 1), lambda: c.map(abs, [1]), failed.retry, here.cancel]:
        with pytest.raises(RuntimeError, match="closed"):
            call()
    with pytest.raises(RuntimeError, match="closed"):
        c.gather([here, pending])


@on_cluster
async def test_what_is_retried_just_when_the_scheduler_is_lost_is_cancelled(c, a, b):
    failed = c.submit(int, "x")
    await wait([failed])
    retrying = failed.retry()  # In the inbox, and not yet read.
    c._end(ConnectionError, "the scheduler is gone")
    await retrying
    with pytest.raises(minidist.CancelledError, match="is gone"):
        await asyncio.wait_for(failed.result(), 10)


@on_cluster
async def test_who_stops_waiting_for_an_answer_can_ask_again(c, a, b):
    question = asyncio.ensure_future(c.who_has())
    await until(lambda: c._answers)
    question.cancel()  # Its answer comes all the same, before that of the next question.
    assert await c.who_has() == {} and await c.submit(abs, -1) == 1


@on_cluster
async def test_of_the_tasks_that_wait_the_one_of_higher_priority_goes_first(c, a, b):
    blockers = [c.submit(through, gate, gate) for gate in range(3)]
    await until(lambda: len(RUNS) == 3)
    GATES[3].set()
    low, high = (c.submit(through, 3, f"prio {n}", priority=n) for n in [-1, 1])
    await asyncio.sleep(0)
    GATES[0].set()  # One thread is free, and takes one after the other.
    await c.gather([low, high])
    assert RUNS[3:] == ["prio 1", "prio -1"] and blockers


@on_cluster
async def test_two_clients_share_a_key_and_the_last_one_lets_it_go(c, a, b):
    async with Client(c._address, asynchronous=True) as d:
        x, y = c.submit(through, 0, "x"), d.submit(through, 0, "x")
        GATES[0].set()
        assert await x == await y == "x" and RUNS == ["x"] and x.key == y.key
        x.release()
        assert await c.submit(abs, -1) == 1  # The release came before this.
        assert await d.submit(through, 0, "x") == "x" and RUNS == ["x"]
        y.release()
        del x
        await until(lambda: not [key for key in [*a.data, *b.data] if key.startswith("through")])


@on_cluster
async def test_a_coroutine_function_runs_in_the_loop_of_its_worker(c, a, b):
    async def where():
        return id(asyncio.get_running_loop()), minidist.get_worker().name

    loop, name = await c.submit(where)
    assert loop == id(asyncio.get_running_loop()) and name in ("a", "b")


def test_an_interrupt_from_the_terminal_leaves_the_workers_of_a_local_cluster_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, minidist\n"
        "os.setsid()\n"
        "client = minidist.Client(n_workers=2)\n"
        "before = client.run(os.getpid)\n"
        "try:\n"
        "    os.killpg(0, signal.SIGINT)\n"
        "    signal.pause()\n"
        "except KeyboardInterrupt:\n"
        "    print(client.run(os.getpid) == before)\n"
        "client.close()\n"
    )
    with Process(script, PYTHONPATH=str(ROOT)) as p:
        assert p.communicate(timeout=30) == ("True\n", "")


def count_to(n):
    yield from range(n)


@on_cluster
async def test_a_generator_is_a_result_like_any_other_and_no_coroutine(c, a, b):
    counting = c.submit(count_to, 3, workers="a")
    assert await c.submit(list, counting, workers="a") == [0, 1, 2]


def test_a_client_that_shuts_down_ends_a_local_cluster_that_it_was_given():
    with minidist.LocalCluster(n_workers=1, threads_per_worker=1) as cluster:
        c = Client(cluster)
        (pid,) = c.run(os.getpid).values()
        c.shutdown()
        with pytest.raises(OSError, match="no scheduler|is gone"):
            for _ in range(1000):  # Until it has ended: then nobody listens any more.
                Client(cluster.address, timeout=0).close()
    assert not cluster.scheduler.state.workers
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


class Leaving(minidist.Scheduler):
    """Hangs up on whoever has registered, as one does that is about to end."""

    async def serve(self, connection):
        await connection.receive()


@pytest.mark.parametrize("peer", [Client, Worker])
def test_a_scheduler_that_hangs_up_before_it_answers_is_not_there(peer):
    async def main():
        async with Leaving() as s:
            options = {"asynchronous": True} if peer is Client else {}
            with pytest.raises(OSError, match=f"no scheduler at {s.address}"):
                async with peer(s.address, timeout=0.2, **options):
                    pass

    asyncio.run(main())


def test_a_worker_that_is_refused_for_its_name_does_no_harm_to_who_bears_it():
    async def join_as_0(cluster):
        with pytest.raises(ValueError, match="a worker named '0' is there already"):
            async with Worker(cluster.address, 1, "0"):
                pass
        await until(lambda: len(cluster.scheduler.links) == 2)

    with minidist.LocalCluster(n_workers=1, threads_per_worker=1) as cluster, Client(cluster) as c:
        pids = c.run(os.getpid)
        asyncio.run(join_as_0(cluster))
        assert c.run(os.getpid) == pids


def others_end(before):
    """Whether all threads that were not there before end.  (Who waits for a process may be late.)"""
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
    return {*threading.enumerate()} <= before


def test_a_local_cluster_whose_workers_do_not_start_says_so_and_leaves_nothing(monkeypatch):
    monkeypatch.setitem(LIMITS, "start_seconds", 0.2)
    monkeypatch.setattr(minidist.sys, "executable", "/bin/false")
    minidist.loop_in_thread(os.getpid())  # That one stays.
    before = {*threading.enumerate()}
    with pytest.raises(TimeoutError, match="0 of 1 worker processes have started"):
        Client(n_workers=1)
    assert others_end(before)


def test_an_interrupt_while_a_call_is_posted_does_not_keep_later_ones_waiting(monkeypatch):
    done = threading.Event()
    with Client(processes=False) as c:
        with monkeypatch.context() as patch:
            patch.setattr(
                c.loop, "call_soon_threadsafe", unittest.mock.Mock(side_effect=[KeyboardInterrupt])
            )
            with pytest.raises(KeyboardInterrupt):
                c.submit(abs, -1)
        future = c.submit(abs, -2)
        future.add_done_callback(lambda _: done.set())
        assert done.wait(30)


@on_cluster
async def test_what_is_done_to_a_large_result_changes_no_other(c, a, b):
    future = c.submit(lambda: pickle.PickleBuffer(bytearray(minidist.LARGE)))
    first = await future
    first[0] = 5
    assert (type(first), (await future)[0], (await c.gather(future))[0]) == (bytearray, 0, 0)


def test_an_interrupt_while_a_local_cluster_starts_leaves_nothing(monkeypatch):
    start, started = asyncio.create_subprocess_exec, []

    async def start_and_interrupt(*command, **options):
        started.append(await start(*command, **options))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_interrupt)
    minidist.loop_in_thread(os.getpid())  # That one stays.
    before = {*threading.enumerate()}
    with pytest.raises(KeyboardInterrupt):
        Client(n_workers=1)
    assert others_end(before) and started[0].returncode == -signal.SIGKILL


def test_a_local_cluster_that_was_awaited_can_be_a_context_manager():
    async def main():
        cluster = await minidist.LocalCluster(processes=False, asynchronous=True)
        address = cluster.address
        async with cluster:
            assert cluster.address == address and len(cluster.workers) == 1

    asyncio.run(main())


def test_schedulers_and_workers_can_be_awaited_and_then_be_context_managers():
    async def main():
        scheduler = await minidist.Scheduler()
        workers = await asyncio.gather(*[Worker(scheduler.address, nthreads=1) for _ in range(2)])
        async with scheduler, workers[0], workers[1]:
            assert len(scheduler.state.workers) == 2

    asyncio.run(main())


def test_a_worker_gives_its_scheduler_any_time_that_others_take():
    async def main(timeout):
        await Worker("127.0.0.1:1", timeout=timeout)

    with pytest.raises(ConnectionError, match=r"no scheduler at 127.0.0.1:1 within 0.01 s"):
        asyncio.run(main("10 ms"))
    with pytest.raises(ValueError, match="'soon' is no time"):
        asyncio.run(main("soon"))


@on_cluster
async def test_a_worker_that_is_refused_hangs_up(c, a, b):
    worker = Worker(a.scheduler_address, nthreads=1, name="a")
    with pytest.raises(ValueError, match="name"):
        await worker
    assert worker.scheduler.writer.is_closing()


def test_a_local_cluster_on_a_port_that_is_taken_says_so_and_leaves_nothing():
    minidist.loop_in_thread(os.getpid())  # That one stays.
    before = {*threading.enumerate()}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="address already in use"):
            Client(n_workers=1, port=taken.getsockname()[1])
    assert others_end(before)


def test_a_frame_that_did_not_come_is_refused():
    message = ["put-data", "x", 1, [1]]
    with pytest.raises(ProtocolError):
        check_message(message, [b"only one"], "client")


@settings(deadline=None)
@given(some_batches, st.data())
def test_a_field_of_another_kind_is_a_protocol_error_and_nothing_else(sent_batches, data):
    sender, batches = sent_batches
    assume(batches and batches[0])
    message = batches[0][0]
    message[data.draw(st.integers(0, len(message) - 1))] = data.draw(anything_in_json)
    with contextlib.suppress(ProtocolError):
        (op, *values), *_ = read(b"".join(pack(batches[0])), sender)
        hash(dict(zip(OPS[op][1], values, strict=True)).get("key"))


def test_a_frame_that_messages_share_travels_once():
    function = bytes(10_000)
    message = ["warning", (function, b"arguments")]
    assert sum(map(len, pack([message] * 100))) < 20_000


@settings(deadline=None)
@given(some_batches, st.integers(min_value=0))
def test_a_stream_that_ends_within_a_batch_is_incomplete(sent_batches, cut):
    sender, batches = sent_batches
    stream = b"".join(pack(batches[0] if batches else []))
    with pytest.raises(asyncio.IncompleteReadError):
        read(stream[: cut % len(stream)], sender)


@pytest.mark.filterwarnings("ignore:a call of more than 10 MB")
def test_a_client_sends_all_that_was_submitted_before_it_closes(scheduler, listener):
    port = listener.getsockname()[1]
    with Process(SCRIPT, "worker", scheduler.address, "--nthreads", 1, PYTHONPATH=str(ROOT)) as w:
        assert w.address
        with Client(scheduler.address) as c:
            minidist.fire_and_forget(c.submit(call_home, port, bytes(40_000_000)))
        home, _ = listener.accept()
        with home:
            assert int.from_bytes(home.recv(8), "big") == w.pid


def test_who_was_about_to_register_when_the_cluster_was_shut_down_is_not_kept():
    async def main():
        async with minidist.Scheduler() as s:
            late = minidist.Connection()
            await late.connect(s.address, "client")
            async with Client(s.address, asynchronous=True) as c:
                await c.shutdown()
            late.send(["register-client", "late", []])
            with pytest.raises(EOFError):
                await late.receive()
            await late.close()

    asyncio.run(main())


def test_what_is_stopped_twice_at_once_cleans_up_undisturbed():
    async def main():
        body, cleaned_up = minidist.Body(minidist.WorkerMind()), []

        async def work():
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.01)
                cleaned_up.append(True)

        body.start(work())
        body.start(body.stop())  # As a cluster that a client shuts down, ...
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await body.stop()  # ... and that its user closes.
        assert cleaned_up

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore:a call of more than 10 MB")
def test_a_client_can_be_closed_while_a_large_call_is_being_sent(capfd):
    for _ in range(5):
        with Client(processes=False) as c:
            c.submit(len, bytes(11_000_000))
    assert capfd.readouterr().err == ""


def test_a_closed_client_says_that_it_is_closed_whatever_is_asked():
    c = Client(processes=False)
    c.close()
    for ask in [
        *(c.who_has, c.nthreads, c.scheduler_info, c.shutdown, lambda: c.run(os.getpid)),
        *(lambda: c.submit(abs, -1), lambda: c.map(abs, []), lambda: c.scatter(1)),
        *(lambda: c.cancel([]), lambda: c.wait_for_workers(1)),
    ]:
        with pytest.raises(RuntimeError, match="this client is closed"):
            ask()


def test_who_asks_a_scheduler_that_goes_is_told_that_it_is_gone():
    async def main():
        async with minidist.Scheduler() as s, Client(s.address, asynchronous=True) as c:
            asking = asyncio.ensure_future(c.who_has())
            await asyncio.sleep(0)
            c._scheduler.hang_up()
            with pytest.raises(ConnectionError, match=f"the scheduler at {s.address} is gone"):
                await asking
            assert not c._answers

    asyncio.run(main())


def test_a_shutdown_is_no_fault_of_anybody(caplog):
    async def main():
        async with minidist.Scheduler() as s, Worker(s.address, 1):
            async with Client(s.address, asynchronous=True) as c:
                await (await Client(s.address, asynchronous=True)).shutdown()
                await asyncio.wait([c._scheduler.following])

    asyncio.run(main())
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_what_is_fired_and_forgotten_after_the_end_of_its_client_is_refused():
    with Client(processes=False) as c:
        futures = c.map(through, range(2))
    with pytest.raises(RuntimeError, match="this client is closed"):
        minidist.fire_and_forget(futures)


def make_nameless():
    class Kind(type):
        @property
        def __name__(self):
            raise RuntimeError("no name")

    return Kind("A", (), {})()


def raise_what_cannot_be_shown():
    raise SyntaxError("odd", ("file", 1, "no column", "text"))


def raise_what_becomes_a_string():
    class Error(Exception):
        def __reduce__(self):
            return str, ("x",)

    raise Error("odd")


@on_cluster
async def test_whatever_a_task_returns_or_raises_its_thread_goes_on(c, a, b):
    for function in (make_nameless, raise_what_cannot_be_shown, raise_what_becomes_a_string):
        for _ in range(6):  # More than there are threads.
            error = await asyncio.wait_for(c.submit(function, pure=False).exception(), 10)
            assert isinstance(error, (RuntimeError, SyntaxError, RemoteError))
            assert "no name" in str(error) or "odd" in str(error)


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Unspeaking:
    nbytes = 1_000_000

    def __reduce__(self):
        raise Unspeakable


@on_cluster
async def test_a_result_whose_error_has_no_text_fails_as_any_that_cannot_be_pickled(c, a, b):
    with pytest.raises(TypeError, match="Unspeaking, cannot be pickled: .*Unspeakable"):
        await c.submit(Unspeaking)


@on_cluster
async def test_only_a_namedtuple_is_scattered_by_its_fields(c, a, b):
    tree = await c.scatter(ast.parse("x = 1"))
    assert ast.unparse(await tree) == "x = 1"


@on_cluster
async def test_a_size_that_makes_no_sense_is_not_believed(c, a, b):
    for nbytes in (-1, 10**5000):
        sized = type("Sized", (), {"nbytes": nbytes})()
        future = await c.scatter(sized, hash=False)
        assert 0 < (await c.nbytes(summary=False))[future.key] < 1000
    for priority in (10**5000, -math.inf, -1e300, None):
        assert await c.submit(abs, 1, priority=priority) == 1
    for priority in (math.nan, "1", "", 1j):
        with pytest.raises(TypeError, match="is no number"):
            c.submit(abs, 1, priority=priority)
    with pytest.raises(ValueError, match="retries=.* is too large"):
        c.submit(abs, 1, retries=1 << 64)


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"n_workers": -1}, ValueError, "n_workers=-1 is too small"),
        ({"n_workers": "2"}, TypeError, "n_workers='2' is no whole number"),
        ({"threads_per_worker": -2, "processes": False}, ValueError, "threads_per_worker=-2"),
        ({"threads_per_worker": 0}, ValueError, "threads_per_worker=0 is too small"),
        ({"processes": "no"}, TypeError, "processes=.no. is neither True nor False"),
        ({"threads_per_worker": "two"}, TypeError, "threads_per_worker='two' is no whole"),
    ],
)
def test_a_number_of_workers_or_threads_that_cannot_be_is_refused_at_the_call(
    options, error, words
):
    with pytest.raises(error, match=words):
        Client(**options)
    with pytest.raises(error, match=words):
        minidist.LocalCluster(asynchronous=True, **options)
    for nthreads in (-1, 0):
        with pytest.raises(ValueError, match=f"nthreads={nthreads} is too small"):
            Worker("127.0.0.1:8786", nthreads=nthreads)


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        set,
        lambda items: dict(enumerate(items)),
        dict.fromkeys,
        lambda items: [[*items]],
        lambda items: types.SimpleNamespace(items=[*items]),
    ],
)
def test_the_size_of_a_container_is_about_that_of_what_it_holds(make):
    assert 100_000 < minidist.sizeof(make(b"%1000d" % i for i in range(100))) < 150_000


def test_a_container_that_holds_itself_has_a_size():
    loop = []
    loop += [loop] * 1_000
    assert minidist.sizeof(loop) > 8_000


@pytest.mark.parametrize("nbytes", [0, 1_000, -1, 1 << 63, 0.5, None])
def test_what_knows_its_size_is_believed_if_that_can_be(nbytes):
    size = minidist.sizeof(types.SimpleNamespace(nbytes=nbytes))
    assert (size == nbytes) == (nbytes in (0, 1_000))


@on_cluster
async def test_sizes_are_asked_for_by_a_key_a_future_or_a_list_of_them(c, a, b):
    data = await c.scatter({"abc": b"x" * 100})
    sizes = {"abc": minidist.sizeof(b"x" * 100)}
    for keys in ("abc", data["abc"], ["abc"], [data["abc"]], None):
        assert await c.nbytes(keys) == sizes


@on_cluster
async def test_sizes_are_added_up_by_the_first_part_of_a_key(c, a, b):
    one = minidist.sizeof(1)
    keys = ["add-1", "add-2", ("add", 3), ("a-b-c", 4), "lonely"]
    futures = await c.scatter(dict.fromkeys(keys, 1))
    assert await c.nbytes() == {"add": 3 * one, "a-b": one, "lonely": one}
    assert await c.nbytes(summary=False) == dict.fromkeys(futures, one)


def test_a_local_cluster_says_at_once_why_no_process_can_be_started(monkeypatch, caplog):
    monkeypatch.setattr(minidist.sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError, match="/nowhere/python"):
        Client(n_workers=3)
    gc.collect()
    assert not caplog.records, "and says it once"


def test_a_local_cluster_that_is_shut_down_while_it_starts_says_so(monkeypatch):
    async def main():
        cluster = minidist.LocalCluster(n_workers=1, asynchronous=True)
        starting = asyncio.ensure_future(cluster.__aenter__())
        while cluster.address == "not started":
            await asyncio.sleep(0)
        c = await Client(cluster.address, asynchronous=True)
        await c.shutdown()
        with pytest.raises(ConnectionError, match="was shut down before it had started"):
            await starting

    monkeypatch.setattr(minidist.sys, "executable", "/bin/false")  # So no worker is ever there.
    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks at what Linux lists there")
def test_a_worker_process_has_an_empty_standard_input_and_keeps_no_other_descriptor_of_it():
    def opened():
        paths = [(number, f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return {n for n, path in paths if n not in "12" and os.path.realpath(path) == os.devnull}

    with Client(n_workers=1, threads_per_worker=1) as c:
        assert [*c.run(opened).values()] == [{"0"}]


def test_without_a_client_there_is_nothing_to_wait_for(monkeypatch):
    monkeypatch.setattr(Client, "_instances", {})
    with pytest.raises(ValueError, match="there is no client: make one"):
        wait([])


def test_a_task_may_start_a_cluster_but_a_task_of_that_one_may_not(monkeypatch):
    with Client(n_workers=1, threads_per_worker=1) as c:
        assert [*c.run(lambda: minidist.DEPTH).values()] == [1], "one deeper than here"
    monkeypatch.setattr(minidist, "DEPTH", 1)
    minidist.LocalCluster(n_workers=0).close()
    monkeypatch.setattr(minidist, "DEPTH", 2)
    minidist.LocalCluster(processes=False).close()
    with pytest.raises(RuntimeError, match="a cluster in a task, in a task"):
        minidist.LocalCluster(n_workers=0)


def test_the_cluster_of_a_client_can_be_closed_as_any_other():
    with Client(n_workers=1, threads_per_worker=1) as c:
        assert "1 workers" in repr(c.cluster)
    c.cluster.close()
    with Client(n_workers=1, threads_per_worker=1) as c:
        c.cluster.close()
        with pytest.raises(ConnectionError, match="is gone"):
            while True:  # Until it has heard of that.
                c.submit(abs, -1)


def test_a_cluster_that_a_client_shuts_down_closes_as_if_it_was_closed():
    with minidist.LocalCluster(n_workers=1, processes=False) as cluster:
        scheduler, (worker,) = cluster.scheduler, cluster.workers
        Client(cluster).shutdown()
        for _ in range(1000):
            if worker.closed and not scheduler.tasks:
                break
            time.sleep(0.01)
        assert worker.closed and not (scheduler.tasks or scheduler.server.is_serving())


def test_a_client_knows_the_cluster_that_it_was_given_and_leaves_it_as_it_is():
    with minidist.LocalCluster(n_workers=1, processes=False) as cluster:
        for _ in range(2):
            with Client(cluster) as c:
                assert c.cluster is cluster
                assert c.submit(abs, -1).result() == 1
        with Client(cluster.address) as c:
            assert c.cluster is None


def test_a_client_that_was_closed_leaves_nothing_of_its_cluster():
    with Client(processes=False) as c:
        cluster = weakref.ref(c.cluster)
    del c
    for _ in range(100):
        gc.collect()
        if cluster() is None:
            break
        time.sleep(0.01)
    assert cluster() is None


def test_a_path_that_python_passes_over_is_passed_over(monkeypatch):
    monkeypatch.setattr(sys, "path", [ROOT, *sys.path])
    with Client(n_workers=1) as c:
        assert c.submit(abs, -1).result() == 1


def test_a_current_directory_that_is_gone_is_not_needed(monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with Client(n_workers=1) as c:
        assert c.submit(abs, -1).result() == 1


def test_who_has_no_home_is_told_so_and_gets_no_folder_with_that_name(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIDIST_TOKEN")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PermissionError, match="home directory.*set MINIDIST_TOKEN"):
        minidist.secret()
    assert not list(tmp_path.iterdir())


def test_a_recording_that_cannot_be_made_leaves_no_port_in_use(tmp_path):
    async def main():
        scheduler = minidist.Scheduler(record=str(tmp_path / "nowhere" / "file"))
        with pytest.raises(FileNotFoundError):
            await scheduler.__aenter__()
        assert not scheduler.server.is_serving()

    asyncio.run(main())
