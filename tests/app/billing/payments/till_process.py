"""One of several processes that do an organization's payments at the same time: argv holds the
settings in JSON. Says `ready`, waits for a line, then works."""

import asyncio
import sys

import msgspec

from app.billing.payments.service import Payments
from app.core.database import Database
from app.settings import Settings

NUM_TURNS = 6


async def work(settings: Settings) -> None:
    database = Database(settings.async_database_url)
    payments = Payments(database, settings)
    print("ready", flush=True)  # noqa: T201
    await asyncio.to_thread(sys.stdin.readline)
    for _ in range(NUM_TURNS):
        await asyncio.gather(
            payments.recharge(), payments.link.outbox.turn(), payments.link.inbox.turn()
        )
        await asyncio.sleep(0.1)
    await payments.close()
    await database.close()


if __name__ == "__main__":
    asyncio.run(work(msgspec.json.decode(sys.argv[1], type=Settings, dec_hook=lambda t, v: t(v))))
