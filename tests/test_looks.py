"""What users look at: progress bars, objects in a notebook, logs.

Bars are drawn on real pseudo-terminals by scripts of their own.
"""

import asyncio
import contextlib
import os
import pty
import queue
import re
import select
import signal
import subprocess
import sys
import types
import warnings

import pytest
from test_api import GATES, RUNS, gates, through  # noqa: F401

from minidist import (
    REFUSAL,
    Bars,
    Client,
    FutureState,
    LocalCluster,
    Scheduler,
    Worker,
    progress,
    wait,
)
from test_minidist import ROOT, SCRIPT, Process, environment, scheduler  # noqa: F401

# ---- progress ----

BARS = """
from minidist import Client, progress

def inc(x):
    return x + 1

def fail(x):
    raise ValueError(x)

with Client(n_workers=1) as client:
    futures = client.map(inc, range(4))
    progress(iter(futures), [client.map(fail, futures)])
    print([future.status for future in futures])
"""

INTERRUPTED = """
import os, time
from minidist import Client, progress

with Client(n_workers=1, threads_per_worker=1) as client:
    pids = client.run(os.getpid)
    try:
        progress(client.submit(time.sleep, 3600))
    except KeyboardInterrupt:
        print("interrupted:", client.run(os.getpid) == pids)
"""


@contextlib.contextmanager
def on_a_terminal(script):
    """Run a script on a terminal of its own, as a shell would: the other end of that terminal."""
    ours, theirs = pty.openpty()
    command, env = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, preexec_fn=lambda: os.login_tty(theirs)) as p:
        os.close(theirs)
        try:
            yield ours
        finally:
            p.kill()
            os.close(ours)


def read(terminal, until=None):
    """What is written to a terminal, until some words or its end."""
    said = b""
    with contextlib.suppress(OSError):  # This is how Linux says that nobody is there any more.
        while until is None or until not in said:
            assert select.select([terminal], [], [], 60)[0], f"silent after {said}"
            said += os.read(terminal, 10_000)
    return said


def test_a_terminal_gets_a_bar_for_each_function_and_all_are_full_when_progress_returns():
    with on_a_terminal(BARS) as terminal:
        *_, inc, fail, last, end = read(terminal).decode().split("\r\n")
    full = "#" * 30
    assert inc == f"\x1b[2A{'inc':20} [{full}] 4 of 4\x1b[K"  # Two lines up, and over them.
    assert fail == f"{'fail':20} [{full}] 4 of 4, 4 failed\x1b[K"
    assert (last, end) == ("['finished', 'finished', 'finished', 'finished']", "")


def test_where_standard_error_is_no_terminal_progress_waits_and_draws_nothing():
    with Process("-c", BARS) as p:
        out, err = p.communicate(timeout=60)
    assert (out, err) == ("['finished', 'finished', 'finished', 'finished']\n", "")


def test_bars_are_drawn_on_standard_error(monkeypatch, capfd):
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((80, 24)))
    Bars([FutureState("add-1", want=1)], multi=True).write()
    out, err = capfd.readouterr()
    assert out == "" and "0 of 1" in err


def test_ctrl_c_ends_the_drawing_and_leaves_the_cluster_alone():
    with on_a_terminal(INTERRUPTED) as terminal:
        assert b"0 of 1" in read(terminal, until=b"0 of 1")
        os.write(terminal, b"\x03")
        assert read(terminal).endswith(b"interrupted: True\r\n")


class FakeNotebook:
    """What progress needs of IPython: a kernel, and a display that can be updated."""

    def __init__(self):
        self.shown = queue.SimpleQueue()
        self.display = types.SimpleNamespace(display=self.show)

    def get_ipython(self):
        return types.SimpleNamespace(kernel="a kernel")

    def show(self, obj, display_id):
        assert display_id is True
        self.update(obj)
        return types.SimpleNamespace(update=self.update)

    def update(self, obj):
        self.shown.put(obj._repr_html_())

    def shows(self, words):
        """Wait until it shows some words."""
        while words not in self.shown.get(timeout=30):
            pass


@pytest.fixture
def notebook(monkeypatch):
    notebook = FakeNotebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    return notebook


@pytest.fixture
def c():
    """A client whose one worker is a thread of this process."""
    with Client(processes=False, threads_per_worker=1) as c:
        yield c
        for gate in GATES:
            gate.set()


def test_in_a_notebook_progress_returns_at_once_and_its_bars_go_on(c, notebook):
    futures = c.map(through, [0, 1], key="<b>")
    assert progress(futures) is None
    notebook.shows("<div><progress value=0 max=2></progress> &lt;b&gt;: 0 of 2</div>")
    GATES[0].set()
    notebook.shows("<div><progress value=1 max=2></progress> &lt;b&gt;: 1 of 2</div>")
    GATES[1].set()
    notebook.shows("<div><progress value=2 max=2></progress> &lt;b&gt;: 2 of 2</div>")


