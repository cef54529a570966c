"""Changes one thing at a time in the modules of money; some test must notice each change.

    python -m tests.evidence.mutation                     # all of them; survivors are listed
    python -m tests.evidence.mutation --sample 20         # a fixed choice, as `make test` does
    python -m tests.evidence.mutation --module rating

Every mutant is a copy of `app` in a directory of its own, and the module's tests run on it.
"""

import argparse
import ast
import copy
import importlib
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
WALK = "tests/evidence/test_mutants.py::test_the_walks_that_mutants_must_survive"
ACCOUNTS = "tests/app/billing/test_accounts.py"
# Which tests look after a module, the quickest first.
MODULES: dict[str, list[str]] = {
    "app/core/money.py": ["tests/app/core/test_money.py", "tests/evidence/test_money_edges.py"],
    "app/billing/rating.py": [
        "tests/app/billing/test_rating.py",
        "tests/app/billing/test_golden_bills.py",
        "tests/app/api/test_held_time.py",
        WALK,
    ],
    "app/billing/posting.py": ["tests/evidence/test_instants.py", WALK, ACCOUNTS],
    "app/billing/holds.py": [
        WALK,
        ACCOUNTS,
        "tests/evidence/test_refusals.py",
        "tests/app/billing/test_budgets.py",
    ],
    "app/billing/budget_holds.py": [
        WALK,
        "tests/app/billing/test_budgets.py",
        "tests/evidence/test_refusals.py",
    ],
    "app/billing/credits.py": [
        "tests/evidence/test_credit_edges.py",
        WALK,
        "tests/app/billing/test_credits.py",
    ],
    "app/billing/ledger.py": [WALK, "tests/app/billing/test_credits.py"],
}
TIMEOUT_SECONDS = 120
LIBRARIES = (
    *("aiosqlite", "alembic.command", "hypothesis.stateful", "msgspec", "psycopg", "pytest"),
    *("sqlalchemy.dialects.postgresql", "sqlalchemy.dialects.sqlite", "sqlalchemy.ext.asyncio"),
)
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
CALLS = {"min": "max", "max": "min"}


class Mutant(NamedTuple):
    """One changed module. Its name is the same for as long as the line is, wherever that moves."""

    path: str
    line: int
    what: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.path}: {self.what}"


def mutants(path: str) -> list[Mutant]:
    """All single changes of a module, in the order of its lines."""
    text = (ROOT / path).read_text()
    lines = text.splitlines()
    found: list[Mutant] = []
    tree = ast.parse(text)
    for index, node in enumerate(ast.walk(tree)):
        for what, change in _changes(node):
            changed = copy.deepcopy(tree)
            target = next(each for i, each in enumerate(ast.walk(changed)) if i == index)
            change(target)
            line = getattr(node, "lineno", 0)
            source = ast.unparse(ast.fix_missing_locations(changed))
            found.append(Mutant(path, line, f"{what} in `{lines[line - 1].strip()}`", source))
    return sorted(found)


def _changes(node: ast.AST) -> Iterator[tuple[str, "Change"]]:
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield f"{_name(node.op)} to {_name(SWAPS[type(node.op)])}", Change("op")
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield f"{_name(node.ops[0])} to {_name(SWAPS[type(node.ops[0])])}", Change("ops")
    if isinstance(node, ast.BoolOp):
        yield f"{_name(node.op)} to {_name(SWAPS[type(node.op)])}", Change("op")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        yield f"{node.func.id} to {CALLS[node.func.id]}", Change("call")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield f"{node.value} plus one", Change("constant")
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition turned round", Change("test")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "sign left out", Change("sign")
    body: Sequence[ast.stmt] = getattr(node, "body", []) if not isinstance(node, ast.Lambda) else []
    for at, statement in enumerate(body if isinstance(body, list) else []):
        is_call = isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Constant)
        if is_call and not _is_failpoint(statement):
            yield f"`{ast.unparse(statement)}` left out", Change("statement", at)
        if isinstance(statement, ast.AugAssign | ast.Continue | ast.Break):
            yield f"`{ast.unparse(statement)}` left out", Change("statement", at)


