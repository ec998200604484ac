"""What a scheduler has recorded replays: to the same messages, in a mind without a network."""

import asyncio
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from test_faults import call_home, caller, port_of, workers

import minidist
from minidist import LIMITS, OPS, CancelledError, Client, Worker, replay
from test_minidist import SCRIPT, Process

LARGE = 1_000_000


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The file of a scheduler's process: of a steal, a cancel, a killed worker, and its own end."""
    path = tmp_path_factory.mktemp("recordings") / "eventful.jsonl"
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setenv("MINIDIST_TOKEN", "the secret of the tests")
        listener.settimeout(30)
        with Process(SCRIPT, "scheduler", "--port", 0, "--record", path) as scheduler:
            eventful_run(scheduler.address, listener)
            scheduler.terminate()
            scheduler.wait(30)
    return path


def eventful_run(address, listener):
    port = port_of(listener)
    with Client(address) as c, workers(address, "a") as (a,):
        large = c.submit(bytes, LARGE, key="large")
        large.result(30)
        stays = c.submit(call_home, port, large, key="stays")
        with caller(listener) as (_, pid):
            waits = c.submit(call_home, port, [large], key=("waits", 1))
            dropped = c.submit(len, large, key="dropped")
            dropped.cancel()
            with pytest.raises(CancelledError):
                dropped.result(30)
            with workers(address, "b"):
                with caller(listener):
                    assert pid == a.pid
                    os.kill(pid, signal.SIGKILL)
                    a.wait(30)
                with caller(listener):
                    pass
                assert waits.result(30) == [bytes(LARGE)]
                assert stays.result(30) == bytes(LARGE)


@pytest.fixture
def lines(recording):
    return recording.read_text().splitlines(keepends=True)


@pytest.fixture
def changed(tmp_path):
    """Write some lines as a recording: its path."""

    def write(lines):
        path = tmp_path / "changed.jsonl"
        path.write_text("".join(lines))
        return path

    return write


def line_of(lines, text):
    """The number of the first line that has this text."""
    return next(number for number, line in enumerate(lines, 1) if text in line)


def command(*arguments):
    run = [sys.executable, SCRIPT, "replay", *map(str, arguments)]
    return subprocess.run(run, capture_output=True, text=True, timeout=60)


def test_a_real_run_replays_to_exactly_the_recorded_messages(recording, lines):
    seen = [(json.loads(line), mind.validate()) for _, line, mind in replay(recording)]
    assert len(seen) == len(lines)
    assert {"submit", "cancel-keys", "worker-left", "client-left"} <= {op for (op, *_), _ in seen}


def test_the_replayed_mind_steals_and_recovers_as_the_recorded_one_did(recording):
    places = {"stays": [], ("waits", 1): []}  # {key: [(state, worker's name)]}
    for _, _, mind in replay(recording):
        for key in places.keys() & mind.tasks.keys():
            task = mind.tasks[key]
            worker = task.processing_on or (task.queue and task.queue.worker)
            place = (task.state, worker.name if worker else "")
            if [place] != places[key][-1:]:
                places[key].append(place)
    assert places["waits", 1][:2] == [("queued", "a"), ("processing", "b")], "b steals it"
    stays = [place for place in places["stays"] if place[0] != "queued"]
    assert stays[:3] == [("processing", "a"), ("processing", "b"), ("memory", "")], "a was killed"


def test_a_frame_is_recorded_as_its_length_and_digest(lines):
    submit = json.loads(lines[line_of(lines, '["submit"') - 1])
    fields = dict(zip(OPS["submit"][1], submit[1][1:], strict=True))
    for frame in fields["run_spec"]:
        length, digest = frame.split(" bytes, sha256 ")
        assert int(length) > 0 and len(bytes.fromhex(digest)) == 32


def test_digests_are_remembered_of_small_frames_and_of_so_many(monkeypatch):
    monkeypatch.setitem(LIMITS, "remembered", 10)
    monkeypatch.setattr(minidist, "DIGESTS", {})
    for frame in [b"%d" % number for number in range(30)] * 2:
        assert minidist.digest(frame).endswith(hashlib.sha256(frame).hexdigest())
        assert minidist.digest(frame) is minidist.digest(frame)
        assert len(minidist.DIGESTS) <= 11
    for large in (bytes(1_000), bytearray(1_000)):
        assert minidist.digest(large) is not minidist.digest(large)


