"""The tutorial is a notebook as well, and minidist is at home in a kernel.

What a kernel does is tried in a real one: cells that are run again, interrupted, or changed, and
a restart.  All of it is marked ``notebook``, and needs the extra of that name.
"""

import os
import pathlib

import book
import pytest
from test_faults import ends_soon, pids_with

import minidist

pytestmark = pytest.mark.notebook

ROOT = pathlib.Path(minidist.__file__).parent
MARKDOWN = (ROOT / "tutorial.md").read_text()
TUTORIAL = book.Document(MARKDOWN)


def notebook():
    """The tutorial as a notebook, as it is after it was saved as a file of JSON and read again."""
    import jupytext
    import nbformat

    return nbformat.reads(nbformat.writes(jupytext.reads(MARKDOWN, "md")), as_version=4)


class Kernel:
    """A Python kernel, as JupyterLab would start it; all its processes know a secret of their own."""

    def __init__(self, folder):
        from jupyter_client.manager import KernelManager

        self.token = f"the secret of {folder}"
        places = {name: str(folder) for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR")}
        paths = {"PYTHONPATH": str(ROOT), "MINIDIST_TOKEN": self.token}
        self.manager = KernelManager(kernel_name="python3", connection_file=f"{folder}/kernel.json")
        self.manager.start_kernel(env={**os.environ, **places, **paths}, cwd=folder)
        self.connect()

    def connect(self):
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def restart(self):
        self.client.stop_channels()
        self.manager.restart_kernel()
        self.connect()

    def close(self):
        self.client.stop_channels()
        self.manager.shutdown_kernel()

    def start(self, source):
        """Send a cell, and go on when it has printed something."""
        cell = self.client.execute(source, allow_stdin=False, stop_on_error=False)
        while self.client.get_iopub_msg(timeout=60)["msg_type"] != "stream":
            pass
        return cell

    def finish(self, cell):
        """What a cell gives, in the way of ``Runner.execute``: (what is printed, error or None)."""
        printed, error = "", None
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            content = message["content"]
            if message["parent_header"].get("msg_id") != cell:
                continue
            if message["msg_type"] == "stream" and content["name"] == "stdout":
                printed += content["text"]
            elif message["msg_type"] == "execute_result":
                printed += content["data"]["text/plain"] + "\n"
            elif message["msg_type"] == "error":
                error = f"{content['ename']}: {content['evalue']}"
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, error

    def run(self, source):
        return self.finish(self.client.execute(source, allow_stdin=False, stop_on_error=False))

    def value(self, source):
        """The repr of an expression's value, of a cell that does nothing wrong."""
        printed, error = self.run(source)
        assert error is None, error
        return printed.strip()

    def run_all(self, cells):
        """Run the cells of a notebook in order; list what is not as the tutorial shows it."""
        problems = []
        for source, cell in zip(cells, TUTORIAL.cells, strict=True):
            printed, error = self.run(source)
            if ("raises-exception" in cell.tags) != (error is not None):
                problems.append(TUTORIAL.problem(cell.line, error))
            if "check" in cell.tags:
                continue  # The reader has not done the exercise yet.
            shown = cell.shown.text if cell.shown else ""
            found = book.difference(shown, printed + (f"{error}\n" if error else ""))
            if found:
                problems.append(TUTORIAL.problem(cell.line, found[1]))
        return problems


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()
    assert all(ends_soon(pid) for pid in pids_with(kernel.token))


def test_the_markdown_becomes_a_notebook_and_comes_back_unchanged():
    import jupytext

    assert jupytext.writes(notebook(), "md") == MARKDOWN


def test_the_cells_of_the_notebook_are_those_of_the_page_and_solutions_stay_folded():
    cells = notebook().cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == [cell.text.strip() for cell in TUTORIAL.cells]
    assert [cell.metadata.get("tags", []) for cell in code] == [c.tags for c in TUTORIAL.cells]
    folded = [cell.source for cell in cells if cell.source.startswith("<details>")]
    assert len(folded) == len([cell for cell in TUTORIAL.cells if "check" in cell.tags])
    assert all(source.endswith("</details>") for source in folded)


def test_the_notebook_runs_and_again_and_after_a_restart_of_the_kernel(kernel):
    cells = [cell.source for cell in notebook().cells if cell.cell_type == "code"]
    assert kernel.run_all(cells) == []
    assert kernel.run_all(cells) == []
    kernel.run("from minidist import Client; forgotten = Client(n_workers=2)")
    workers = eval(kernel.value("list(forgotten.run(os.getpid).values())"))
    assert len(workers) == 2
    kernel.restart()
    assert all(ends_soon(pid) for pid in workers)
    assert kernel.run_all(cells) == []


CLUSTER = """
import os, pathlib, time
from minidist import Client, wait

client = Client(n_workers=2, threads_per_worker=1)
gate = pathlib.Path("gate").absolute()

def when_there(path):
    while not path.exists():
        time.sleep(0.01)
    return path.name
"""


def test_an_interrupt_ends_the_waiting_of_a_cell_and_nothing_else(kernel, tmp_path):
    assert kernel.run(CLUSTER) == ("", None)
    workers = kernel.value("client.run(os.getpid)")
    kernel.run("future = client.submit(when_there, gate)")
    for waiting in ("future.result()", "client.gather([future])", "wait([future])"):
        # (Not flushed: an interrupt while the kernel flushes would be lost there.)
        cell = kernel.start(f"print('waiting'); {waiting}")
        kernel.manager.interrupt_kernel()
        _, error = kernel.finish(cell)
        assert error.startswith("KeyboardInterrupt")
    assert kernel.value("future.status") == "'pending'"
    (tmp_path / "gate").touch()
    assert kernel.value("future.result()") == "'gate'"
    assert kernel.value("client.run(os.getpid)") == workers
    kernel.run("client.close()")


def test_a_function_that_was_changed_between_two_submits_runs_as_it_is_then(kernel):
    kernel.run(CLUSTER)
    assert kernel.run("def version(): return helper()\ndef helper(): return 'old'") == ("", None)
    kernel.run("before = client.submit(version)")
    assert kernel.run("def helper(): return 'new'") == ("", None)  # What it calls counts, too.
    assert kernel.value("before.result(), client.submit(version).result()") == "('old', 'new')"
    kernel.run("def version(): return 'newest'")
    assert kernel.value("client.submit(version).result()") == "'newest'"


def test_a_cell_that_is_run_again_asks_for_the_same_task(kernel):
    kernel.run(CLUSTER)
    keys = {kernel.value("future = client.submit(when_there, gate); future.key") for _ in range(3)}
    assert len(keys) == 1


def test_a_kernel_that_is_shut_down_takes_its_workers_with_it(tmp_path):
    kernel = Kernel(tmp_path)
    kernel.run(CLUSTER)
    workers = eval(kernel.value("list(client.run(os.getpid).values())"))
    kernel.close()
    assert len(workers) == 2 and all(ends_soon(pid) for pid in workers)
