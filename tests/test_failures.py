"""What goes wrong in a beginner's first hour, and what README says of it.

Each function below provokes one failure for real, and returns what a user gets to see of it.
README's table "When something goes wrong" has a row for it, whose first column is that text,
with "..." for what differs from one time to the next: so neither can go without the other.
(Some rows stand for several failures.)
"""

import asyncio
import contextlib
import functools
import gc
import logging.handlers
import os
import queue
import re
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import types
import unittest.mock
import warnings
from pathlib import Path

import pytest

import minidist
from minidist import Client, Scheduler
from test_minidist import ROOT, SCRIPT, Process, environment  # noqa: F401

FAILURES = []


def failure(provoke):
    """It is provoked once, in whichever test comes first."""
    FAILURES.append(functools.cache(provoke))
    return provoke


def raised(function, *args, **kwargs):
    """The last line of the traceback that a user sees."""
    with pytest.raises(BaseException) as caught:
        function(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


def local(**options):
    """A client with its cluster in this process: one worker with one thread."""
    return Client(**{"processes": False, "threads_per_worker": 1, **options})


@contextlib.contextmanager
def a_scheduler(*code):
    """A scheduler's process, which may run some code first: (itself, its address)."""
    code = "; ".join(["import sys, minidist", *code, "minidist.main(['scheduler', '--port', '0'])"])
    with Process("-c", code) as p:
        yield p, p.address


@contextlib.contextmanager
def log():
    """What is logged here meanwhile: a queue of texts."""
    handler = logging.handlers.QueueHandler(texts := queue.SimpleQueue())
    handler.prepare = logging.LogRecord.getMessage
    logging.getLogger("minidist").addHandler(handler)
    try:
        yield texts
    finally:
        logging.getLogger("minidist").removeHandler(handler)


def said_of(p):
    """What a process has to say that ends by itself."""
    return p.communicate(timeout=30)[1].rstrip()


# ---- Nobody there, or somebody else ----


@failure
def no_scheduler_is_at_the_address():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return raised(Client, f"127.0.0.1:{port}", timeout=0.1)


@failure
def the_address_has_no_port():
    return raised(Client, "127.0.0.1")


@failure
def another_program_is_at_the_port():
    def greet():
        with server.accept()[0] as line:
            line.sendall(b"220 mail.example.org ready".ljust(200))

    with socket.create_server(("127.0.0.1", 0)) as server:
        greeter = threading.Thread(target=greet)
        greeter.start()
        text = raised(Client, f"127.0.0.1:{server.getsockname()[1]}", timeout=0.1)
        greeter.join()
    return text


@failure
def an_http_server_is_at_the_port():
    server = Process("-u", "-m", "http.server", "0", "--bind", "127.0.0.1")
    # (It answers what has an end of line: of our random bytes, one may be that.)
    with server as p, unittest.mock.patch.object(os, "urandom", bytes):
        port = re.search(r"port (\d+)", p.stdout.readline())[1]
        return raised(Client, f"127.0.0.1:{port}", timeout=0.1)


@failure
def the_port_is_a_workers():
    with local() as c:
        return raised(Client, c.cluster.workers[0].address, timeout=0.1)


@failure
def a_synchronous_client_waits_in_the_loop_of_its_scheduler():
    async def main():
        async with Scheduler() as s:
            return raised(Client, s.address, timeout=0.1)

    return asyncio.run(main())


@failure
def the_secrets_differ():
    with a_scheduler("import os", "os.environ['MINIDIST_TOKEN'] = 'another'") as (_, address):
        return raised(Client, address)


def with_a_token_file(text, mode):
    """What a local cluster and a scheduler say if the secret is in such a file."""
    with (
        tempfile.TemporaryDirectory() as home,
        unittest.mock.patch.dict(os.environ, HOME=home, MINIDIST_TOKEN=""),
    ):
        path = Path(home, ".minidist", "token")
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(mode)
        with Process(SCRIPT, "scheduler", "--port", "0") as p:
            return raised(local), said_of(p)


@failure
def others_can_read_the_token_file():
    return with_a_token_file("secret", 0o644)[0]


@failure
def the_token_file_is_empty():
    return with_a_token_file("", 0o600)[0]


@failure
def others_can_read_the_token_file_of_a_scheduler():
    return with_a_token_file("secret", 0o640)[1]


@failure
def the_pythons_differ():
    with a_scheduler("sys.version_info = (3, 99)") as (_, address):
        return raised(Client, address)


@failure
def a_worker_waits_for_its_scheduler():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Process(SCRIPT, "worker", f"127.0.0.1:{port}") as p:
        return p.stderr.readline().rstrip().partition("WARNING ")[2]


@failure
def two_workers_have_one_name():
    with local() as c, Process(SCRIPT, "worker", c.cluster.address, "--name", "0") as p:
        return said_of(p)


@failure
def a_port_is_asked_for_that_is_in_use():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with Process(SCRIPT, "scheduler", "--port", port) as p:
            return said_of(p)


@failure
def a_local_cluster_gets_an_option_of_dasks():
    return raised(Client, memory_limit="1 GB")


@failure
def there_is_no_client():
    return raised(Client.current)


@failure
def a_task_looks_for_a_client():
    with Client(n_workers=1) as c:
        return raised(c.submit(lambda: minidist.default_client()).result, 30)


# ---- Calls that cannot be made ----


@failure
def a_call_is_submitted_that_was_made_already():
    with local() as c:
        return raised(c.submit, abs(-1))


@failure
def an_option_is_not_built():
    with local() as c:
        return raised(c.submit, abs, -1, resources={"GPU": 1})


@failure
def a_future_of_another_client_is_an_argument():
    with local() as c, Client(c.cluster) as other:
        return raised(c.submit, abs, other.submit(abs, -1))


@failure
def a_future_of_another_client_is_gathered():
    with local() as c, Client(c.cluster) as other:
        return raised(c.gather, [other.submit(abs, -1)])


@failure
def a_future_that_was_released_is_an_argument():
    with local() as c:
        future = c.submit(abs, -1)
        future.release()
        return raised(c.submit, abs, future)


@failure
def the_result_of_a_future_that_was_released_is_asked_for():
    with local() as c:
        future = c.submit(abs, -1)
        future.release()
        return raised(future.result)


@failure
def a_function_uses_what_cannot_be_pickled():
    lock = threading.Lock()
    with local() as c:
        return raised(c.submit, lambda: lock)


@failure
def an_argument_cannot_be_pickled():
    with local() as c:
        return raised(c.submit, print, threading.Lock())


@failure
def an_argument_is_a_connection():
    with local() as c, socket.socket() as connection:
        return raised(c.submit, print, connection)


@failure
def an_argument_is_a_connection_to_a_database():
    with local() as c, contextlib.closing(sqlite3.connect(":memory:")) as connection:
        return raised(c.submit, print, connection)


@failure
def an_argument_is_a_generator():
    with local() as c:
        return raised(c.submit, sum, (x for x in range(3)))


@failure
def an_argument_is_a_file_open_for_writing():
    with local() as c, open(os.devnull, "w") as file:
        return raised(c.submit, print, "spam", file=file)


@failure
def a_function_uses_the_client():
    with local() as c:
        return raised(c.submit, lambda: c.submit(abs, -1))


@failure
def a_future_is_scattered():
    with local() as c:
        return raised(c.scatter, [c.submit(abs, -1)])


@failure
def an_argument_is_large():
    with local() as c, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        c.submit(len, bytes(11_000_000))
    return f"{caught[0].category.__name__}: {caught[0].message}"


@failure
def a_result_cannot_be_pickled():
    with local() as c:
        return raised(c.submit(threading.Lock).result, 30)


@failure
def a_function_is_in_a_module_that_the_worker_does_not_have():
    module = types.ModuleType("only_here")
    exec("def function(): pass", vars(module))
    with unittest.mock.patch.dict(sys.modules, only_here=module), Client(n_workers=1) as c:
        return raised(c.submit(module.function).result, 30)


@failure
def a_task_imports_a_module_that_the_worker_does_not_have():
    def task():
        import no_such_module  # noqa: F401

    with local() as c:
        return raised(c.submit(task).result, 30)


@failure
def a_task_waits_for_a_future_of_the_script():
    with local() as c:
        future = c.submit(abs, -1)
        return raised(c.submit(lambda: future.result()).result, 30)


@failure
def a_task_waits_for_a_future_that_is_its_argument():
    with local() as c:
        return raised(c.submit(lambda future: future.result(), c.submit(abs, -1)).result, 30)


# ---- Waiting ----


@failure
def there_is_no_worker():
    with local(n_workers=0) as c, log() as texts:
        future = c.submit(abs, -1)
        return texts.get(timeout=30) if not future.done() else None


@failure
def workers_names_nobody():
    with local() as c, log() as texts:
        future = c.submit(abs, -1, workers="alice")
        return texts.get(timeout=30) if not future.done() else None


@failure
def a_key_stands_for_another_call():
    with local() as c, log() as texts:
        _first, _other = c.submit(abs, -1, key="x"), c.submit(abs, -2, key="x")
        return texts.get(timeout=30)


@failure
def a_key_stands_for_other_data():
    with local() as c, log() as texts:
        _first, _other = c.scatter({"x": 1}), c.scatter({"x": 2})
        return texts.get(timeout=30)


@failure
def data_is_scattered_and_there_is_no_worker():
    with local(n_workers=0) as c:
        return raised(c.scatter, [1, 2, 3], timeout=0.1)


@failure
def fewer_workers_are_there_than_are_waited_for():
    with local() as c:
        return raised(c.wait_for_workers, 2, timeout=0.1)


@failure
def a_result_takes_longer_than_its_timeout():
    with local() as c:
        return raised(c.submit(time.sleep, 0.5).result, timeout=0.1)


# ---- Event loops ----


@failure
def an_await_is_forgotten():
    async def main():
        async with local(asynchronous=True) as c:
            c.submit(abs, -1).result()
            gc.collect()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
    text, *_ = str(caught[0].message).splitlines()  # (In debug mode, where it was made follows.)
    return f"{caught[0].category.__name__}: {text}"


@failure
def a_future_of_a_synchronous_client_is_awaited():
    async def main():
        return await future

    with local() as c:
        future = c.submit(abs, -1)
        return raised(asyncio.run, main())


@failure
def an_asynchronous_client_is_not_awaited():
    async def main():
        return raised(local(asynchronous=True).submit, abs, -1)

    return asyncio.run(main())


@failure
def with_is_written_for_async_with():
    async def main():
        with local(asynchronous=True):
            pass

    return raised(asyncio.run, main())


# ---- What is gone ----


def client_whose_scheduler_is_killed():
    """A client that has noticed, with a future of before."""
    with a_scheduler() as (p, address):
        client = Client(address)
        future = client.submit(abs, -1)
        noticed = threading.Event()
        future.add_done_callback(lambda _: noticed.set())
        p.kill()
        assert noticed.wait(30)
    return client, future


@failure
def a_client_is_closed():
    with local() as c:
        pass
    return raised(c.submit, abs, -1)


@failure
def a_client_is_closed_while_a_future_is_pending():
    with local(n_workers=0) as c:
        future = c.submit(abs, -1)
    return raised(future.result)


@failure
def the_scheduler_is_killed():
    client, _ = client_whose_scheduler_is_killed()
    with client:
        return raised(client.submit, abs, -1)


@failure
def the_scheduler_is_killed_while_a_future_is_pending():
    client, future = client_whose_scheduler_is_killed()
    with client:
        return raised(future.result)


@failure
def a_workers_scheduler_is_killed():
    with a_scheduler() as (s, address), Process(SCRIPT, "worker", address) as p:
        assert p.address
        s.kill()
        return said_of(p)


@contextlib.contextmanager
def a_client_that_reaches_only_its_scheduler():
    with local() as c, unittest.mock.patch.object(minidist.Connection, "connect") as connect:
        connect.side_effect = TimeoutError
        yield c


@failure
def a_firewall_is_between_a_client_and_a_worker():
    with log() as texts, a_client_that_reaches_only_its_scheduler() as c:
        c.run(os.getpid, on_error="return")
        return texts.get(timeout=10)


@failure
def a_large_result_is_behind_a_firewall():
    with a_client_that_reaches_only_its_scheduler() as c:
        return raised(c.submit(bytes, 1_000_000).result)


@failure
def a_firewall_is_between_two_workers():
    with local(n_workers=2) as c, unittest.mock.patch.object(minidist.Connection, "connect") as no:
        no.side_effect = TimeoutError
        parts = [c.submit(bytes, n, workers=name) for n, name in enumerate("01")]
        return raised(c.submit(b"".join, parts).result)


@failure
def a_future_is_cancelled():
    with local(n_workers=0) as c:
        future = c.submit(abs, -1)
        future.cancel()
        return raised(future.result)


@failure
def a_task_ends_the_process_of_its_worker():
    with Client(n_workers=1) as c:
        return raised(c.submit(os._exit, 3).result, 30)


@failure
def the_only_worker_that_holds_scattered_data_is_killed():
    with Client(n_workers=1) as c:
        data = c.scatter(bytes(100_000))
        (pid,) = c.run(os.getpid).values()
        os.kill(pid, signal.SIGKILL)
        return raised(data.result, 30)


# ---- README's table ----


def rows():
    """{the first column of README's table: what it means, and what to do}"""
    readme = (ROOT / "README.md").read_text()
    table = readme.partition("\n## When something goes wrong\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^\| `(.*?)` \| (.*?) \| (.*?) \|$", table, re.M)
    return {text: others for text, *others in lines}


def says(row, text):
    """Whether it is this row that README has for a text."""
    parts = [re.escape(part) for part in row.split("...")]
    return re.fullmatch(".*?".join(parts), text, re.S) is not None


@pytest.mark.parametrize("provoke", FAILURES, ids=lambda provoke: provoke.__wrapped__.__name__)
def test_what_is_seen_when(provoke):
    text = provoke()
    found = [row for row in rows() if says(row, text)]
    assert len(found) == 1, f"README has {len(found)} rows for {text}"


def test_each_row_of_the_table_was_seen():
    seen = [provoke() for provoke in FAILURES]
    assert [row for row in rows() if not any(says(row, text) for text in seen)] == []


def test_each_row_says_what_it_means_and_what_to_do():
    for row, others in rows().items():
        assert all(len(other) > 10 for other in others), row
