"""Proofs of receipts verify without the box, and no changed one does."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.api.receipts import ReceiptAnswer, ReceiptBook
from app.billing.accounts import AccountWriter
from app.billing.digests import ReceiptRecord
from app.billing.proofs import Proof, ProofError, read_proof, read_saved, verify_proof
from app.billing.rating import Settlement
from app.billing.signing import open_key
from app.cli import main
from app.core import clock
from app.core.database import Database
from app.core.errors import NotFound
from app.settings import Settings
from tests.app.billing.books import Books

DOCUMENT = Path(__file__).resolve().parents[3] / "docs/receipts.md"


@pytest.fixture
async def books(
    settings: Settings, accounts: AccountWriter, settlement: Callable[..., Settlement]
) -> AsyncIterator[Books]:
    books = Books(settings, accounts, settlement)
    yield books
    await books.close()


async def sealed_requests(books: Books) -> list[str]:
    """Five requests of one organization in one transaction, among those of others."""
    ids = [books.new_request(clock.now()) for _ in range(8)]
    await books.settle(
        *(books.settlement(name, 50 + index, cached_tokens=index)
          for index, name in enumerate(ids[:5])),
        *(books.settlement(name, organization_id=f"org_{name[-1]}") for name in ids[5:]),
    )  # fmt: skip
    return ids[:5]


async def test_a_receipt_is_proved_once_it_is_sealed(books: Books) -> None:
    ids = await sealed_requests(books)
    assert await books.records.proof("org_1", ids[0]) is None
    books.seal()
    proofs = await asyncio.gather(*(books.records.proof("org_1", name) for name in ids))
    for name, proof in zip(ids, proofs, strict=True):
        assert proof is not None
        verified = verify_proof(proof, books.key.public_hex)
        assert verified.receipt.event_id == f"{name}:1"
        assert verified.receipt.organization_id == "org_1"
        assert len(verified.checks) == 4
        assert "org_" not in str(proof.transaction_path)  # of others, hashes only
    with pytest.raises(NotFound):
        await books.records.proof("org_2", ids[0])


async def one_proof(books: Books) -> Proof:
    ids = await sealed_requests(books)
    books.seal()
    proof = await books.records.proof("org_1", ids[2])
    assert proof is not None
    return proof


async def test_no_changed_byte_passes(books: Books) -> None:
    data = msgspec.json.encode(await one_proof(books))
    key = books.key.public_hex
    assert verify_proof(read_proof(data), key).receipt.organization_id == "org_1"

    @hypothesis_settings(max_examples=400, deadline=None)
    @given(st.integers(0, len(data) - 1), st.integers(0, 255))
    def change(place: int, byte: int) -> None:
        changed = data[:place] + bytes([byte]) + data[place + 1 :]
        if changed == data:
            return
        with pytest.raises(ProofError):
            verify_proof(read_proof(changed), key)

    change()


async def test_no_changed_field_passes(books: Books) -> None:
    """Nor one that was changed in both texts, or hashed again."""
    proof = await one_proof(books)
    fields: dict[str, Any] = msgspec.to_builtins(proof)
    for name, value in fields["seal"].items():
        changed = value + 1 if isinstance(value, int) else value[::-1] + "0"
        with pytest.raises(ProofError):
            verify_proof(msgspec.convert({**fields, "seal": {**fields["seal"], name: changed}},
                                         Proof), books.key.public_hex)  # fmt: skip
    receipt = msgspec.json.decode(proof.receipt, type=ReceiptRecord)
    for name in ReceiptRecord.__struct_fields__:
        value = getattr(receipt, name)
        changed = value + 1 if isinstance(value, int) else value[:-1]
        altered = msgspec.structs.replace(receipt, **{name: changed}).canonical.decode()
        with pytest.raises(ProofError):
            verify_proof(msgspec.structs.replace(proof, receipt=altered))
    for path in ("receipt_path", "transaction_path"):
        with pytest.raises(ProofError, match="differ"):
            verify_proof(msgspec.structs.replace(proof, **{path: []}))


async def test_what_is_wrong_is_named(books: Books, tmp_path: Path) -> None:
    proof = await one_proof(books)
    dearer = proof.receipt.replace('["output",52,', '["output",53,')
    assert dearer != proof.receipt
    with pytest.raises(ProofError, match=r"line output: 53 x 400000000 / 1000000, billed, is"):
        verify_proof(msgspec.structs.replace(proof, receipt=dearer))
    renamed = proof.receipt.replace('"tiny"', '"huge"')
    with pytest.raises(ProofError, match="the receipt is not the one of ledger transaction"):
        verify_proof(msgspec.structs.replace(proof, receipt=renamed))
    with pytest.raises(ProofError, match="not in the form that is hashed"):
        verify_proof(msgspec.structs.replace(proof, receipt=proof.receipt.replace(":", ": ", 1)))
    other = open_key(tmp_path / "other.key")
    with pytest.raises(ProofError, match="not the one you trust"):
        verify_proof(proof, other.public_hex)
    forged = msgspec.structs.replace(proof, public_key=other.public_hex)
    with pytest.raises(ProofError, match="the signature of seal 1 is not by the key"):
        verify_proof(forged)
    for data in (b"", b"[]", b"{}", b"\xff", b'{"proof": 1}', b'{"proof": null}'):
        with pytest.raises(ProofError):
            read_proof(data)


async def test_a_saved_answer_must_say_what_is_proved(
    books: Books, database: Database, tmp_path: Path
) -> None:
    proof = await one_proof(books)
    request_id = verify_proof(proof).receipt.event_id.removesuffix(":1")
    async with database.read() as session:
        receipt = await books.records.receipt(session, "org_1", request_id)
    fields = msgspec.structs.asdict(receipt)
    book = ReceiptBook(fields.pop("price_book_id"), 1, "ab" * 32)
    note = "is served with some of its layers on the CPU"
    whole = ReceiptAnswer(**fields, price_book=book, proof=proof, serving_note=note)
    answer: dict[str, Any] = msgspec.to_builtins(whole)
    saved = read_saved(msgspec.json.encode(answer))
    assert saved.proof == proof
    assert saved.unproved == ["price_book.number", "price_book.sha256", "serving_note"]
    forged = {
        name: value + 1 if isinstance(value, int) else value[:-1]
        for name, value in answer.items()
        if name
        not in ("price_book", "started_at", "finished_at", "proof", "serving_note", "object")
    }
    assert len(forged) == 13
    forged["first_token_ns"] = None
    forged["price_book"] = {**answer["price_book"], "id": "pb_2"}
    for name in ("started_at", "finished_at"):
        other = getattr(receipt, name) + timedelta(microseconds=1)
        forged[name] = other.isoformat()
        with pytest.raises(ProofError, match=f"{name} is not what the proof says"):
            read_proof(msgspec.json.encode({**answer, name: other.replace(tzinfo=None)}))
    for name, value in forged.items():
        with pytest.raises(ProofError, match=f"{name} is not what the proof says"):
            read_proof(msgspec.json.encode({**answer, name: value}))
    for unknown in ({"paid": True}, {"price_book": {**answer["price_book"], "discount": "10%"}}):
        with pytest.raises(ProofError, match="unknown field"):
            read_proof(msgspec.json.encode({**answer, **unknown}))
    for name in ("price_book", "started_at", "amount_nano", "lines"):
        with pytest.raises(ProofError, match="missing required field"):
            read_proof(msgspec.json.encode({k: v for k, v in answer.items() if k != name}))
    steps = [{**step, "note": "x"} for step in answer["proof"]["receipt_path"]]
    altered = {**answer["proof"], "receipt_path": steps}
    with pytest.raises(ProofError, match="unknown field"):
        read_proof(msgspec.json.encode({**answer, "proof": altered}))
    file = tmp_path / "answer.json"
    file.write_bytes(msgspec.json.encode(answer))
    done = CliRunner().invoke(main, ["receipt", "verify", str(file)])
    assert done.exit_code == 0, done.output
    assert "Not a part of what is proved: price_book.number, price_book.sha256" in done.output
    with pytest.raises(ProofError, match="twice"):
        read_proof(b'{"amount_nano": 1,' + msgspec.json.encode(answer)[1:])
    with pytest.raises(ProofError, match="not sealed yet"):
        read_proof(msgspec.json.encode({**answer, "proof": None}))


async def test_the_command_verifies_a_file(books: Books, tmp_path: Path) -> None:
    file = tmp_path / "receipt.json"
    data = msgspec.json.encode(await one_proof(books))
    file.write_bytes(data)
    done = CliRunner().invoke(main, ["receipt", "verify", str(file)])
    assert done.exit_code == 0, done.output
    assert "as posted to the ledger" in done.output
    assert "compare with its /v1/receipts/key" in done.output
    key = books.key.public_hex
    done = CliRunner().invoke(main, ["receipt", "verify", str(file), "--key", key])
    assert done.exit_code == 0
    assert done.output.count("ok  ") == 4
    file.write_bytes(data.replace(b"key_1", b"key_2", 1))
    done = CliRunner().invoke(main, ["receipt", "verify", str(file)])
    assert done.exit_code == 1
    assert "is NOT a valid receipt: the receipt is not the one" in done.output
    done = CliRunner().invoke(main, ["receipt", "verify", str(file), "--key", "ab" * 32])
    assert done.exit_code == 1


async def test_the_documented_verification_works(books: Books) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert snippet.count("\n") <= 42
    scope: dict[str, Any] = {}
    exec(snippet, scope)  # noqa: S102 - it is what people are told to run
    proof = await one_proof(books)
    fields: dict[str, Any] = msgspec.to_builtins(proof)
    receipt = scope["verify"](fields, books.key.public_hex)
    assert receipt["organization_id"] == "org_1"
    for name in ("receipt", "transaction"):
        changed = {**fields, name: fields[name].replace("usd", "eur")}
        with pytest.raises(AssertionError):
            scope["verify"](changed, books.key.public_hex)


def test_the_document_names_every_member() -> None:
    text = DOCUMENT.read_text()
    for name in ReceiptRecord.__struct_fields__:
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("name", ["receipt_path", "x", "proof"])
def test_a_saved_answer_that_is_nested_beyond_reason_is_none(name: str) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    with pytest.raises(ProofError):
        read_saved(b'{"%s": %s}' % (name.encode(), deep))