class Change(NamedTuple):
    kind: str
    at: int = 0

    def __call__(self, node: "ast.AST") -> None:
        target: object = node
        if self.kind == "op":
            target.op = SWAPS[type(target.op)]()  # type: ignore[attr-defined]
        elif self.kind == "ops":
            target.ops[0] = SWAPS[type(target.ops[0])]()  # type: ignore[attr-defined]
        elif self.kind == "call":
            target.func.id = CALLS[target.func.id]  # type: ignore[attr-defined]
        elif self.kind == "constant":
            target.value += 1  # type: ignore[attr-defined]
        elif self.kind == "test":
            target.test = ast.UnaryOp(ast.Not(), target.test)  # type: ignore[attr-defined]
        elif self.kind == "sign":
            target.op = ast.UAdd()  # type: ignore[attr-defined]
        else:
            target.body[self.at] = ast.Pass()  # type: ignore[attr-defined]


def _name(operation: object) -> str:
    return getattr(operation, "__name__", type(operation).__name__)


def _is_failpoint(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "failpoint"


class Server:
    """A process with the libraries loaded, which forks one for each mutant."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.evidence.mutation", "--serve"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def survives(self, mutant: Mutant) -> bool:
        """Whether its tests pass all the same. One that hangs is noticed too."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory(prefix="mutant") as directory:
            place = Path(directory)
            ignored = shutil.ignore_patterns("__pycache__", "static")
            shutil.copytree(ROOT / "app", place / "app", ignore=ignored)
            for name in ("migrations", "runtime", "templates", "tests", "pyproject.toml"):
                (place / name).symlink_to(ROOT / name)
            (place / mutant.path).write_text(mutant.source)
            self._process.stdin.write(f"{directory} {' '.join(MODULES[mutant.path])}\n")
            self._process.stdin.flush()
            status = int(self._process.stdout.readline())
        assert status in (0, 1, 2, 4, -signal.SIGKILL), (status, mutant.name)
        return status == 0

    def close(self) -> None:
        self._process.communicate(timeout=30)


def serve() -> None:
    """Of each line the directory and the tests; answers with pytest's status."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        directory, *tests = line.split()
        pid = os.fork()
        if pid == 0:
            _test(directory, tests)
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(ended[1])}\n")
        sys.stdout.flush()


def _test(directory: str, tests: list[str]) -> None:
    os.chdir(directory)
    sys.path[:] = [directory, *(path for path in sys.path if path not in ("", str(ROOT)))]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is loaded already
    os._exit(int(pytest.main([*options, *tests])))


def run(chosen: Sequence[Mutant], num_workers: int = 2) -> list[Mutant]:
    """Those that nobody noticed."""
    servers = [Server() for _ in range(num_workers)]
    free: queue.SimpleQueue[Server] = queue.SimpleQueue()
    for server in servers:
        free.put(server)

    def survives(mutant: Mutant) -> bool:
        server = free.get()
        try:
            return server.survives(mutant)
        finally:
            free.put(server)

    with ThreadPoolExecutor(num_workers) as pool:
        survivors = [
            m for m, alive in zip(chosen, pool.map(survives, chosen), strict=True) if alive
        ]
    for server in servers:
        server.close()
    return survivors


def all_mutants(module: str = "") -> list[Mutant]:
    return [m for path in MODULES if module in path for m in mutants(path)]


def sample(count: int, seed: int = 1) -> list[Mutant]:
    """The same ones for as long as the source is the same."""
    return random.Random(seed).sample(all_mutants(), count)  # noqa: S311


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--module", default="")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--serve", action="store_true")
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0
    chosen = sample(arguments.sample) if arguments.sample else all_mutants(arguments.module)
    survivors = run(chosen, arguments.workers)
    for mutant in survivors:
        sys.stdout.write(f"{mutant.name}\n")
    sys.stdout.write(f"{len(chosen)} mutants, {len(survivors)} survive\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