def test_the_command_says_that_the_messages_are_the_same_and_every_invariant_holds(
    recording, lines
):
    done = command(recording)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        f"{len(lines)} lines: the messages are those that were recorded,"
        " and every invariant holds\n"
    )
    assert "invariant" not in command(recording, "--quick").stdout


def test_the_command_prints_what_happened_to_a_key(recording, lines):
    stays = command(recording, "--key", "stays").stdout
    assert f"line {line_of(lines, chr(34) + 'stays' + chr(34))}: [" in stays
    assert "state: None -> processing" in stays and "state: processing -> memory" in stays
    assert "suspect: None -> True" in stays and "'dropped'" not in stays
    waits = command(recording, "--key", '["waits", 1]').stdout
    assert "state: queued -> processing" in waits and "state: processing -> memory" in waits


def test_the_command_says_that_there_is_no_such_key(recording, lines):
    done = command(recording, "--key", "stay")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"there is no task 'stay' in {len(lines)} lines" in done.stderr


def test_the_command_prints_the_state_at_a_line(recording, lines):
    number = line_of(lines, '["worker-left"')
    done = command(recording, "--until", number)
    assert "TaskState {'key': 'stays'" in done.stdout and "'suspect': True" in done.stdout
    assert "'name': 'b'" in done.stdout and "'name': 'a'" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{number} lines: ")


def test_a_replay_says_at_which_line_it_says_something_else(changed, lines):
    number = line_of(lines, '"key-cancelled"')
    lines[number - 1] = lines[number - 1].replace('"key-cancelled"', '"key-lost"')
    done = command(changed(lines))
    assert done.returncode == 1 and done.stdout == ""
    (said,) = done.stderr.splitlines()
    assert f"changed.jsonl, line {number}: " in said and "['key-cancelled', " in said


def test_a_stimulus_that_is_missing_shows_at_the_first_line_that_depends_on_it(changed, lines):
    number = line_of(lines, '["submit"')
    del lines[number - 1]
    with pytest.raises(ValueError, match=r"changed.jsonl, line \d+: .*it is recorded that"):
        list(replay(changed(lines)))


def test_a_replay_says_after_which_line_an_invariant_does_not_hold(recording, lines, monkeypatch):
    number = line_of(lines, '["cancel-keys"')
    validate = minidist.SchedulerMind.validate

    def pedantic(mind):
        validate(mind)
        assert "dropped" not in [row[0] for row in mind.story if row[2] == "forgotten"]

    monkeypatch.setattr(minidist.SchedulerMind, "validate", pedantic)
    with pytest.raises(ValueError, match=f"line {number}: assert .dropped. not in"):
        list(replay(recording))
    assert [*replay(recording, validate=False)][-1][0] == len(lines)


def test_the_command_checks_invariants_unless_it_is_to_be_quick(recording, monkeypatch):
    def fail(mind):
        raise AssertionError("of this test")

    monkeypatch.setattr(minidist.SchedulerMind, "validate", fail)
    asyncio.run(minidist.run_replay(minidist.parse(["replay", str(recording), "--quick"])))
    with pytest.raises(ValueError, match="of this test"):
        asyncio.run(minidist.run_replay(minidist.parse(["replay", str(recording)])))