def test_bars_do_not_keep_their_tasks_wanted(c, notebook):
    running, waiting = c.submit(through, 0), c.submit(through, 1, "dropped")
    progress(running, waiting)
    waiting.release()
    notebook.shows("through: 1 of 2</div>")
    GATES[0].set()
    notebook.shows("through: 2 of 2</div>")
    assert c.submit(through, 0, "next").result(30) == "next"
    assert "dropped" not in RUNS


def test_in_a_notebook_progress_can_be_told_that_it_is_in_none(c, notebook):
    future = c.submit(abs, -1)
    progress(future, notebook=False)
    assert future.status == "finished" and notebook.shown.empty()


def test_progress_can_have_one_bar_for_all_and_leave_out_what_is_done(c, notebook):
    futures = [c.submit(abs, -1), c.submit(through, 0)]
    wait(futures, return_when="FIRST_COMPLETED", timeout=30)
    progress(futures, multi=False)
    notebook.shows("all: 1 of 2")
    progress(futures, complete=False)
    notebook.shows("through: 0 of 1")


def test_nothing_is_left_of_a_bar_that_could_not_be_drawn_when_its_tasks_are_done(c):
    def draw():
        raise BrokenPipeError

    future = c.submit(through, 0)
    bars = Bars([future._known()], multi=True)
    with pytest.raises(BrokenPipeError):
        c._run(bars.follow, c, draw)
    GATES[0].set()
    wait([future], timeout=30)
    assert not c._watchers and not bars.left


def test_the_eleventh_name_and_later_ones_share_a_row():
    states = [FutureState(f"name{number}-1", want=1) for number in [*range(13), 9, 12]]
    rows = Bars(states, multi=True).rows
    assert [*rows] == [f"name{number}" for number in range(10)] + ["others"]
    assert rows["name0"] == [0, 0, 1] and rows["name9"] == [0, 0, 2]
    assert rows["others"] == [0, 0, 4]


def test_of_nothing_there_is_no_progress(c):
    assert progress() is progress([]) is None


def test_futures_of_two_clients_have_no_common_progress(c):
    with Client(c.cluster) as other:
        with pytest.raises(ValueError, match="belongs to another client"):
            progress(c.submit(abs, -1), other.submit(abs, -2))
        progress(c.submit(abs, -1))  # One of a client that is not the current one has.


def test_an_asynchronous_client_awaits_its_progress():
    async def main():
        async with Client(processes=False, asynchronous=True) as c:
            futures = c.map(abs, [-1, -2])
            await progress(futures)
            return [future.status for future in futures]

    assert asyncio.run(main()) == ["finished", "finished"]


# ---- Objects in a notebook ----


def test_objects_show_the_same_facts_in_a_notebook_and_escape_what_users_named(c):
    future = c.submit(abs, -1, key="<i>")
    future.result(30)
    html = future._repr_html_()
    assert "<b>Future</b><br>finished<br>type: int<br>key: &lt;i&gt;</div>" in html
    facts = r"<b>{}</b><br>tcp://[\d.]+:\d+<br>1 workers, 1 threads, 0.0 MB in memory</div>"
    assert re.search(facts.format("Client"), c._repr_html_())
    assert re.search(facts.format("LocalCluster"), c.cluster._repr_html_())
    c.close()
    assert "<b>Client</b><br>this client is closed: make a new one</div>" in c._repr_html_()


def test_a_client_shows_the_workers_that_are_there_now_or_were_when_it_last_asked():
    async def main():
        async with (
            Scheduler() as scheduler,
            Client(scheduler.address, asynchronous=True) as asynchronous,
        ):
            synchronous = await asyncio.to_thread(Client, scheduler.address)
            async with Worker(scheduler.address, nthreads=2):
                assert "1 workers, 2 threads" in await asyncio.to_thread(repr, synchronous)
                assert "0 workers, 0 threads" in repr(asynchronous)
                await asynchronous.wait_for_workers(1)
                assert "1 workers, 2 threads" in repr(asynchronous)
            await asyncio.to_thread(synchronous.close)

    with warnings.catch_warnings(record=True) as said:
        asyncio.run(main())
    assert not said, "nothing that has to be awaited is left"


def test_what_has_not_started_says_so_and_then_where_it_is():
    async def main():
        cluster = LocalCluster(n_workers=1, processes=False, asynchronous=True)
        worker, text = Worker("127.0.0.1:1"), "<Worker: not started>"
        assert (repr(worker), repr(cluster.scheduler)) == (text, "<Scheduler: not started>")
        assert repr(cluster).startswith("<LocalCluster: not started, 0 workers")
        with pytest.raises(ValueError, match="'not started' is no address"):
            Client(cluster, asynchronous=True)
        async with cluster:
            assert repr(cluster.scheduler) == f"<Scheduler: {cluster.address}>"
            assert repr(cluster.workers) == f"[<Worker: {cluster.workers[0].address}>]"

    asyncio.run(main())


