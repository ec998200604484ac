"""What README shows is true: scripts and shell lines run, links and files are looked up.

Each script runs as it stands, and each shell line word for word, but for the secret, and for where
the scheduler is: the address that it has printed stands in the place of README's.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import book
import pytest

import minidist
from minidist import Client

ROOT = Path(minidist.__file__).parent
SOURCE = (ROOT / "minidist.py").read_text()
README = book.Document((ROOT / "README.md").read_text(), "README.md")
SCRIPTS = [fence for fence in README.fences if fence.language == "python"]
BY_HAND, RECORDING = [f.text.splitlines() for f in README.fences if f.language == "sh"]
ADDRESS, KEY = "10.0.0.5:8786", "slow_pow-1f2e3d"
SECRET = "the secret of the readme"


@pytest.fixture(autouse=True)
def user(tmp_path, monkeypatch):
    """Somebody with a home, the secret, and a command that is what README says it is."""
    (script,) = re.findall(r"`python (\S+) scheduler` is the same", README.prose)
    command = tmp_path / "bin" / "minidist"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{ROOT / script}" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINIDIST_TOKEN", SECRET)
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def process(*command):
    """A process with piped output, which is told to end at the end, and leaves no other behind.

    Another one would hold the pipes, too, and keep us waiting; or it would be in its group.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True) as p:
        try:
            yield p
            p.terminate()
            p.communicate(timeout=60)
            with pytest.raises(ProcessLookupError):
                os.killpg(p.pid, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)


def in_a_shell(line, before=""):
    """A line, which may end with a comment; ``before`` it another one was run."""
    return process("sh", "-c", f"{before}\nexec {line}")


def output_of(*command):
    """What a process prints that succeeds in silence."""
    with process(*command) as p:
        printed, said = p.communicate(timeout=60)
    assert (said, p.returncode) == ("", 0)
    return printed


def first_line(p):
    """What a process prints when it is ready; why it ends, if it ends before."""
    return p.stdout.readline() or p.stderr.read()


@contextlib.contextmanager
def a_scheduler(line, before=""):
    """The address of a scheduler at a port that is free, and only on this machine."""
    line = line.replace("0.0.0.0", "127.0.0.1").replace("scheduler", "scheduler --port 0", 1)
    with in_a_shell(line, before) as p:
        printed = first_line(p)
        assert printed.startswith("Scheduler at tcp://127.0.0.1:")
        yield printed.rpartition("/")[2].strip()


@contextlib.contextmanager
def a_cluster_by_hand():
    """The cluster of the first shell lines: (its address, what each worker has printed)."""
    export, scheduler, *workers = BY_HAND
    # The line shall bring the secret: without it there is none but that in the user's home.
    export = "unset MINIDIST_TOKEN; " + export.replace("...", f"'{SECRET}'", 1)
    with contextlib.ExitStack() as stack:
        address, printed = stack.enter_context(a_scheduler(scheduler, export)), []
        for line in workers:
            p = stack.enter_context(in_a_shell(line.replace(ADDRESS, address), export))
            number = int(re.search(r"--nworkers (\d+)|$", line)[1] or 1)
            printed += [first_line(p) for _ in range(number)]
        assert all(text.startswith("Worker ") for text in printed), printed
        yield address, printed


# ---- What is run ----


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: f"line-{script.line}")
def test_a_script_runs_as_it_stands(script):
    with contextlib.ExitStack() as stack:
        text = script.text
        if ADDRESS in text:
            address, _ = stack.enter_context(a_cluster_by_hand())
            text = text.replace(ADDRESS, address)
        Path("script.py").write_text(text)
        assert output_of(sys.executable, "script.py") == ""


def test_there_is_a_script_for_a_local_cluster_one_for_one_by_hand_and_one_for_an_event_loop():
    kinds = [re.findall(r"Client\(\)|[\d.]+:\d+|Scheduler\(\)", s.text) for s in SCRIPTS]
    assert kinds == [["Client()"], [ADDRESS], ["Scheduler()"]]


