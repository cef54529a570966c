"""Runs what a guide tells its readers to do: `python -m tests.app.run_blocks GUIDE.md`.

The blocks marked `sh run` and `python run`, in their order and in this directory. Variables of the
shell reach the blocks after them, and the Python blocks share their names, as in one session.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```(sh|python) run\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A refusal of the box fails the block, as it would a person.
SHELL = 'curl() { command curl -sS --fail-with-body "$@"; }\nset -euo pipefail -a\n'


def blocks(text: str) -> list[tuple[str, int, str]]:
    """Language, number of the first line, and content of each block."""
    return [
        (found[1], text.count("\n", 0, found.start(2)) + 1, found[2])
        for found in BLOCK.finditer(text)
    ]


def run_shell(code: str) -> None:
    """Ends this program if a command fails; keeps the shell's variables."""
    kept = Path(".environment")
    script = f"{SHELL}{code}\nenv -0 > {kept}\n"
    done = subprocess.run(["bash", "-c", script], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    for line in kept.read_text().split("\0"):
        name, is_variable, value = line.partition("=")
        if is_variable:
            os.environ[name] = value


def main(path: Path) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for language, line, code in blocks(path.read_text()):
        sys.stdout.write(f"--- {path.name}, line {line}\n")
        sys.stdout.flush()
        if language == "sh":
            run_shell(code)
        else:
            # With its lines counted as in the guide, for tracebacks.
            exec(compile("\n" * (line - 1) + code, path, "exec"), names)  # noqa: S102
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
