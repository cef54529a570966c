"""Old usage moves to files: each receipt is in the database, the archive or both, at any moment."""

import base64
import io
import os
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.billing import archiving
from app.billing.accounts import AccountWriter
from app.billing.archive_file import (
    ArchiveWriter,
    DamagedArchive,
    read_header,
    read_random,
    read_transaction_at,
    read_transactions,
)
from app.billing.archiving import (
    Archivist,
    NotWhatWasSealed,
    archive_before,
    finish_dropping,
)
from app.billing.columns import RANDOM_BYTES
from app.billing.digests import ReceiptRecord, instant_text, merkle_root
from app.billing.prices import first_items
from app.billing.proofs import verify_proof
from app.billing.rating import Settlement
from app.billing.reconciliation.seals import SealWalk
from app.billing.repricing import reprice
from app.billing.usage_archive import (
    ABOUT_TO_GO,
    NOTHING_ARCHIVED,
    Span,
    UsageArchive,
    detail_from,
)
from app.core import clock
from app.core.database import Database
from app.core.errors import NotFound, Unavailable
from app.core.failpoints import Countdown, Reached, observed
from app.core.ids import id_parts, id_with, new_id
from app.metering.service import usage_by
from app.settings import Settings
from tests.app.billing.books import Books
from tests.app.billing.test_prices import book_of

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
NOW = START + 100 * DAY
NUM_DAYS, OLD_DAYS = 10, 7
NUM_REQUESTS, NUM_OLD = 3 * NUM_DAYS, 3 * OLD_DAYS


@pytest.fixture
def clock_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    def set_now(now: datetime) -> None:
        monkeypatch.setattr(clock, "now", lambda: now)

    return set_now


@pytest.fixture
async def books(
    settings: Settings,
    accounts: AccountWriter,
    settlement: Callable[..., Settlement],
    clock_at: Callable[[datetime], None],
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Books]:
    """Thirty requests over ten days, a seal for each day; files are of eight or more."""
    monkeypatch.setattr(archiving, "EVENTS_PER_FILE", 8)
    monkeypatch.setattr(archiving, "TRANSACTIONS_AT_ONCE", 2)
    books = Books(settings, accounts, settlement)
    for day in range(NUM_DAYS):
        now = START + day * DAY
        clock_at(now)
        at_ns = int(now.timestamp()) * 1_000_000_000 + 123_456_789
        await books.settle(
            *(
                books.settlement(
                    books.new_request(now),
                    10 * day + index,
                    organization_id=organization_id,
                    outcome="failed" if index == 2 else "completed",
                    finished_at_ns=at_ns + index * 1_001,
                    cached_tokens=index,
                )
                for index, organization_id in enumerate(("org_1", "org_1", "org_2"))
            )
        )
        books.seal()
    clock_at(NOW)
    yield books
    await books.close()


