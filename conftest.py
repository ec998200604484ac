"""What all tests share: signals as in a terminal; and whatever their schedulers record replays."""

import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import Phase, settings

import minidist

# For ``make mutants``, which asks whether something fails, and not for the shortest way there.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.generate])


def pytest_configure():
    """A shell has SIGINT ignored in the background, and what is started there inherits that.

    Tests that interrupt what they have started mean it.

    And a worker's process that finds its environment as it should be need not begin twice.
    """
    if not __debug__:
        raise pytest.UsageError("the tests are assertions, as is validate: run without -O")
    # And no test leaves a secret in the user's home, which may not be there, or not be writable.
    secret = {"MINIDIST_TOKEN": os.urandom(16).hex()}
    os.environ.update({**minidist.ENVIRONMENT, **secret, **os.environ})
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Mark as ``pure`` what drives the minds by hand or by chance, without any body.

    That is the textbook up to its chapter 5, as in the source, and three files of other tests.
    """
    for item in items:
        path, line, _ = item.reportinfo()
        text = Path(path).read_text()
        if path.name in ("test_minds.py", "test_transcripts.py", "test_placement.py") or (
            path.name == "test_minidist.py"
            and line < text[: text.index("\n# ---- 5. ")].count("\n")
        ):
            item.add_marker("pure")


@pytest.fixture(scope="module", autouse=True)
def recordings():
    """Every scheduler records, in this process and in others; then each recording is replayed.

    Only messages are compared: these minds were validated while they were live.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIDIST_RECORD", folder)
        yield Path(folder)
        # (One that was ended before it was told anything has written nothing.)
        for path in [path for path in Path(folder).iterdir() if path.stat().st_size]:
            for _ in minidist.replay(path, validate=False):
                pass
