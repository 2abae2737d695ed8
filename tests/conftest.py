"""Tests run offline, from any folder, on one thread each, and without drawing on a screen."""

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slow")]
os.chdir(ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the tests' models are so small that a second thread only costs
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would what it starts


def pytest_collection_modifyitems(items):
    """Mark what is in slow/. The longest first, which else one worker ends with while the others have nothing left."""
    for item in items:
        if item.path.parent.name == "slow":
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: item.path.name != "test_lesson.py")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The output folder and the printed text of a ten-step run of both losses."""
    from test_train import TINY

    import train  # after the thread is set

    out, printed = tmp_path_factory.mktemp("runs") / "new" / "runs", io.StringIO()
    with contextlib.redirect_stdout(printed):
        train.run(["--loss", "off_rl", "fpa", "--lam", "2", *TINY, "--out", str(out)])
    return out, printed.getvalue()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The folder of a random published checkpoint."""
    from test_full_scale import make_checkpoint

    folder = tmp_path_factory.mktemp("qwen2")
    make_checkpoint(folder)
    return folder
