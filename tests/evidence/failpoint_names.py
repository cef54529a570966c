"""Every failpoint of the application, found in its source, so that none can be forgotten."""

import ast
from pathlib import Path

APP = Path(__file__).parents[2] / "app"


def failpoint_names() -> list[str]:
    """In the order of modules. Raises for one that is not named by a literal of its own."""
    names: list[str] = []
    for path in sorted(APP.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "failpoint":
                continue
            (argument,) = node.args
            assert isinstance(argument, ast.Constant), f"{path}: a failpoint needs a literal name"
            assert isinstance(argument.value, str)
            assert argument.value not in names, f"{path}: {argument.value} names another place"
            names.append(argument.value)
    return names
