"""The pure decision: what to start, what to retire, who takes requests."""

from dataclasses import dataclass

import msgspec
import pytest

from app.deployments.desired import Desired, plan, route
from tests.app.deployments.fake_process import DECODER, RECEIPT


def desired(version: int = 2, **values: object) -> Desired:
    fields: dict[str, object] = {
        "deployment_id": "d",
        "organization_id": "o",
        "endpoint_name": "tiny",
        "is_public": False,
        "is_default": False,
        "is_stopped": False,
        "model_name": "tiny",
        "revision_id": f"r{version}",
        "num_replicas": 1,
        "serving": {},
        "version_id": f"v{version}",
        "version_number": version,
        "artifact_id": "a",
        "manifest": DECODER,
        "receipt": RECEIPT,
    }
    return msgspec.convert({**fields, **values}, Desired)


@dataclass
class Fake:
    desired: Desired
    is_ready: bool = False
    is_retired: bool = False
    has_been_ready: bool = False
    has_failed: bool = False


def ready(version: int) -> Fake:
    return Fake(desired(version), is_ready=True, has_been_ready=True)


def starting(version: int) -> Fake:
    return Fake(desired(version))


def failed(version: int, *, was_ready: bool = False) -> Fake:
    return Fake(desired(version), has_failed=True, has_been_ready=was_ready)


OLD, NEW = ready(1), ready(2)


@pytest.mark.parametrize(
    ("running", "num_to_start", "num_retired", "routed"),
    [
        ([], 1, 0, []),
        ([starting(2)], 0, 0, []),
        ([NEW], 0, 0, [2]),
        ([ready(1)], 1, 0, [1]),  # beside the old one
        ([ready(1), starting(2)], 0, 0, [1]),
        ([ready(1), ready(2)], 0, 1, [2]),
        ([ready(1), failed(2)], 0, 0, [1]),  # what fails to load does not replace what serves
        ([failed(1), starting(2)], 0, 1, []),  # what never served is not worth keeping
        ([failed(1, was_ready=True), starting(2)], 0, 0, []),
        ([ready(1), starting(3), starting(2)], 0, 1, [1]),
        ([ready(2), ready(2)], 0, 1, [2, 2]),
    ],
)
def test_one_replica(
    running: list[Fake], num_to_start: int, num_retired: int, routed: list[int]
) -> None:
    todo = plan(desired(2), running)
    assert (todo.num_to_start, len(todo.to_retire)) == (num_to_start, num_retired)
    assert [fake.desired.version_number for fake in route(desired(2), running)] == routed


def test_several_replicas_take_over_together() -> None:
    two = desired(2, num_replicas=2)
    half = [ready(1), ready(2), starting(2)]
    assert route(two, half) == half[:1]
    assert plan(two, half).to_retire == []
    # One that cannot start does not hold the other back for ever.
    half = [ready(1), ready(2), failed(2)]
    assert route(two, half) == half[1:2]
    assert plan(two, half).to_retire == half[:1]


def test_fewer_replicas_keep_the_ready_ones() -> None:
    running = [starting(2), ready(2)]
    assert plan(desired(2), running).to_retire == running[:1]


def test_more_replicas_leave_the_running_ones_alone() -> None:
    todo = plan(desired(2, num_replicas=3, revision_id="r9"), [ready(2)])
    assert (todo.num_to_start, todo.to_retire) == (2, [])


def test_other_settings_are_another_replica() -> None:
    todo = plan(desired(2, serving={"max_sequences": 4}), [ready(2)])
    assert (todo.num_to_start, todo.to_retire) == (1, [])


@pytest.mark.parametrize("wanted", [None, desired(2, is_stopped=True)], ids=["deleted", "stopped"])
def test_nothing_stays_of_what_is_not_wanted(wanted: Desired | None) -> None:
    leaving = ready(2)
    leaving.is_retired = True
    running = [ready(2), starting(2), leaving]
    assert plan(wanted, running).to_retire == running[:2]
    if wanted is not None:
        assert route(wanted, running) == []
