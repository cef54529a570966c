"""Browser sessions, and the brake on guessing passwords."""

from datetime import timedelta

import pytest
from sqlalchemy import select

from app.core import clock
from app.core.database import Database
from app.core.errors import Forbidden, RateLimited, Unauthenticated
from app.organizations import people, signins
from app.organizations.principal import SCOPES
from app.organizations.service import bootstrap, redeem_setup
from app.organizations.signins import Brake, SignIns
from app.organizations.tables import Membership, SignIn
from app.settings import Settings

EMAIL, PASSWORD = "ada@example.com", "correct horse battery"


@pytest.fixture
async def sign_ins(database: Database, settings: Settings) -> SignIns:
    token = await bootstrap(database, settings)
    assert token is not None
    async with database.write() as session:
        await redeem_setup(session, token, EMAIL, PASSWORD)
    return SignIns(database, session_days=14)


async def test_sign_in_and_out(sign_ins: SignIns, database: Database) -> None:
    person = await sign_ins.sign_in(" ADA@example.com", PASSWORD, "10.0.0.1")
    again = await sign_ins.authenticate(person.token)
    assert again == person
    assert again.email == EMAIL
    assert again.principal.scopes == SCOPES
    assert (again.principal.role, again.principal.api_key_name) == ("owner", "console")
    assert again.principal.user_id
    async with database.read() as session:
        row = await session.scalar(select(SignIn))
    assert row is not None
    assert person.token not in (row.id, row.token_hash, row.csrf_token)
    await sign_ins.sign_out(person.token)
    with pytest.raises(Unauthenticated):
        await sign_ins.authenticate(person.token)


async def test_each_sign_in_has_a_token_of_its_own(sign_ins: SignIns) -> None:
    first = await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    second = await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    assert first.token != second.token
    assert first.csrf_token != second.csrf_token
    first.require_csrf(first.csrf_token)
    for wrong in (second.csrf_token, "", "ü"):
        with pytest.raises(Forbidden):
            first.require_csrf(wrong)


async def test_a_session_ends(
    sign_ins: SignIns, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    person = await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    later = clock.now() + timedelta(days=14)
    monkeypatch.setattr(clock, "now", lambda: later)
    with pytest.raises(Unauthenticated):
        await sign_ins.authenticate(person.token)
    await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    async with database.read() as session:
        assert len(list(await session.scalars(select(SignIn)))) == 1  # old ones are swept


async def test_a_lost_membership_ends_the_session(sign_ins: SignIns, database: Database) -> None:
    person = await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    async with database.write() as session:
        membership = await session.scalar(select(Membership))
        await session.delete(membership)
    with pytest.raises(Unauthenticated):
        await sign_ins.authenticate(person.token)
    with pytest.raises(Forbidden):
        await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")


async def test_wrong_password_and_unknown_person_read_alike_and_take_alike(
    sign_ins: SignIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []
    is_password_right = people.is_password_right

    def compare(password_hash: str, password: str) -> bool:
        compared.append(password_hash)
        return is_password_right(password_hash, password)

    monkeypatch.setattr(people, "is_password_right", compare)
    messages: set[str] = set()
    for email in (EMAIL, "nobody@example.com"):
        with pytest.raises(Unauthenticated) as caught:
            await sign_ins.sign_in(email, "wrong password", "10.0.0.1")
        messages.add(caught.value.message)
    assert len(messages) == 1
    assert len(compared) == 2
    assert all(password_hash.startswith("$argon2id$") for password_hash in compared)


async def test_guessing_is_braked_per_address(
    sign_ins: SignIns, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_ns = 10**12
    monkeypatch.setattr(clock, "monotonic_ns", lambda: now_ns)
    for _ in range(signins.NUM_FREE_FAILURES):
        with pytest.raises(Unauthenticated):
            await sign_ins.sign_in(EMAIL, "wrong password", "10.0.0.1")
    with pytest.raises(RateLimited) as caught:
        await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    assert caught.value.retry_after_seconds == 1
    await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.2")  # the person elsewhere is not locked out
    now_ns += 2 * 10**9
    await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    with pytest.raises(Unauthenticated):  # a success forgets the failures
        await sign_ins.sign_in(EMAIL, "wrong password", "10.0.0.1")


def test_the_wait_doubles_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now_ns = 10**12
    monkeypatch.setattr(clock, "monotonic_ns", lambda: now_ns)
    brake = Brake()
    waits: list[int | None] = []
    brake.attempt({"a": 2})
    for _ in range(13):
        brake.attempt({"a": 2})
        with pytest.raises(RateLimited) as caught:
            brake.attempt({"a": 2})
        waits.append(caught.value.retry_after_seconds)
        now_ns += (caught.value.retry_after_seconds or 0) * 10**9
    assert waits[:5] == [1, 2, 4, 8, 16]
    assert waits[-1] == signins.MAX_WAIT_SECONDS


def test_the_brake_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signins, "MAX_REMEMBERED", 10)
    brake = Brake()
    for number in range(100):
        brake.attempt({str(number): 5})
    assert len(brake._failures) == 10


async def test_the_brake_keeps_nothing_of_what_strangers_send(sign_ins: SignIns) -> None:
    for email in ("a" * 1_000_000, "a" * 200, EMAIL):
        with pytest.raises(Unauthenticated, match="is wrong"):
            await sign_ins.sign_in(email, "wrong password", "10.0.0.1" * 30)
    kept = sign_ins._brake._failures
    assert len(kept) == 3  # two addresses that somebody could have, and where they came from
    assert {len(key) for key in kept} == {64}


async def test_a_password_that_is_replaced_meanwhile_lets_nobody_in(
    sign_ins: SignIns, database: Database
) -> None:
    """Neither who was signing in with the old one, nor who was changing it."""
    thief = await sign_ins.sign_in(EMAIL, PASSWORD, "10.0.0.1")
    recognised = await sign_ins.recognise(EMAIL, PASSWORD, "10.0.0.1")
    async with database.write() as session:
        await people.reset_password(session, EMAIL, await people.hashed("four random words"))
    with pytest.raises(Unauthenticated):
        await sign_ins.open(recognised)
    with pytest.raises(Unauthenticated):
        await sign_ins.change_password(recognised, thief.token, await people.hashed("thief's own"))
    assert (await sign_ins.sign_in(EMAIL, "four random words", "10.0.0.2")).email == EMAIL
    async with database.read() as session:
        assert len((await session.scalars(select(SignIn))).all()) == 1
