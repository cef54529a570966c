"""Receipts with their proof, and the chain of seals, over HTTP and from the command line."""

import asyncio
import os
import sys
from pathlib import Path

import openai

from app.billing.proofs import read_proof, verify_proof
from app.billing.usage_archive import Span
from tests.app.api.conftest import ORGANIZATION, OTHER, Box


async def asked(client: openai.AsyncOpenAI) -> str:
    raw = await client.completions.with_raw_response.create(model="tiny", prompt="a b c")
    return raw.headers["x-request-id"]


async def command(box: Box, key: str, *words: str) -> tuple[int, str]:
    """A run of `tapeout`: its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from app.cli import main; main()",
        *words,
        env={**os.environ, "TAPEOUT_URL": box.url, "TAPEOUT_API_KEY": box.keys[key]},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_receipt_has_its_proof_once_sealed(box: Box, client: openai.AsyncOpenAI) -> None:
    request_id = await asked(client)
    assert (await box.receipt(request_id))["proof"] is None
    assert await box.sealer.turn() == 1
    async with box.http(OTHER) as other, box.http() as http:
        key = (await other.get("/v1/receipts/key")).json()["public_key"]
        answer = await http.get(f"/v1/receipts/{request_id}")
        assert (await other.get(f"/v1/receipts/{request_id}")).status_code == 404
    verified = verify_proof(read_proof(answer.content), key)
    assert verified.receipt.event_id == f"{request_id}:1"
    assert verified.receipt.amount_nano == answer.json()["amount_nano"]


async def test_a_damaged_archive_is_an_error_that_says_so(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    request_id = await asked(client)
    path = box.records.archive.path(Span(1, 3))
    await asyncio.to_thread(path.write_bytes, b"damaged")
    async with box.http() as http:
        assert (await http.get(f"/v1/receipts/{request_id}")).status_code == 200
        answer = await http.get("/v1/receipts/req_unknown")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "archive_damaged")
    assert path.name in error["message"]
    assert str(path.parent) not in answer.text


async def test_seals_are_public_to_callers_and_tell_nothing_of_them(
    box: Box, client: openai.AsyncOpenAI
) -> None:
    for _ in range(3):
        await asked(client)
        await box.relay.settled()
        await box.sealer.turn()
    async with box.http(OTHER) as http:
        newest = await http.get("/api/seals", params={"limit": 2})
        after = (await http.get("/api/seals", params={"after": 1})).json()
        refused = await http.get("/api/seals", params={"limit": 0})
        assert (await http.post("/api/seals/verify")).status_code == 403
    assert [seal["number"] for seal in newest.json()["seals"]] == [3, 2]
    assert [seal["number"] for seal in after["seals"]] == [2, 3]
    first, second = after["seals"]
    assert second["previous_sha256"] == first["sha256"]
    assert after["public_key"] == box.records.public_key
    assert ORGANIZATION not in newest.text
    assert refused.status_code == 400
    async with box.http() as http:
        checked = (await http.post("/api/seals/verify", params={"after": 1})).json()
    assert (checked["num_seals"], checked["num_receipts"], checked["problem"]) == (2, 2, None)


async def test_the_commands(box: Box, client: openai.AsyncOpenAI, tmp_path: Path) -> None:
    request_id, file = await asked(client), str(tmp_path / "receipt.json")
    code, output = await command(box, ORGANIZATION, "receipt", request_id, "--save", file)
    assert code == 1
    assert "Not sealed yet." in output
    await box.sealer.turn()
    code, output = await command(box, ORGANIZATION, "receipt", request_id, "--save", file)
    assert code == 0, output
    assert "Seal: 1" in output
    assert "output     8" in output
    code, output = await command(box, ORGANIZATION, "receipt", "verify", file)
    assert code == 0, output
    code, output = await command(box, ORGANIZATION, "ledger", "verify")
    assert code == 0, output
    assert output.startswith("1 seals, 1 transactions and 1 receipts (0 of them archived)")
    assert (await command(box, OTHER, "ledger", "verify"))[0] == 1
    code, output = await command(box, ORGANIZATION, "usage", "--by", "hour", "--csv")
    assert output.splitlines()[0].startswith('"hour","requests",')