def requests_of(books: Books) -> list[str]:
    """Every request that was settled, by id."""
    return [
        id_with("req", int((START + (n // 3) * DAY).timestamp() * 1000), (n + 1).to_bytes(10))
        for n in range(NUM_REQUESTS)
    ]


def owner(place: int) -> str:
    return "org_2" if place % 3 == 2 else "org_1"


async def test_old_requests_move_and_are_answered_as_before(
    books: Books, database: Database
) -> None:
    records, requests = books.records, requests_of(books)
    async with database.read() as session:
        before = [
            (await records.receipt(session, owner(n), name), await records.proof(owner(n), name))
            for n, name in enumerate(requests)
        ]
        usage = await usage_by(session, "org_1", "day", START - DAY, NOW)
    checked = books.check()
    assert (checked.num_receipts, checked.num_archived, checked.problem) == (NUM_REQUESTS, 0, None)

    assert books.archive_before(START + OLD_DAYS * DAY) == NUM_OLD
    assert books.count("usage_event") == NUM_REQUESTS - NUM_OLD
    assert books.count("usage_line") == 14 * (NUM_DAYS - OLD_DAYS)  # one found nothing cached
    assert books.archive.spans() == [Span(1, 3), Span(4, 6), Span(7, 7)]
    async with database.read() as session:
        for n, (name, (receipt, proof)) in enumerate(zip(requests, before, strict=True)):
            assert await records.receipt(session, owner(n), name) == receipt
            assert await records.proof(owner(n), name) == proof
            assert proof is not None
            verify_proof(proof, books.key.public_hex)
            with pytest.raises(NotFound):
                await records.receipt(session, "org_3", name)
            with pytest.raises(NotFound):
                await records.proof("org_3", name)
        assert await usage_by(session, "org_1", "day", START - DAY, NOW) == usage
        with pytest.raises(NotFound):
            await records.receipt(session, "org_1", new_id("req"))
    checked = books.check()
    assert (checked.num_receipts, checked.num_archived, checked.problem) == (
        NUM_REQUESTS,
        NUM_OLD,
        None,
    )
    assert books.archive_before(START + OLD_DAYS * DAY) == 0
    assert books.archive_before(START + 30 * DAY) == NUM_REQUESTS - NUM_OLD
    assert books.count("usage_event") == 0
    assert books.check().problem is None


async def test_a_file_is_made_once_a_day_at_most(books: Books) -> None:
    assert books.archive_before(START + OLD_DAYS * DAY) == NUM_OLD
    assert books.archive_before(START + OLD_DAYS * DAY + timedelta(hours=23)) == 0
    assert books.archive_before(START + (OLD_DAYS + 1) * DAY + timedelta(hours=1)) == 6


async def test_a_seal_from_a_clock_that_was_wrong_goes_with_those_about_it(
    books: Books, clock_at: Callable[[datetime], None]
) -> None:
    async def seal_at(now: datetime) -> None:
        clock_at(now)
        await books.settle(books.settlement(books.new_request(NOW)))
        books.seal()

    for days in (0, 3650, 1, 3650):
        await seal_at(NOW + days * DAY)
    clock_at(NOW + 5 * DAY)
    assert books.archive_before(NOW + 0.5 * DAY) == NUM_REQUESTS + 1  # what lies about it does not
    assert books.archive_before(NOW + 4 * DAY) == 2
    await seal_at(NOW + 5 * DAY)
    clock_at(NOW + 70 * DAY)
    assert books.archive_before(NOW + 8 * DAY) == 2
    assert books.count("usage_event") == 0
    spans = books.archive.spans()
    assert [span.first_seal for span in spans] == [1, *(span.last_seal + 1 for span in spans[:-1])]
    checked = books.check()
    assert (checked.num_archived, checked.problem) == (NUM_REQUESTS + 5, None)


async def test_a_file_ends_before_a_seal_that_is_kept(
    books: Books, clock_at: Callable[[datetime], None]
) -> None:
    for days in (20, 0):  # set back, between two seals
        clock_at(NOW + days * DAY)
        await books.settle(books.settlement(books.new_request(NOW)))
        books.seal()
    clock_at(NOW + 30 * DAY)
    assert books.archive_before(NOW + 10 * DAY) == NUM_REQUESTS
    assert books.archive_before(NOW + 29 * DAY) == 2
    assert books.count("usage_event") == 0


async def test_what_was_archived_does_not_come_back_with_a_longer_time(
    books: Books, database: Database
) -> None:
    """Once 93 days were kept, and now 365 are to be."""
    archive = books.archive
    assert archive.archived_until() == NOTHING_ARCHIVED
    assert detail_from(365, archive.archived_until()) == NOW - 365 * DAY + ABOUT_TO_GO
    books.archive_before(NOW - 93 * DAY)
    last = START + (OLD_DAYS - 1) * DAY
    for each in (archive, UsageArchive(archive.directory)):
        assert last <= each.archived_until() < last + timedelta(seconds=1)
    kept_from = await books.records.detail_from(365)
    assert last < kept_from < last + timedelta(seconds=1)
    assert await books.records.detail_from(93) == NOW - 93 * DAY + ABOUT_TO_GO
    other = book_of(*first_items())
    whole = (START - DAY, NOW)
    found = await reprice(database, other, *whole, 365, archive.archived_until())
    assert (found.is_estimate, found.old_nano) == (True, found.new_nano)
    kept = await reprice(database, other, kept_from, NOW, 365, archive.archived_until())
    assert kept.num_events == NUM_REQUESTS - NUM_OLD


async def test_an_instant_of_a_clock_that_was_wrong_is_not_archived_until(
    books: Books, clock_at: Callable[[datetime], None]
) -> None:
    for days in (3650, 0):
        clock_at(NOW + days * DAY)
        await books.settle(books.settlement(books.new_request(NOW)))
        books.seal()
    clock_at(NOW + 30 * DAY)
    books.archive_before(NOW + 29 * DAY)
    assert books.count("usage_event") == 0
    assert books.archive.archived_until() == NOW


async def test_a_file_that_cannot_tell_counts_until_it_was_written(books: Books) -> None:
    books.archive_before(NOW)
    path = books.archive.path(books.archive.spans()[0])
    path.write_bytes(b"damaged")
    os.utime(path, (NOW.timestamp(), NOW.timestamp()))
    assert UsageArchive(books.archive.directory).archived_until() == NOW + timedelta(seconds=1)


FAILPOINTS = (
    "usage_archive.before_fsync",
    "usage_archive.before_rename",
    "usage_archive.after_rename",
    "archiving.before_commit",
    "archiving.after_commit",
)


async def nothing_to_sync() -> None:
    """These receipts came from no journal."""


async def test_what_was_settled_is_durable_in_the_journal_before_anything_leaves(
    books: Books, settings: Settings
) -> None:
    num_left: list[int] = []

    async def sync() -> None:
        num_left.append(books.count("usage_event"))

    archivist = Archivist(settings.sync_database_url, books.archive, 1, sync)
    await archivist.turn()
    await archivist.close()
    assert num_left == [NUM_REQUESTS]
    assert books.count("usage_event") < NUM_REQUESTS


@pytest.mark.parametrize("place", [f"{name}:{n}" for name in FAILPOINTS for n in (1, 2)])
async def test_no_crash_loses_a_request(books: Books, settings: Settings, place: str) -> None:
    def crash(name: str) -> None:
        raise Reached(name)

    with observed(Countdown(place, crash)), pytest.raises(Reached):
        books.archive_before(START + OLD_DAYS * DAY)
    checked = books.check()
    assert (checked.num_receipts, checked.problem) == (NUM_REQUESTS, None)
    for n, name in enumerate(requests_of(books)):
        assert await books.records.proof(owner(n), name) is not None, name
    # The next process finishes it.
    archive = UsageArchive(books.archive.directory)
    archivist = Archivist(settings.sync_database_url, archive, 90, nothing_to_sync)
    await archivist.turn()
    await archivist.close()
    checked = books.check()
    assert (checked.num_receipts, checked.num_archived, checked.problem) == (
        NUM_REQUESTS,
        NUM_REQUESTS,
        None,
    )
    assert books.count("usage_event") == books.count("usage_line") == 0
    assert not [path for path in books.archive.directory.iterdir() if path.suffix != ".usage"]


async def test_it_stops_when_the_box_does_and_goes_on_later(books: Books) -> None:
    stopping = threading.Event()
    before = START + OLD_DAYS * DAY
    with observed(Countdown("archiving.after_commit", lambda name: stopping.set())):
        archive_before(books.engine, books.archive, before, stopping)
    assert books.archive.spans() == [Span(1, 3)]
    assert NUM_REQUESTS - 9 < books.count("usage_event") < NUM_REQUESTS
    assert archive_before(books.engine, books.archive, before, stopping) == 0
    finish_dropping(books.engine, books.archive)
    assert books.count("usage_event") == NUM_REQUESTS - 9
    assert books.archive_before(before) == NUM_OLD - 9
    assert books.check().problem is None


async def test_what_was_changed_is_not_archived(books: Books) -> None:
    books.tamper("UPDATE usage_event SET endpoint_name = 'x' WHERE id = "
                 "(SELECT min(id) FROM usage_event)")  # fmt: skip
    with pytest.raises(NotWhatWasSealed, match="not those it was made of"):
        books.archive_before(START + OLD_DAYS * DAY)
    assert books.count("usage_event") == NUM_REQUESTS


async def test_what_the_archive_has_otherwise_is_not_deleted(books: Books) -> None:
    def crash(name: str) -> None:
        raise Reached(name)

    with observed(Countdown("usage_archive.after_rename", crash)), pytest.raises(Reached):
        books.archive_before(START + OLD_DAYS * DAY)
    books.tamper("UPDATE usage_event SET endpoint_name = 'x' WHERE id = "
                 "(SELECT min(id) FROM usage_event)")  # fmt: skip
    with pytest.raises(NotWhatWasSealed, match="than the database"):
        finish_dropping(books.engine, books.archive)
    assert books.count("usage_event") == NUM_REQUESTS


async def test_a_damaged_file_is_named_and_deletes_nothing(books: Books) -> None:
    books.archive_before(START + OLD_DAYS * DAY)
    path = books.archive.path(Span(1, 3))
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))
    problem = books.check().problem
    assert problem is not None
    assert path.name in problem
    with pytest.raises(DamagedArchive, match=path.name):
        list(books.archive.transactions(Span(1, 3)))
    path.write_bytes(b"something else")
    with pytest.raises(DamagedArchive, match="no file of archived usage"):
        list(books.archive.transactions(Span(1, 3)))


def change_header(content: bytes) -> bytes:
    return content[:60] + bytes([content[60] ^ 1]) + content[61:]


@pytest.mark.parametrize("damage", [change_header, lambda content: content[:1_000]])
async def test_a_damaged_file_takes_away_its_own_receipts_alone(
    books: Books, database: Database, damage: Callable[[bytes], bytes]
) -> None:
    books.archive_before(NOW)
    first, *_ = books.archive.spans()
    path = books.archive.path(first)
    path.write_bytes(damage(path.read_bytes()))
    books.archive = UsageArchive(books.archive.directory)
    books.records.archive = books.archive
    requests = requests_of(books)
    async with database.read() as session:
        for n, name in enumerate(requests[9:], 9):
            assert await books.records.receipt(session, owner(n), name)
            assert await books.records.proof(owner(n), name)
        for asked in (
            books.records.receipt(session, "org_1", requests[0]),
            books.records.proof("org_1", requests[0]),
        ):
            with pytest.raises(Unavailable, match=rf"archive file {path.name} is damaged") as said:
                await asked
            assert said.value.code == "archive_damaged"
            assert str(path.parent) not in said.value.message
    problem = books.check().problem
    assert problem is not None
    assert str(path) in problem
    check = SealWalk(books.engine, books.archive, books.key.public_hex).check()
    assert not check.is_clean
    assert str(path) in check.differences[0].note


async def test_a_file_that_cannot_be_read_is_as_a_damaged_one(books: Books) -> None:
    books.archive_before(NOW)
    path = books.archive.path(books.archive.spans()[0])
    path.unlink()
    path.mkdir()
    archive = UsageArchive(books.archive.directory)
    requests = requests_of(books)
    assert archive.find(requests[-1])
    with pytest.raises(Unavailable, match=path.name):
        archive.find(requests[0])
    problem = books.check().problem
    assert problem is not None
    assert f"{path} cannot be read: Is a directory" in problem


quantities = st.integers(0, 2**62)
lines = st.lists(
    st.tuples(
        st.sampled_from(["input", "output", "request", "device_ms"]),
        quantities,
        st.integers(0, 2**40),
        st.integers(1, 2**40),
        st.integers(-5, 2**62),
        st.sampled_from(["billed", "waived", "free"]),
    ),
    max_size=4,
).map(sorted)
instants = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
names = st.text(max_size=20)
request_ids = st.one_of(
    st.builds(
        lambda ms, random: id_with("req", ms, random),
        st.integers(0, 2**48 - 1),
        st.binary(min_size=10, max_size=10),
    ),
    names,
)
receipts = st.builds(
    ReceiptRecord,
    event_id=st.builds(lambda name, attempt: f"{name}:{attempt}", request_ids, st.integers(1, 9)),
    organization_id=names,
    api_key_id=names,
    api_key_name=names,
    endpoint_name=names,
    version_number=st.integers(0, 2**31),
    route=names,
    service_class=names,
    outcome=names,
    finish_reason=names,
    price_book_id=names,
    currency=names,
    amount_nano=st.integers(-(2**62), 2**62),
    started_at=instants.map(instant_text),
    finished_at=instants.map(instant_text),
    duration_ns=st.integers(-(2**62), 2**62),
    first_token_ns=st.one_of(st.none(), st.integers(0, 2**62)),
    lines=lines,
)


@hypothesis_settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names.filter(bool), st.lists(receipts, max_size=3)), max_size=4))
def test_a_file_gives_back_what_was_put_in(
    transactions: list[tuple[str, list[ReceiptRecord]]],
) -> None:
    writer = ArchiveWriter()
    for name, own in transactions:
        writer.add(name, own, merkle_root([receipt.canonical for receipt in own]))
    latest_at = instant_text(NOW)
    content = writer.finish(3, 7, latest_at)
    assert [tuple(each) for each in read_transactions(io.BytesIO(content))] == transactions
    event = 0
    for name, own in transactions:
        for _ in own:
            assert tuple(read_transaction_at(io.BytesIO(content), event)) == (name, own)
            event += 1
    header = read_header(io.BytesIO(content))
    assert (header.first_seal, header.last_seal, header.latest_at) == (3, 7, latest_at)
    assert header.num_events == sum(len(own) for _, own in transactions)