def test_objects_leave_all_colours_to_the_theme(c):
    for shown in (c, c.cluster, c.submit(abs, -1), Bars([FutureState("x", want=1)], multi=True)):
        assert not re.search("color|background|#[0-9a-f]{3}", shown._repr_html_())


# ---- What scheduler and worker log ----


def line_of(p):
    """The next line that a scheduler logs, without its time and what differs between two runs."""
    line = re.sub(r"^\d{4}-\d\d-\d\d [:,\d]+ ", "", p.stderr.readline().rstrip())
    line = re.sub(r"(tcp://)?127\.0\.0\.1:\d+(#\w+)?", "ADDRESS", line)
    return re.sub(r"(?<=alice-)\w+", "NUMBER", line)


def a_worker(address, name, **env):
    return Process(SCRIPT, "worker", address, "--nthreads", 1, "--name", name, **env)


def test_a_scheduler_logs_which_workers_come_and_go_and_why():
    with Process(SCRIPT, "scheduler", "--port", 0, "--worker-ttl", 1) as s:
        address = s.address
        with a_worker(address, "a") as a, a_worker(address, "b") as b:
            assert a.address and b.address
            joined = {line_of(s), line_of(s)}
            assert joined == {f"INFO Worker ADDRESS ({n}) joined, threads: 1" for n in "ab"}
            a.kill()
            assert re.fullmatch(
                r"INFO Worker ADDRESS \(a\) left: connection lost at [\d:]{8}", line_of(s)
            )
            b.send_signal(signal.SIGSTOP)
            assert line_of(s) == "INFO Worker ADDRESS (b) left: silent for more than 1 s"
        with a_worker(address, "c") as c:
            assert line_of(s) == "INFO Worker ADDRESS (c) joined, threads: 1"
            assert c.address
            c.send_signal(signal.SIGTERM)
            assert line_of(s) == "INFO Worker ADDRESS (c) left: it said good-bye"
        s.send_signal(signal.SIGTERM)
        assert s.communicate(timeout=30) == ("", "")


def test_a_scheduler_logs_one_line_for_each_worker_that_it_refuses(scheduler):
    name_in_use = "a worker named 'a' is there already: choose another name, or try again soon"
    name_in_use += " if it has died"
    with a_worker(scheduler.address, "a") as a:
        assert a.address
        assert line_of(scheduler) == "INFO Worker ADDRESS (a) joined, threads: 1"
        with a_worker(scheduler.address, "a") as second:
            _, err = second.communicate(timeout=30)
        assert err == f"minidist worker: {scheduler.address}: {name_in_use}\n"
        assert line_of(scheduler) == f"INFO Worker ADDRESS was refused: {name_in_use}"
        with a_worker(scheduler.address, "b", MINIDIST_TOKEN="another") as stranger:
            assert stranger.wait(30) == 1
        assert line_of(scheduler) == f"WARNING Refused ADDRESS: a worker with a {REFUSAL}"
        scheduler.send_signal(signal.SIGTERM)
        assert scheduler.communicate(timeout=30) == ("", "")


def test_a_scheduler_logs_clients_and_nothing_of_errors_in_their_tasks(scheduler):
    with a_worker(scheduler.address, "a") as a:
        assert a.address
        line_of(scheduler)
        with Client(scheduler.address, name="alice") as c:
            assert line_of(scheduler) == "INFO Client alice-NUMBER joined"
            futures = [c.submit(abs, "text"), c.submit(abs, -1)]
            wait(futures, timeout=30)
        assert line_of(scheduler) == "INFO Client alice-NUMBER left: closed; it wanted 2 results"
        with Client(scheduler.address, name="alice") as c:
            assert line_of(scheduler) == "INFO Client alice-NUMBER joined"
            c.loop.call_soon_threadsafe(c._scheduler.hang_up)
            lost = "INFO Client alice-NUMBER left: connection lost; it wanted 0 results"
            assert line_of(scheduler) == lost
        with Client(scheduler.address, name="alice") as c:
            assert line_of(scheduler) == "INFO Client alice-NUMBER joined"
            c.shutdown()
        assert line_of(scheduler) == "INFO The cluster is shut down by alice-NUMBER"
        assert a.communicate(timeout=30) == ("", "")
        assert scheduler.communicate(timeout=30)[0] == ""


def test_the_log_level_chooses_what_is_logged():
    with Process(SCRIPT, "scheduler", "--port", 0, "--log-level", "warning") as s:
        address = s.address
        with a_worker(address, "a") as a, a_worker(address, "b", MINIDIST_TOKEN="another") as b:
            assert a.address
            assert b.wait(30) == 1
        assert line_of(s) == f"WARNING Refused ADDRESS: a worker with a {REFUSAL}"
        s.send_signal(signal.SIGTERM)
        assert s.communicate(timeout=30) == ("", "")