def test_a_recording_that_ends_within_a_line_replays_up_to_there(changed, lines):
    whole = "".join(lines)
    ((*_, (number, _, _)),) = [[*replay(changed(whole[: len(whole) * 2 // 3]))]]
    assert number == whole[: len(whole) * 2 // 3].count("\n")
    for nothing in ("", whole[:10]):
        with pytest.raises(ValueError, match="changed.jsonl is no recording"):
            list(replay(changed(nothing)))


def test_the_state_at_the_first_line_is_that_of_a_new_mind(recording):
    done = command(recording, "--until", 1)
    assert done.stdout.startswith("1 lines: ") and done.returncode == 0


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        '["submit",["c","more"],[]]',
        '["retry",["c","x","1"],[]]',
        '["task-erred",["w",1,7],[]]',
    ],
)
def test_what_is_no_recording_is_refused_in_one_clear_line(line, changed, lines):
    for place in (0, 4):
        bad = [*lines[:place], line + "\n", *lines[place:]]
        with pytest.raises(ValueError, match=f"^.*changed.jsonl, line {place + 1}: \\w+Error: .*$"):
            list(replay(changed(bad)))


def test_no_file_and_a_binary_one_are_one_clear_line_too(tmp_path):
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n\xff\n")
    for path in (tmp_path / "nowhere", tmp_path / "picture", tmp_path):
        done = command(path)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        shown = str(path).encode(errors="backslashreplace").decode()  # As standard error has it.
        assert done.stderr.startswith("minidist replay: ") and shown in done.stderr


def test_what_a_stimulus_raised_is_no_obstacle(changed, lines):
    """A peer may send what no mind can bear; it was dropped for it then, and the rest went on."""
    number = line_of(lines, '["submit"')
    lines.insert(number, '["query",["client",1,"nothing",[]],[]]\n')
    assert [*replay(changed(lines))][-1][0] == len(lines)


def test_a_scheduler_in_a_program_records_too(tmp_path, recordings):
    async def main():
        async with minidist.Scheduler(record=tmp_path / "file") as s, Worker(s.address, 1):
            async with Client(s.address, asynchronous=True) as c:
                assert await c.submit(abs, -1) == 1

    before = {*recordings.iterdir()}
    asyncio.run(asyncio.wait_for(main(), 30))
    ops = [op for op, *_ in (json.loads(line) for _, line, _ in replay(tmp_path / "file"))]
    assert "client-left" in ops
    assert {*recordings.iterdir()} == before, "a file of its own goes before MINIDIST_RECORD"


def test_a_scheduler_whose_port_is_in_use_leaves_the_recording_of_the_other(tmp_path):
    async def run():
        path = tmp_path / "run.jsonl"
        async with minidist.Scheduler(record=path) as scheduler:
            port = minidist.split_address(scheduler.address)[1]
            while not (before := path.read_text()):
                await asyncio.sleep(0)  # Its first stimulus is written in this turn or the next.
            with pytest.raises(OSError, match="in use"):
                await minidist.Scheduler(port=port, record=path).__aenter__()
            assert path.read_text().startswith(before)

    asyncio.run(run())


def test_a_scheduler_that_cannot_record_does_not_start(tmp_path):
    path = tmp_path / "no folder" / "file"
    run = [sys.executable, SCRIPT, "scheduler", "--port", "0", "--record", str(path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=60)
    (said,) = done.stderr.splitlines()
    assert done.returncode == 1 and "no folder" in said and not done.stdout


def test_a_scheduler_that_records_nothing_keeps_nothing_of_what_it_is_told(monkeypatch):
    async def main():
        async with minidist.Scheduler() as s, Worker(s.address, 1):
            async with Client(s.address, asynchronous=True) as c:
                assert await c.submit(abs, -1) == 1
            assert len(s.recorded) == 1

    monkeypatch.delenv("MINIDIST_RECORD")
    asyncio.run(main())


def test_when_a_scheduler_was_told_nothing_nothing_is_recorded(tmp_path):
    async def main():
        async with minidist.Scheduler(record=tmp_path / "file") as s:
            for _ in range(3):
                s.flush()

    asyncio.run(main())
    assert "" not in (tmp_path / "file").read_text().split("\n")[:-1]


def test_a_disk_that_is_full_ends_the_recording_and_nothing_else(caplog):
    async def main():
        async with minidist.Scheduler(record="/dev/full") as s, Worker(s.address, 1):
            async with Client(s.address, asynchronous=True) as c:
                assert await c.submit(abs, -1) == 1

    asyncio.run(asyncio.wait_for(main(), 30))
    (told,) = [r.getMessage() for r in caplog.records if "recorded" in r.getMessage()]
    assert "No space left" in told


def test_every_scheduler_of_the_tests_records(recordings):
    """``conftest.py`` replays what is in that folder."""
    before = {*recordings.iterdir()}
    with Process(SCRIPT, "scheduler", "--port", 0) as p:
        assert p.address
        p.terminate()
        p.wait(30)
        (mine,) = {*recordings.iterdir()} - before
        assert json.loads(mine.read_text().splitlines()[0])["ttl_us"] == 30_000_000
