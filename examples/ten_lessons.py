"""Ten short lessons on futures: each asserts what it shows; most have a plain loop beside them.

    python examples/ten_lessons.py

``Client()`` starts a cluster on this machine, for as long as the lessons take.  The calls sleep,
as a stand-in for work that takes a while.  With ``from dask.distributed import ...`` instead of
``from minidist import ...``, the same lessons run on dask.
"""

import os
import tempfile
import time
import traceback
from pathlib import Path

from minidist import Client, as_completed, fire_and_forget, wait


class Timer:
    """A ``with`` block that knows, when it is over, how many ``seconds`` it took."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *exception):
        self.seconds = time.perf_counter() - self.start


def until(condition, timeout=5):
    """Come back when ``condition()`` holds, where there is no future to wait for."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s"
        time.sleep(0.01)


# ---- The calls: plain functions that know nothing of a cluster ----


def slow_pow(x, y, seconds=0.1):
    time.sleep(seconds)
    return x**y


def slow_is_even(n):
    time.sleep(0.1)
    return n % 2 == 0


def slow_count(word, text):
    time.sleep(0.1)
    return text.count(word)


def read_number(path):
    return int(path.read_text())


def write_square(directory, n):
    time.sleep(0.1)
    # Under another name until it is complete, so that nobody finds half a file.  A task may run
    # twice, on two workers, when one seems lost: hence the process id.
    unfinished = directory / f"{n}.{os.getpid()}"
    unfinished.write_text(str(n**2))
    os.replace(unfinished, directory / f"{n}.txt")


# ---- The lessons: each returns the Timer of the cluster, and that of the plain loop or None ----


def lesson_submit(client):
    """submit: a call runs in another process, a Future stands for its result"""
    with Timer() as cluster:
        future = client.submit(slow_pow, 10, 2)  # At once: only result() waits.
        result = future.result()
    with Timer() as loop:
        expected = slow_pow(10, 2)
    assert result == expected == 100
    return cluster, loop


def lesson_submit_in_a_loop(client):
    """submit in a loop: calls run side by side, futures are arguments of the next"""
    with Timer() as cluster:
        squares = []
        for n in range(6):
            squares.append(client.submit(slow_pow, n, 2))
        total = client.submit(sum, squares).result()
    with Timer() as loop:
        expected = sum([slow_pow(n, 2) for n in range(6)])
    assert total == expected == 55
    return cluster, loop


def lesson_submit_with_if_and_else(client):
    """submit with if and else: a result decides what is called next"""
    with Timer() as cluster:
        evens = [client.submit(slow_is_even, n) for n in range(6)]
        powers = []
        for n, even in enumerate(evens):
            if even.result():  # Waits for this one; the others run meanwhile.
                powers.append(client.submit(slow_pow, n, 2))
            else:
                powers.append(client.submit(slow_pow, n, 3))
        results = [power.result() for power in powers]
    with Timer() as loop:
        expected = [slow_pow(n, 2) if slow_is_even(n) else slow_pow(n, 3) for n in range(6)]
    assert results == expected == [0, 1, 4, 27, 16, 125]
    return cluster, loop


def lesson_map(client):
    """map: one function, a future for each item, in the order of the items"""
    with Timer() as cluster:
        cubes = client.map(slow_pow, range(6), [3] * 6)
        results = [cube.result() for cube in cubes]
    with Timer() as loop:
        expected = list(map(slow_pow, range(6), [3] * 6))
    assert results == expected == [0, 1, 8, 27, 64, 125]
    return cluster, loop


def lesson_gather(client):
    """gather: many results at once, in the same containers as their futures"""
    with Timer() as cluster:
        powers = {y: client.map(slow_pow, [2, 3, 4], [y] * 3) for y in (5, 6)}
        results = client.gather(powers)
    with Timer() as loop:
        expected = {y: [slow_pow(x, y) for x in (2, 3, 4)] for y in (5, 6)}
    assert results == expected == {5: [32, 243, 1024], 6: [64, 729, 4096]}
    return cluster, loop


def lesson_scatter(client):
    """scatter: data is sent once, its Future is an argument of many calls"""
    text = "spam spam eggs spam sausage " * 50_000
    words = ["spam", "eggs", "sausage", "bacon"]
    with Timer() as cluster:
        sent = client.scatter(text, broadcast=True)  # To every worker, so that none has to fetch.
        counts = client.gather(client.map(slow_count, words, text=sent))
    with Timer() as loop:
        expected = [slow_count(word, text) for word in words]
    assert counts == expected == [150_000, 50_000, 50_000, 0]
    return cluster, loop


