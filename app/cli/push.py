"""`tapeout push`: upload a model, watch its build, print its endpoint.

Progress goes to stderr; stdout gets the endpoint's URL alone.
"""

import time
from pathlib import Path
from typing import Any

import click

from app.cli.client import Box, Refused
from app.cli.optimise import follow_optimisation
from app.cli.packing import pack
from app.cli.sending import Sender
from app.core.errors import InvalidRequest
from app.registry.input_hints import parse_inputs
from app.registry.names import check_model_name

POLL_SECONDS = 0.4
NUM_FAILED_STARTS = 3  # then waiting on is of no use
SUPERSEDED_SECONDS = 5.0  # a version is deployed right after its build, or not at all


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="Name of the model and of its endpoint.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Tokenizer for a bare .pt2.")
@click.option(
    "--inputs",
    help="What the model takes where its file does not say it (TorchScript), parted by ';': "
    "'image: float32[batch, 3, 224, 224] in 0..1'. Later versions inherit it.",
)
@click.option(
    "--example",
    type=click.Path(path_type=Path),
    help="An .npz of inputs, one array for each: proof and measurement use them too.",
)
@click.option(
    "--accept-loss/--no-accept-loss",
    default=None,
    help="Whether forms that lose accuracy measurably (int8) may serve. Later versions inherit it.",
)
@click.option("--no-wait", is_flag=True, help="Return once the build is queued.")
@click.option("--optimised", is_flag=True, help="Wait for its fastest form too.")
def push(
    path: Path,
    name: str,
    tokenizer: Path | None,
    inputs: str | None,
    example: Path | None,
    accept_loss: bool | None,
    no_wait: bool,
    optimised: bool,
) -> None:
    """Upload PATH (a .pt2, .onnx or TorchScript file, an archive or a Hugging Face directory) and
    build it.

    Interrupted with Ctrl-C, the same command goes on from there.

    Exit code 0: the endpoint answers (or, with --no-wait, the build is queued). 1: refused.
    The search for a faster form goes on while it answers; --optimised waits for that too.
    """
    try:
        check_model_name(name)
        parse_inputs(inputs or "")
    except InvalidRequest as error:
        raise Refused(error.message) from error
    box = Box()
    sender = Sender(box, pack(path, tokenizer, example))
    new = {"upload_id": sender.send(), "inputs": inputs, "accepts_loss": accept_loss}
    version = box.json("POST", f"/api/models/{name}/versions", json=new)
    sender.forget()
    label = f"{name}@{version['number']}"
    if no_wait:
        say(f"{label} is queued; `tapeout logs {name}` shows its build.")
        return
    try:
        built = follow(box, name, version["number"])
        if optimised:
            follow_optimisation(box, name, version["number"])
        elif is_optimising(built):
            say(f"  {label} answers; a faster form is looked for meanwhile (`tapeout models`).")
    except KeyboardInterrupt:
        say(f"\nNo longer watching; what is under way for {label} goes on.")
        raise SystemExit(130) from None
    click.echo(f"{box.url}/models/{name}")


def is_optimising(version: dict[str, Any]) -> bool:
    """Whether the box looks for a faster form of it now, or will."""
    optimisation = version.get("optimisation")
    return optimisation is not None and optimisation["status"] in ("queued", "running")


def follow(box: Box, name: str, number: int) -> dict[str, Any]:
    """Shows the build's phases until the version's endpoint answers, and gives the version. Raises
    `Refused` if that will not happen: the build failed, or what was built does not run."""
    shown = ""
    starting = Starting()
    while True:
        version = box.json("GET", f"/api/models/{name}/versions/{number}")
        line = describe(version)
        if line != shown:
            say(line)
            shown = line
        if version["status"] in {"failed", "cancelled"}:
            error = version.get("error") or {"message": f"the build was {version['status']}"}
            raise Refused(error["message"])
        if version["status"] == "ready":
            if version["is_serving"]:
                return version
            starting.check(version)
        time.sleep(POLL_SECONDS)


class Starting:
    """Whether a built version can still be expected to serve."""

    def __init__(self) -> None:
        self._failures: set[str] = set()
        self._began_at = time.monotonic()

    def check(self, version: dict[str, Any]) -> None:
        """Raises `Refused` when its worker failed again and again, or it is not to be served."""
        detail: str = version["serving_detail"]
        label = f"{version['model']}@{version['number']}"
        if detail.startswith("failed"):
            self._failures.add(detail)
        if len(self._failures) >= NUM_FAILED_STARTS:
            raise Refused(f"{label} was built, but its worker does not start. {detail}")
        if detail == "stopped":
            raise Refused(f"{label} was built, but its endpoint is stopped.")
        has_waited = time.monotonic() - self._began_at > SUPERSEDED_SECONDS
        if version["endpoint"] is None and has_waited:
            raise Refused(f"{label} was built, but another version is served instead.")


def describe(version: dict[str, Any]) -> str:
    """One line on where a version stands."""
    if version["status"] == "building":
        detail = f": {version['phase_detail']}" if version["phase_detail"] else ""
        return f"  {version['progress']:4.0%}  {version['phase'] or 'starting'}{detail}"
    if version["status"] == "ready" and not version["is_serving"]:
        return f"  built; {version['serving_detail'] or 'the worker is starting'}"
    return f"  {version['status']}"


def say(line: str) -> None:
    click.echo(line, err=True)
