"""`tapeout optimise`: look for a faster form of a model again, follow that, or stop it."""

import time
from typing import Any

import click

from app.cli.client import Box, Refused

POLL_SECONDS = 0.4


@click.command()
@click.argument("name")
@click.option("--version", "number", type=int, help="Of this version; without, the newest.")
@click.option("--cancel", "is_cancel", is_flag=True, help="Stop looking instead.")
@click.option("--no-wait", is_flag=True, help="Return once it is queued.")
def optimise(name: str, number: int | None, is_cancel: bool, no_wait: bool) -> None:
    """Measure every form of the model NAME (but of a decoder) on the box and serve the fastest.

    Its endpoint goes on answering meanwhile.
    """
    box = Box()
    chosen = newest_number(box, name) if number is None else number
    path = f"/api/models/{name}/versions/{chosen}/optimise"
    if is_cancel:
        box.json("POST", f"{path}/cancel")
        click.echo("It was cancelled; what was built goes on serving.", err=True)
        return
    box.json("POST", path)
    if not no_wait:
        follow_optimisation(box, name, chosen)


def newest_number(box: Box, name: str) -> int:
    newest = box.json("GET", f"/api/models/{name}")["latest_version"]
    if newest is None:
        raise Refused(f"{name} has no version.")
    return newest["number"]


def follow_optimisation(box: Box, name: str, number: int) -> None:
    """Shows progress until the search is over and its result answers, if the version serves at
    all. Raises `Refused` if it failed, was cancelled, or its result cannot be served."""
    shown = ""
    while True:
        version = box.json("GET", f"/api/models/{name}/versions/{number}")
        optimisation: dict[str, Any] | None = version["optimisation"]
        if optimisation is None:
            raise Refused(
                f"{name}@{number} is not optimised: the box does that for models that are no "
                "decoders."
            )
        is_swapped = version["serving_form"] in ("", optimisation["form"])
        line = describe_optimisation(optimisation, is_swapped)
        if line != shown:
            click.echo(line, err=True)
            shown = line
        if optimisation["status"] in ("failed", "cancelled"):
            error = optimisation["error"] or {"message": "It was cancelled."}
            raise Refused(f"no faster form was put in force. {error['message']}")
        if optimisation["status"] == "done" and is_swapped:
            return
        time.sleep(POLL_SECONDS)


def describe_optimisation(optimisation: dict[str, Any], is_swapped: bool) -> str:
    """One line on where the search for a faster form stands."""
    status: str = optimisation["status"]
    if status == "running":
        detail = f": {optimisation['phase_detail']}" if optimisation["phase_detail"] else ""
        return f"  {optimisation['progress']:4.0%}  {optimisation['phase'] or 'starting'}{detail}"
    if status == "queued":
        return "  waiting for its turn to be optimised"
    if status != "done":
        return f"  optimising {status}"
    form, speed_up = optimisation["form"], optimisation["speed_up"]
    if not is_swapped:
        return f"  {form} won; its worker is starting"
    if form == "eager" or speed_up is None:
        return "  optimised: eager is as fast as any other form"
    return f"  optimised: {form}, {speed_up:.1f} times as fast as eager"
