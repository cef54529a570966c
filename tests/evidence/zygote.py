"""Forks a process per life of a box, so that starting one takes milliseconds instead of seconds.

Each line on standard input is a `Life` as JSON; the answer is a line with its exit status, that
of a process which a signal ended being negative. The forks run `lives.py`.
"""

import os
import signal
import sys
import time
import traceback

import msgspec

from tests.evidence.lives import Life, live


def main() -> None:
    for line in sys.stdin:
        life = msgspec.json.decode(line, type=Life)
        pid = os.fork()
        if pid == 0:
            _live(life)
        if life.kill_after_seconds:
            time.sleep(life.kill_after_seconds)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _live(life: Life) -> None:
    status = 1
    try:
        live(life)
        status = 0
    except BaseException:  # noqa: BLE001 - of a child, whose parent reads the status
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