def test_no_byte_of_a_header_may_change() -> None:
    content = ArchiveWriter().finish(3, 7, instant_text(NOW))
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        with pytest.raises(DamagedArchive):
            list(read_transactions(io.BytesIO(bytes(damaged))))


# Files of seals 3 to 7 with one request, written in the first format (base 85 of zlib):
# without a SHA-256 of the header, and for a while with one.
WITHOUT_HASH = (
    "c-qa8TSyd97{_OJy^s*0l|gjT6FnrW&1GkHb|JN}hcJ9;6BS}SyXWksc4pR@GltrR1SLNDqR>Txw2X*~LMn-ZLeva;$g"
    "G#N2Z^4FB6_jx%+4Y{B-Mk^VPO8><@bI6Geck+8#XDkEf~jTd=bO2(_J8zG%cc97^Xl-^nnyyjsiZQ+nS2ou}&-y;@yy"
    "#P`6-|Bn{n7#!N#~HAe^JfS`yHAM`7V57;_MrhZp25K@zf=3_8rVIPPZDO+=fbpbjX85$)xA0RN2!VVo2d_aQ;tB`<@B"
    ")c|D9L34B<4dAtNC?)_#0^d+3|C+sCH1(gtpvS&P7-JmjF!ilhP|Q@*(P)@r#g<DvipIEaRTRZw5iR8^me2pw_T$Xh^j"
    "-KE*6DMcAFr{AOuhhV<;gg3cQFS5b?4U^wSrT#3&a*v`God3J)=rSP}gQNsw3kI4Dtw!#r^Q2*K2V;}!^<AXjoceZssD"
    ";<ymUS8>_X0y0eQu=PIzolPxNEtS08?_tW>QmV<`g)8$+KXdLFbKu5Q&#sEvM*DsIS>J^)NgLDYb-e?VpEC~^4jr$mUu"
    ";ZV9NkoRw7S1<_xf3`TG_BwG27*XHFZs6?|Qc1?Qh#zF;Np8_6|lo;nsR`@8$C?iSNy0dyZIB^E*18&Q;bH7mjOIgXF("
    "Fd+TGvBjNt_FE!&o%U)RC(|5iJhxeTge{ijyX9rk@iF93xjxa@wo@}zYWi|gSli&U1>(HlImMtxq9L~%Xn1h|{A34TtV"
    "T;+DSDW(IkYWB`CU5ES^o-_moAYm9YmTqsuI`c74+{T%m*-4xr^9UYdWT!z{2jwiWP8{W&#R$RqpLAaX4_m{`O5k)<al"
    "sL"
)
WITH_HASH = (
    "c-kvTEJ)2SEm0^fPE1c#FyvxjU_5iu!tr~5w&{(p3~9U{`V5^L3+_I#)mZT1n(>M1X-tmx)k<lZMa3oY#i@xoN>;`?N;"
    "!#ep1F=vUTJQ8YFTPtNwJcZA%t5}l$ckXm|T*Xp9c|4E6UG}&jqo~&CHD~j7<$KO)M;QluGkTGIOv=<fo*>XQlwf(-L!"
    "vQ+1S*^K(jbL55W;0nJXy&jso*&`~N$Ov*_G>9#b|QOZqBNsUh|QL-{MgE*roH90l20OT%HpmbtMNosCE34~Lgkq=>{="
    "A~rjr9;@o8NkqiGD{MRN>Wqc#ueq4A}LHMElLD=E*|6}kTfKKO7gQ)p<+Nqg{6r=-<4ECZO;XoP!gY)m<P1j*r*n4n~|"
    "xRl9f_QT54*dX-cB8k)d%)QeujsnW?1-kV-K%PButN0V=YvG_x>FOa(GiEsRZ4QcM#KElg4^O@W#WQVo?rF;bEWbO6Y;"
    "N=61oX1WH3KonwVWMyDrWnidh00vP?wG2?e=>6BcDk2KV`Y&|Tk%>W(Q4Gi~(SN%50mC$gwpa$I)u-B(wH(4qAEqCfI6"
    "I`IApcAOXXo^jA8L0!^~}=q{u7olXPbyisNJ-Qs=U_?>@4`DEQ-p^T<u*VcHe84-8`*OUh9N?@>1q`NlYOL-X&WuoEFd"
    "c9=TgHxcJlqxyr-$bsYrRkL4EonVKxPzW$}(UZWi=KiMDqr*O8Ixo+cEBOlw=kmnGm&SIR-$iR?PJvVs;1J@rWuwY~qF"
    "84Dsur?g{yySfvSg#n{$)&Yd*^1^>F%s0r08zpy$hdY{1PcxIFbrNjEdTePxta^nC(62Ed1N{b?P^$YZ6`bFb}=<|R)O"
    ">gGczwuxIvsA#uH#Qj6zITmeg#+r3WM;bKgY~Ssnn{n}6&"
)