def lesson_life_of_a_future(client):
    """status, cancel, error, traceback, retry, release: the life of a future"""
    with tempfile.TemporaryDirectory() as directory, Timer() as cluster:
        base = client.submit(slow_pow, 7, 2, seconds=0.5)
        power = client.submit(slow_pow, base, 2)
        assert power.status == "pending"
        power.cancel()
        assert power.status == "cancelled" and power.cancelled()
        # Nobody cancelled what it was waiting for.
        assert base.result() == 49
        assert base.status == "finished"

        path = Path(directory, "number")
        number = client.submit(read_number, path)
        assert isinstance(number.exception(), FileNotFoundError)  # result() would raise it.
        assert number.status == "error"
        frames = traceback.extract_tb(number.traceback())
        assert "read_number" in [frame.name for frame in frames]

        path.write_text("42")  # The cause is gone, so the same call works now.
        number.retry()
        assert number.result() == 42
        assert number.status == "finished"

        # A result is kept for as long as somebody has a future of it.
        assert number.key in client.who_has()
        number.release()  # This is what happens to a future that is dropped, too.
        until(lambda: number.key not in client.who_has())
    return cluster, None


def lesson_as_completed(client):
    """as_completed: futures come as they get done, and more can be added"""
    with Timer() as cluster:
        # Square each number until it is above 1000: 50 and 60 are submitted last, and there first.
        arriving = as_completed(client.map(slow_pow, [2, 3, 50, 60], [2] * 4))
        results = []
        for future in arriving:
            if future.result() > 1000:
                results.append(future.result())
            else:
                arriving.add(client.submit(slow_pow, future, 2))
    with Timer() as loop:
        expected = []
        for n in (2, 3, 50, 60):
            while n <= 1000:
                n = slow_pow(n, 2)
            expected.append(n)
    assert expected == [65536, 6561, 2500, 3600]
    assert sorted(results) == sorted(expected)
    assert set(results[:2]) == {2500, 3600}
    return cluster, loop


def lesson_wait(client):
    """wait: until one future is done, or until all of them are"""
    with Timer() as cluster:
        quick = client.map(slow_pow, [2, 3, 4], [10] * 3)
        slow = client.submit(slow_pow, 5, 10, seconds=0.5)
        first = wait([*quick, slow], return_when="FIRST_COMPLETED")
        last = wait([*quick, slow])
    with Timer() as loop:
        expected = [slow_pow(2, 10), slow_pow(3, 10), slow_pow(4, 10), slow_pow(5, 10, seconds=0.5)]
    assert first.done and first.done <= set(quick) and slow in first.not_done
    assert last.done == {*quick, slow} and not last.not_done
    assert client.gather([*quick, slow]) == expected == [1024, 59049, 1048576, 9765625]
    return cluster, loop


def lesson_fire_and_forget(client):
    """fire_and_forget: a call that writes a file runs, although its future is dropped"""
    names = [f"{n}.txt" for n in range(6)]
    with tempfile.TemporaryDirectory() as theirs, tempfile.TemporaryDirectory() as ours:
        theirs, ours = Path(theirs), Path(ours)
        with Timer() as cluster:
            for n in range(6):
                fire_and_forget(client.submit(write_square, theirs, n))
            until(lambda: all((theirs / name).exists() for name in names))
        with Timer() as loop:
            for n in range(6):
                write_square(ours, n)
        squares = [(theirs / name).read_text() for name in names]
        expected = [(ours / name).read_text() for name in names]
    assert squares == expected == ["0", "1", "4", "9", "16", "25"]
    return cluster, loop


LESSONS = [
    lesson_submit,
    lesson_submit_in_a_loop,
    lesson_submit_with_if_and_else,
    lesson_map,
    lesson_gather,
    lesson_scatter,
    lesson_life_of_a_future,
    lesson_as_completed,
    lesson_wait,
    lesson_fire_and_forget,
]


def main():
    with Client() as client:
        threads = client.nthreads().values()
        print(f"Ten lessons, on {len(threads)} workers with {sum(threads)} threads in all\n")
        print("     cluster  plain loop")
        for number, lesson in enumerate(LESSONS, start=1):
            cluster, loop = lesson(client)  # An AssertionError ends the program: exit code 1.
            beside = f"{loop.seconds:8.2f} s" if loop else " " * 9 + "-"
            print(f"{number:2}. {cluster.seconds:6.2f} s{beside}   {lesson.__doc__}", flush=True)


# The guard is for dask, whose workers import the program that starts them.
if __name__ == "__main__":
    main()
