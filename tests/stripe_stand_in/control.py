"""Control over HTTP, for tests in other processes: POST /_control/<act> with arguments in JSON.

Acts are the public methods of `People`, and those listed here.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from tests.stripe_stand_in.errors import invalid, missing
from tests.stripe_stand_in.idempotency import Answer
from tests.stripe_stand_in.people import People

if TYPE_CHECKING:
    from tests.stripe_stand_in.server import StandIn


def control(stand_in: "StandIn", act: str, body: str) -> Answer:
    acts: dict[str, Any] = {
        name: getattr(stand_in, name)
        for name in vars(People)
        if not name.startswith("_") and callable(getattr(stand_in, name))
    } | {
        "faults/add": stand_in.faults.add,
        "faults/at_random": stand_in.faults.at_random,
        "faults/clear": stand_in.faults.clear,
        "faults/webhooks": lambda **counts: vars(stand_in.faults.webhooks).update(counts),
        "clock/advance": stand_in.clock.advance,
        "clock/freeze": stand_in.clock.freeze,
        "webhooks/deliver_to": stand_in.webhooks.deliver_to,
        "webhooks/settle": stand_in.webhooks.settle,
        "keys/prune": stand_in.prune_keys,
        "events": stand_in.events,
        "requests": lambda: [dataclasses.asdict(each) for each in stand_in.requests],
    }
    if act not in acts:
        raise missing("act", act)
    try:
        done = acts[act](**json.loads(body or "{}"))
    except (TypeError, ValueError) as error:
        raise invalid(f"{act}: {error}") from error
    if dataclasses.is_dataclass(done):
        done = dataclasses.asdict(done)  # type: ignore[arg-type]
    return Answer(200, json.dumps(done).encode())
