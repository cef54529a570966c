import subprocess
import sys
from pathlib import Path

import pytest

from app.core.lock import DataDirInUse, hold_data_dir

HOLD = """
import sys; from pathlib import Path; from app.core.lock import hold_data_dir
with hold_data_dir(Path(sys.argv[1])):
    print("held", flush=True); sys.stdin.read()
"""


def test_one_process_per_data_directory(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, data_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    in_use = pytest.raises(DataDirInUse, match=rf"process {other.pid}\).*--data-dir")
    with in_use, hold_data_dir(data_dir):
        pytest.fail("two processes hold one directory")
    other.kill()  # however it ends, its hold ends with it
    other.communicate()
    with hold_data_dir(data_dir):
        pass
    with hold_data_dir(data_dir):
        pass