def test_the_workers_by_hand_have_the_names_that_are_written():
    with a_cluster_by_hand() as (address, printed), Client(address) as c:
        workers = c.scheduler_info()["workers"].values()
        threads = {worker["name"]: worker["nthreads"] for worker in workers}
    assert threads == {"alice": 2, "bob-0": 1, "bob-1": 1, "bob-2": 1, "bob-3": 1}
    assert sorted(text.split()[1] for text in printed) == sorted(threads)
    assert BY_HAND[-1].endswith("# bob-0 to bob-3")


def test_a_worker_by_hand_joins_a_local_cluster_of_the_same_user(monkeypatch):
    monkeypatch.delenv("MINIDIST_TOKEN")  # So the secret is that in the user's home.
    shown = re.search(r"`(minidist worker ADDRESS)`,\s+with\s+`(.*?)`", README.prose)
    line, address = shown.groups()
    with Client(n_workers=1) as client:
        line = line.replace("ADDRESS", eval(address))
        with in_a_shell(f"{line} --name alice") as p:
            assert first_line(p).startswith("Worker alice at ")
            assert client.submit(pow, 10, 2, workers="alice").result(30) == 100


def test_what_has_happened_is_recorded_and_replayed_by_the_lines_that_are_shown():
    scheduler, *replays = RECORDING
    with a_scheduler(scheduler) as address, Client(address) as c:
        future = c.submit(pow, 10, 2, key=KEY)
        for _ in range(600):
            c.cancel(c.submit(abs, -1))  # Each is two lines more.
        assert list(c.who_has()) == [future.key]
    whole, of_a_key, until = [output_of("sh", "-c", line) for line in replays]
    (lines,) = re.findall(r"^(\d+) lines: .* every invariant holds\n$", whole)
    assert int(lines) > 1200
    assert f"    key: None -> {KEY}\n" in of_a_key and of_a_key.endswith(whole)
    assert f"TaskState {{'key': '{KEY}'" in until and "\n1200 lines: " in until
    (loop,) = re.findall(r"`(for number, line, mind in .*?)`", README.prose)
    exec(f"{loop}: pass", {"minidist": minidist}, seen := {})
    assert seen["number"] == int(lines)


# ---- What is looked up ----


def test_every_link_leads_somewhere():
    assert list(book.problems_of_links(README, ROOT)) == []


def test_the_commands_that_list_lines_of_the_source_do_so(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = re.findall(r"`(grep .*?)`", README.prose)
    journey, differences = [output_of("sh", "-c", command) for command in commands]
    steps = re.findall(r"^    (\d+)\. ", minidist.__doc__, re.M)
    assert re.findall(r'^"""\[(\d+)\] ', journey, re.M) == steps
    assert len(differences.splitlines()) == SOURCE.count("dask: ") > 10


def test_every_target_of_make_that_is_named_exists():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"(?:`|^    )make (\w+)", README.prose, re.M)
    assert len(named) > 5 and set(named) <= set(targets)


def test_every_chapter_of_the_source_has_a_row():
    chapters = re.findall(r"^# ---- (\d+\. .*?)(?::.*)? ----$", SOURCE, re.M)
    assert re.findall(r"^\| (\d+\. .*?) \|", README.prose, re.M) == ["0. The map", *chapters]


def test_every_file_of_the_table_exists_and_every_python_file_is_in_it():
    rows = re.search(r"^\| file \| \|\n(?:\|.*\n)+", README.prose, re.M)[0]
    folders = [".", "tests", "examples", "benchmarks"]
    named = set()
    for file in re.findall(r"`([\w/]+(?:/|\.py|\.md))`", rows):
        found = [ROOT / folder / file for folder in folders if (ROOT / folder / file).exists()]
        assert found, f"there is no {file}"
        named.update(found)
    there = {path for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert there - named == {ROOT / "minidist.py"}
