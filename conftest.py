"""What all tests share: whatever their schedulers have recorded must replay."""

import tempfile
from pathlib import Path

import pytest

import minidist


@pytest.fixture(scope="module", autouse=True)
def recordings():
    """Every scheduler records, in this process and in others; then each recording is replayed.

    Only messages are compared: these minds were validated while they were live.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIDIST_RECORD", folder)
        yield Path(folder)
        for path in Path(folder).iterdir():
            for _ in minidist.replay(path, validate=False):
                pass
