"""Members, their roles, and the one-time links that let people in."""

import asyncio
from datetime import datetime, timedelta

import pytest
from sqlalchemy import select

from app.core import clock
from app.core.database import Database
from app.core.errors import Conflict, Forbidden, InvalidRequest, NotFound, Unauthenticated
from app.organizations import invitations, members, people
from app.organizations.invitations import invite, invite_owner, redeem, revoke_invitation
from app.organizations.keys import KeyRing, create_key, create_key_by, revoke_key
from app.organizations.members import change_role, leave, list_members, remove_member
from app.organizations.principal import SCOPES, Principal
from app.organizations.service import bootstrap, create_organization, redeem_setup
from app.organizations.signins import SignedIn, SignIns
from app.organizations.tables import Invitation, User
from app.settings import Settings

OWNER, PASSWORD = "ada@example.com", "correct horse battery"
HERE = "10.0.0.1"


@pytest.fixture
async def sign_ins(database: Database, settings: Settings) -> SignIns:
    token = await bootstrap(database, settings)
    assert token is not None
    async with database.write() as session:
        await redeem_setup(session, token, OWNER, PASSWORD)
    return SignIns(database, session_days=14)


@pytest.fixture
async def owner(sign_ins: SignIns) -> SignedIn:
    return await sign_ins.sign_in(OWNER, PASSWORD, HERE)


async def invited(database: Database, by: Principal, role: str, hours: int = 1) -> str:
    async with database.write() as session:
        _, token = await invite(session, by, role, "somebody", hours)
    return token


async def joined(
    database: Database, sign_ins: SignIns, by: Principal, role: str, email: str
) -> SignedIn:
    token = await invited(database, by, role)
    user = await redeem(database, sign_ins, token, email, PASSWORD, HERE)
    return await sign_ins.open(user, by.organization_id)


async def key_of(
    database: Database, organization_id: str, *scopes: str, expires_at: datetime | None = None
) -> Principal:
    async with database.write() as session:
        given = frozenset(scopes) or SCOPES
        _, secret = await create_key(session, organization_id, "leaked", given, expires_at)
    return await KeyRing(database).authenticate(secret)