@pytest.mark.parametrize("kept", [WITHOUT_HASH, WITH_HASH])
def test_both_forms_of_the_first_format_are_read(kept: str) -> None:
    content = zlib.decompress(base64.b85decode(kept))
    assert content.startswith(b"tapeout usage 1\n")
    header = read_header(io.BytesIO(content))
    assert (header.first_seal, header.last_seal, header.num_events) == (3, 7, 1)
    assert read_random(io.BytesIO(content)) == (331).to_bytes(RANDOM_BYTES)
    (transaction,) = read_transactions(io.BytesIO(content))
    (receipt,) = transaction.receipts
    assert (transaction.id, receipt.event_id) == ("lt_1", "req_01kdx4ww0000000000000000ab:1")
    assert receipt.lines == [("input", 100, 1000, 1000, 100, "billed")]


@pytest.mark.parametrize(
    ("kept", "part", "changed", "words"),
    [
        (WITH_HASH, b'"first_seal":3', b'"first_seal"\xff3', "the header is damaged"),
        (WITH_HASH, b'"first_seal":3', b'"first_seal":2', "the header is damaged"),
        (WITHOUT_HASH, b'"who":', b'"whn":', "the columns are not as the header says"),
        (WITHOUT_HASH, b'"random":10', b'"random":11', "the columns are not as the header says"),
    ],
)
def test_a_damaged_header_of_the_first_format_is_told_as_such(
    kept: str, part: bytes, changed: bytes, words: str
) -> None:
    content = zlib.decompress(base64.b85decode(kept))
    assert content.count(part) == 1
    with pytest.raises(DamagedArchive, match=words):
        list(read_transactions(io.BytesIO(content.replace(part, changed))))


def test_what_is_archived_until_when_is_kept_while_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = UsageArchive(tmp_path)
    archive.write(Span(1, 2), ArchiveWriter().finish(1, 2, instant_text(NOW)))
    assert archive.archived_until() == NOW
    os.utime(tmp_path, (0, 0))  # long ago
    assert archive.archived_until() == NOW
    with monkeypatch.context() as patched:
        patched.setattr(UsageArchive, "spans", lambda _: pytest.fail("looked at all files again"))
        assert archive.archived_until() == NOW
    archive.write(Span(3, 4), ArchiveWriter().finish(3, 4, instant_text(NOW + DAY)))
    assert archive.archived_until() == NOW + DAY


@given(st.integers(0, 2**48 - 1), st.binary(min_size=10, max_size=10))
def test_the_parts_of_an_id(made_ms: int, random: bytes) -> None:
    assert id_parts(id_with("req", made_ms, random), "req") == (made_ms, random)


@pytest.mark.parametrize(
    "text", ["", "req_", "req_1", "key_" + "0" * 26, "req_" + "8" + "0" * 25, "req_" + "u" * 26]
)
def test_other_text_is_no_id(text: str) -> None:
    assert id_parts(text, "req") is None
