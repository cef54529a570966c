"""A receipt's page: how it is sealed, and the file that proves it."""

import asyncio
from collections.abc import Callable

from app.billing.accounts import AccountWriter
from app.billing.proofs import read_proof, verify_proof
from app.billing.rating import Settlement
from app.billing.sealing import Sealer
from app.billing.signing import open_key
from app.core.ids import new_id
from app.settings import Settings
from tests.app.billing.conftest import accounts, settlement
from tests.app.console.conftest import Console
from tests.app.console.samples import organization_id

__all__ = ["accounts", "settlement"]  # fixtures


async def test_a_sealed_receipt_can_be_taken_along(
    owned: Console,
    settings: Settings,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
) -> None:
    async with owned.database.read() as session:
        owner = await organization_id(session)
    request_id, foreign_id = new_id("req"), new_id("req")
    accounts.settle(settlement(request_id, organization_id=owner))
    accounts.settle(settlement(foreign_id, organization_id="org_2"))
    await accounts.flush()
    path = f"/console/receipts/{request_id}"
    assert "Not sealed yet." in (await owned.client.get(path)).text
    assert (await owned.client.get(f"{path}/proof")).status_code == 404

    key = await asyncio.to_thread(open_key, owned.storage.receipt_key)
    sealer = Sealer(settings.sync_database_url, key)
    assert await sealer.turn() == 2
    await sealer.close()
    assert "In seal 1 of the ledger." in (await owned.client.get(path)).text
    file = await owned.client.get(f"{path}/proof")
    assert file.headers["content-disposition"].endswith(f'"receipt-{request_id}.json"')
    proof = read_proof(file.content)
    assert proof.public_key == owned.client.app.state.records.public_key
    assert verify_proof(proof).receipt.event_id == f"{request_id}:1"
    assert (await owned.client.get(f"/console/receipts/{foreign_id}/proof")).status_code == 404