async def test_a_link_lets_one_person_in(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    token = await invited(database, owner.principal, "viewer")
    async with database.read() as session:
        assert (await invitations.find_invited(session, token)).role == "viewer"
        row = await session.scalar(select(Invitation))
        assert row is not None
        assert token not in (row.id, row.token_hash)
        assert row.created_by == OWNER
    results = await asyncio.gather(
        redeem(database, sign_ins, token, "bob@example.com", PASSWORD, HERE),
        redeem(database, sign_ins, token, "eve@example.com", PASSWORD, HERE),
        return_exceptions=True,
    )
    assert sorted(type(result).__name__ for result in results) == ["Forbidden", "User"]
    async with database.read() as session:
        found = await list_members(session, owner.principal.organization_id)
        assert [member.role for member in found] == ["owner", "viewer"]
        assert len((await session.scalars(select(User))).all()) == 2
        with pytest.raises(Forbidden, match="was used"):
            await invitations.find_invited(session, token)


async def test_what_breaks_a_rule_leaves_the_link(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    token = await invited(database, owner.principal, "member")
    for email, password, param in (
        ("nobody", PASSWORD, "email"),
        ("bob@example.com", "short", "password"),
        (OWNER, "not the password", "password"),
    ):
        with pytest.raises(InvalidRequest) as refusal:
            await redeem(database, sign_ins, token, email, password, HERE)
        assert refusal.value.param == param
    with pytest.raises(Conflict, match="already"):
        await redeem(database, sign_ins, token, OWNER, PASSWORD, HERE)
    await redeem(database, sign_ins, token, "bob@example.com", PASSWORD, HERE)


async def test_a_link_ends(
    database: Database, sign_ins: SignIns, owner: SignedIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, revoked = [await invited(database, owner.principal, "member") for _ in range(2)]
    async with database.write() as session:
        first, *_ = await invitations.list_invitations(session, owner.principal.organization_id)
        await revoke_invitation(session, owner.principal, first.id)
    with pytest.raises(Forbidden):
        await redeem(database, sign_ins, revoked, "bob@example.com", PASSWORD, HERE)
    moment = clock.now() + timedelta(hours=2)
    monkeypatch.setattr(clock, "now", lambda: moment)
    with pytest.raises(Forbidden):
        await redeem(database, sign_ins, late, "bob@example.com", PASSWORD, HERE)
    async with database.write() as session:
        assert await invitations.list_invitations(session, owner.principal.organization_id) == []
        with pytest.raises(NotFound):
            await revoke_invitation(session, owner.principal, first.id)


async def test_membership_ends_with_its_sessions(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    bob = await joined(database, sign_ins, owner.principal, "member", "bob@example.com")
    assert bob.principal.user_id is not None
    async with database.write() as session:
        await change_role(session, owner.principal, bob.principal.user_id, "viewer")
    again = await sign_ins.authenticate(bob.token)
    assert again.principal.scopes == {"read"}
    async with database.write() as session:
        await remove_member(session, owner.principal, bob.principal.user_id)
    with pytest.raises(Unauthenticated):
        await sign_ins.authenticate(bob.token)
    with pytest.raises(Forbidden, match="no organization any more"):
        await sign_ins.sign_in("bob@example.com", PASSWORD, HERE)
    # The account stays: another link lets it in again, with its password.
    await joined(database, sign_ins, owner.principal, "member", "bob@example.com")


async def test_the_last_owner_stays(database: Database, sign_ins: SignIns, owner: SignedIn) -> None:
    me = owner.principal
    assert me.user_id is not None
    async with database.write() as session:
        for attempt in (
            leave(session, me),
            remove_member(session, me, me.user_id),
            change_role(session, me, me.user_id, "admin"),
        ):
            with pytest.raises(Conflict, match="last owner"):
                await attempt
    other = (await joined(database, sign_ins, me, "owner", "bob@example.com")).principal
    assert other.user_id is not None

    async def remove(by: Principal, user_id: str) -> None:
        async with database.write() as session:
            await remove_member(session, by, user_id)

    results = await asyncio.gather(
        remove(me, other.user_id), remove(other, me.user_id), return_exceptions=True
    )
    assert [type(result) for result in results if result is not None] == [Forbidden]


async def test_owners_are_made_and_unmade_by_owners(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    me = owner.principal
    admin = (await joined(database, sign_ins, me, "admin", "bob@example.com")).principal
    member = (await joined(database, sign_ins, me, "member", "eve@example.com")).principal
    assert me.user_id is not None
    assert admin.user_id is not None
    assert member.user_id is not None
    key = await key_of(database, me.organization_id)
    async with database.write() as session:
        for by in (admin, key):
            for attempt in (
                remove_member(session, by, me.user_id),
                change_role(session, by, me.user_id, "viewer"),
                change_role(session, by, member.user_id, "owner"),
                invite(session, by, "owner", "", 1),
            ):
                with pytest.raises(Forbidden, match="Only an owner"):
                    await attempt
        for attempt in (
            remove_member(session, member, admin.user_id),
            change_role(session, member, member.user_id, "admin"),
            invite(session, member, "viewer", "", 1),
        ):
            with pytest.raises(Forbidden):
                await attempt
        await change_role(session, admin, member.user_id, "admin")
        with pytest.raises(InvalidRequest):
            await change_role(session, me, member.user_id, "emperor")


async def test_a_key_lets_the_first_owner_in(database: Database, sign_ins: SignIns) -> None:
    async with database.write() as session:
        made = await create_organization(session, "acme")
    key = await key_of(database, made.id)
    token = await invited(database, key, "owner")
    await redeem(database, sign_ins, token, "boss@acme.example", PASSWORD, HERE)
    with pytest.raises(Forbidden):
        await invited(database, key, "owner")


async def test_links_of_who_is_removed_or_demoted_end(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    bob = (await joined(database, sign_ins, owner.principal, "admin", "bob@example.com")).principal
    assert bob.user_id is not None
    kept = await invited(database, owner.principal, "member")
    for end in ("demoted", "removed"):
        async with database.write() as session:
            await change_role(session, owner.principal, bob.user_id, "admin")
        token = await invited(database, bob, "admin")
        async with database.write() as session:
            if end == "demoted":
                await change_role(session, owner.principal, bob.user_id, "viewer")
            else:
                await remove_member(session, owner.principal, bob.user_id)
        with pytest.raises(Forbidden):
            await redeem(database, sign_ins, token, "x@example.com", PASSWORD, HERE)
    await redeem(database, sign_ins, kept, "x@example.com", PASSWORD, HERE)


async def test_links_of_whose_password_is_replaced_end(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    bob = (await joined(database, sign_ins, owner.principal, "admin", "bob@example.com")).principal
    kept = await invited(database, owner.principal, "member")
    async with database.write() as session:
        acme = await create_organization(session, "acme")
        _, there = await invite_owner(session, bob, acme.id, "")
    made = [await invited(database, bob, "admin"), there]
    async with database.write() as session:
        await people.reset_password(session, "bob@example.com", await people.hashed(PASSWORD))
    for token in made:
        with pytest.raises(Forbidden):
            await redeem(database, sign_ins, token, "x@example.com", PASSWORD, HERE)
    await redeem(database, sign_ins, kept, "x@example.com", PASSWORD, HERE)


async def test_links_into_other_organizations_end_with_an_operator(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    bob = (await joined(database, sign_ins, owner.principal, "admin", "bob@example.com")).principal
    assert bob.user_id is not None
    async with database.write() as session:
        made = [
            await invite_owner(session, by, (await create_organization(session, name)).id, "")
            for name, by in (("acme", bob), ("zenith", owner.principal))
        ]
        await remove_member(session, owner.principal, bob.user_id)
    lost, kept = (token for _, token in made)
    with pytest.raises(Forbidden):
        await redeem(database, sign_ins, lost, "bob@example.com", PASSWORD, HERE)
    await redeem(database, sign_ins, kept, "x@example.com", PASSWORD, HERE)


async def test_the_operator_lets_in_the_first_owner_of_others_alone(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    """Not one of its own, which an administrator could be then, nor a second one."""
    me = owner.principal
    bob = (await joined(database, sign_ins, me, "admin", "bob@example.com")).principal
    async with database.write() as session:
        acme = await create_organization(session, "acme")
        with pytest.raises(Forbidden, match="Only an owner"):
            await invite_owner(session, bob, me.organization_id, "")
        with pytest.raises(NotFound):
            await invite_owner(session, bob, "org_none", "")
        _, lost = await invite_owner(session, bob, acme.id, "")
        _, token = await invite_owner(session, bob, acme.id, "")
    with pytest.raises(Forbidden):
        await redeem(database, sign_ins, lost, "x@example.com", PASSWORD, HERE)
    boss = await redeem(database, sign_ins, token, "boss@acme.example", PASSWORD, HERE)
    theirs = (await sign_ins.open(boss)).principal
    async with database.write() as session:
        for by in (bob, me):
            with pytest.raises(Conflict, match="reset-password"):
                await invite_owner(session, by, acme.id, "")
        with pytest.raises(Forbidden, match="operates this box"):
            await invite_owner(session, theirs, me.organization_id, "")
        await invite_owner(session, me, me.organization_id, "")


async def test_links_end_with_the_key_that_made_them(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    organization_id = owner.principal.organization_id
    tomorrow = clock.now() + timedelta(days=1)
    key = await key_of(database, organization_id, expires_at=tomorrow)
    async with database.write() as session:
        invitation, token = await invite(session, key, "admin", "", 720)
        assert invitation.expires_at == tomorrow
        await revoke_key(session, organization_id, key.api_key_id)
    with pytest.raises(Forbidden):
        await redeem(database, sign_ins, token, "x@example.com", PASSWORD, HERE)


async def test_a_key_makes_nothing_that_may_do_more(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    organization_id = owner.principal.organization_id
    bob = (await joined(database, sign_ins, owner.principal, "viewer", "bob@example.com")).principal
    assert bob.user_id is not None
    tomorrow = clock.now() + timedelta(days=1)
    key = await key_of(database, organization_id, "admin", "read", expires_at=tomorrow)
    async with database.write() as session:
        for attempt in (
            invite(session, key, "member", "", 1),
            change_role(session, key, bob.user_id, "admin"),
            create_key_by(session, key, "more", SCOPES),
        ):
            with pytest.raises(Forbidden, match="lack"):
                await attempt
        await invite(session, key, "viewer", "", 1)
        made, _ = await create_key_by(session, key, "as long", frozenset({"read"}))
        assert made.expires_at == tomorrow
        late = tomorrow + timedelta(hours=1)
        with pytest.raises(InvalidRequest, match="Your own key expires"):
            await create_key_by(session, key, "longer", frozenset({"read"}), late)


async def test_nobody_acts_on_rights_that_are_gone(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    bob = (await joined(database, sign_ins, owner.principal, "admin", "bob@example.com")).principal
    me, organization_id = owner.principal.user_id, owner.principal.organization_id
    key = await key_of(database, organization_id)
    left, moved = [await sign_ins.sign_in(OWNER, PASSWORD, HERE) for _ in range(2)]
    assert bob.user_id is not None
    assert me is not None
    async with database.write() as session:
        await remove_member(session, owner.principal, bob.user_id)
        await revoke_key(session, organization_id, key.api_key_id)
        acme = await create_organization(session, "acme")
        _, token = await invite_owner(session, owner.principal, acme.id, "")
    await redeem(database, sign_ins, token, OWNER, PASSWORD, HERE)
    await sign_ins.switch(moved, acme.id)
    await sign_ins.sign_out(left.token)
    async with database.write() as session:
        for by, refused in (
            (bob, Forbidden),
            (key, Unauthenticated),
            (left.principal, Unauthenticated),
            (moved.principal, Unauthenticated),
        ):
            for attempt in (
                invite(session, by, "admin", "", 1),
                create_key_by(session, by, "back door", SCOPES),
                change_role(session, by, me, "viewer"),
                remove_member(session, by, me),
                revoke_invitation(session, by, "invite_x"),
            ):
                with pytest.raises(refused):
                    await attempt


async def test_a_person_moves_between_organizations(
    database: Database, sign_ins: SignIns, owner: SignedIn
) -> None:
    async with database.write() as session:
        acme = await create_organization(session, "acme")
        stranger = await create_organization(session, "stranger")
        boss = await people.create_person(
            session, acme.id, "boss@acme.example", await people.hashed(PASSWORD), "owner"
        )
    by = (await sign_ins.open(boss)).principal
    there = await joined(database, sign_ins, by, "viewer", OWNER)
    assert there.principal.organization_id == acme.id
    assert (await sign_ins.authenticate(owner.token)).principal.role == "owner"
    await sign_ins.switch(owner, acme.id)
    moved = await sign_ins.authenticate(owner.token)
    assert (moved.principal.organization_id, moved.principal.role) == (acme.id, "viewer")
    assert moved.csrf_token != owner.csrf_token
    with pytest.raises(Forbidden):
        await sign_ins.switch(moved, stranger.id)
    async with database.read() as session:
        found = await members.list_belongings(session, boss.id)
        assert [each.organization_name for each in found] == ["acme"]
    async with database.write() as session:
        await leave(session, moved.principal)
    home = await sign_ins.sign_in(OWNER, PASSWORD, HERE)
    assert home.principal.role == "owner"


@pytest.mark.parametrize(("note", "hours"), [("x" * 81, 1), ("a\nb", 1), ("", 0), ("", 721)])
async def test_an_invitation_is_checked(
    database: Database, owner: SignedIn, note: str, hours: int
) -> None:
    async with database.write() as session:
        with pytest.raises(InvalidRequest):
            await invite(session, owner.principal, "member", note, hours)


@pytest.mark.parametrize(
    "email",
    [
        "ada",
        "a@b@c",
        "a @b",
        "ada@exa\u202emple.com",
        "ada\u200b@example.com",
        "a@b\x7f",
        "a@" * 200,
    ],
)
def test_an_address_reads_like_itself(email: str) -> None:
    with pytest.raises(InvalidRequest):
        people.checked_email(email)
    assert people.checked_email(" Ädà@bücher.example ") == "ädà@bücher.example"
