"""A cluster of processes that loses a worker at half time, and counts right all the same.

Starts a scheduler and two workers as a user would, by the command line, and runs identifiers.py.
"""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import identifiers

HERE = Path(__file__).resolve().parent
MINIDIST = HERE.parent / "minidist.py"
PROCESSES = []  # all that was started, to be ended


def start(*arguments, **options):
    # In this directory: a worker's current directory is importable, and ``count_file`` is sent by
    # the name of its module, as every function is that does not come from ``__main__``.
    # In a process group of its own: Ctrl-C in the terminal is for this program, which ends them.
    command = [sys.executable, str(MINIDIST), *arguments]
    PROCESSES.append(subprocess.Popen(command, cwd=HERE, process_group=0, **options))
    return PROCESSES[-1]


def start_and_show(*arguments):
    """Start a process; returns the line that it prints when it is ready.

    It is we who show that: should nobody read it (``make demo | head``), we end, not a worker.
    """
    process = start(*arguments, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    print(line, end="", flush=True)
    return line or sys.exit(f"the {arguments[0]} ended with exit code {process.wait()}")


def start_scheduler():
    """Returns the address that it prints.  Port 0 is any port that is free."""
    return re.search(r"tcp://\S+:\d+", start_and_show("scheduler", "--port", "0"))[0]


def start_worker(address, name):
    start_and_show("worker", address, "--nthreads", "1", "--name", name)
    return PROCESSES[-1]


def stop_all():
    """End the last started first: a worker that outlived its scheduler would complain."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Not half of them, by a second Ctrl-C.
    for process in reversed(PROCESSES):
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main():
    # As if they were Ctrl-C: what was started has to be ended, however this program is.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    begin = time.perf_counter()
    try:
        address = start_scheduler()
        alice = start_worker(address, "alice")
        start_worker(address, "bob")

        def replace_alice():
            seconds = time.perf_counter() - begin
            print(f"{seconds:.1f} s: half of the files are done. Killing alice; carol takes over.")
            # SIGKILL: alice can say no good-bye, and every count that only she held is lost.
            alice.kill()
            start_worker(address, "carol")

        return identifiers.run(address, replace_alice)
    except KeyboardInterrupt:
        return 130
    finally:
        stop_all()


if __name__ == "__main__":
    sys.exit(main())
