"""Browser sessions: signing in and out, the CSRF token, and the brake on guessing.

Setting and ending the cookie is the console's business; here are its name and its token.
"""

import hmac
from collections import OrderedDict
from datetime import timedelta

import msgspec
from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.database import Database
from app.core.errors import Forbidden, RateLimited, Unauthenticated
from app.core.ids import new_id
from app.core.security import new_token, token_hash
from app.organizations import people
from app.organizations.principal import SCOPES_BY_ROLE, Principal
from app.organizations.tables import Membership, Organization, SignIn, User

NUM_FREE_FAILURES = 5  # per address and e-mail
NUM_FREE_FAILURES_PER_ADDRESS = 20
MAX_WAIT_SECONDS = 900
MAX_REMEMBERED = 10_000
SECOND_NS = 1_000_000_000
COOKIE = "tapeout_session"


def host_cookie(name: str, *, is_https: bool) -> str:
    """With `__Host-` a browser takes the cookie from this very host over https alone."""
    return f"__Host-{name}" if is_https else name


class SignedIn(msgspec.Struct, frozen=True, kw_only=True):
    """A person's session. `token` goes into the cookie, `csrf_token` into every form."""

    token: str
    csrf_token: str
    email: str
    principal: Principal

    def require_csrf(self, csrf_token: str) -> None:
        """Raises `Forbidden` unless the form came from a page of this session."""
        if not hmac.compare_digest(self.csrf_token.encode(), csrf_token.encode()):
            raise Forbidden(
                "This form is out of date. Reload the page and send it again.", code="csrf"
            )


class SignIns:
    """Every browser session of the box."""

    def __init__(self, database: Database, session_days: int) -> None:
        self._database = database
        self._lifetime = timedelta(days=session_days)
        self._brake = Brake()

    async def sign_in(self, email: str, password: str, address: str) -> SignedIn:
        """A new session. Raises what `recognise` does, and `Forbidden` for who belongs to no
        organization any more."""
        return await self.open(await self.recognise(email, password, address))

    async def recognise(self, email: str, password: str, address: str) -> User:
        """Whose password it is. Raises `Unauthenticated`, which never says which of the two was
        wrong, or `RateLimited` after repeated failures from one address."""
        email = email.strip().lower()
        if len(email) > people.MAX_EMAIL_CHARS:  # nobody's
            raise _wrong()
        keys = {f"{address} {email}": NUM_FREE_FAILURES, address: NUM_FREE_FAILURES_PER_ADDRESS}
        # Counted before the answer is known: many guesses at once are braked like one by one.
        self._brake.attempt(keys)
        async with self._database.read() as session:
            user = await session.scalar(select(User).where(User.email == email))
        if not await people.is_right(user, password) or user is None:
            raise _wrong()
        self._brake.forgive(keys)
        return user

    async def open(self, user: User, organization_id: str | None = None) -> SignedIn:
        """A new session for someone who has just proved who they are, in one of their
        organizations: the one they have belonged to for longest, unless one is named. Raises
        `Unauthenticated` if their password was changed since."""
        token = new_token()
        moment = clock.now()
        async with self._database.write() as session:
            await people.confirm_password(session, user)
            await session.execute(delete(SignIn).where(SignIn.expires_at <= moment))
            organization_id = await _home(session, user.id, organization_id)
            session.add(
                SignIn(
                    id=new_id("signin"),
                    token_hash=token_hash(token),
                    csrf_token=new_token(),
                    user_id=user.id,
                    organization_id=organization_id,
                    created_at=moment,
                    expires_at=moment + self._lifetime,
                )
            )
        return await self.authenticate(token)

    async def authenticate(self, token: str) -> SignedIn:
        """The session behind a cookie. Raises `Unauthenticated` if it ended."""
        statement = (
            select(SignIn, User, Organization, Membership.role)
            .join(User, User.id == SignIn.user_id)
            .join(Organization, Organization.id == SignIn.organization_id)
            .join(
                Membership,
                (Membership.user_id == SignIn.user_id)
                & (Membership.organization_id == SignIn.organization_id),
            )
            .where(SignIn.token_hash == token_hash(token), SignIn.expires_at > clock.now())
        )
        async with self._database.read() as session:
            row = (await session.execute(statement)).one_or_none()
        if row is None:
            raise Unauthenticated("Sign in to go on.", code="signed_out")
        sign_in, user, organization, role = row
        principal = Principal(
            organization_id=organization.id,
            organization_name=organization.name,
            cache_salt=organization.cache_salt,
            is_operator=organization.is_operator,
            scopes=SCOPES_BY_ROLE[role],
            user_id=user.id,
            role=role,
            sign_in_id=sign_in.id,
        )
        return SignedIn(
            token=token, csrf_token=sign_in.csrf_token, email=user.email, principal=principal
        )

    async def switch(self, person: SignedIn, organization_id: str) -> None:
        """Takes the session to another organization of the person's; forms that are open are out
        of date then. Raises `Forbidden`."""
        user_id = person.principal.user_id
        assert user_id is not None, "a session is a person's"
        async with self._database.write() as session:
            await _home(session, user_id, organization_id)
            await session.execute(
                update(SignIn)
                .where(SignIn.token_hash == token_hash(person.token))
                .values(organization_id=organization_id, csrf_token=new_token())
            )

    async def change_password(self, user: User, token: str, password_hash: str) -> None:
        """Of somebody as they were recognised by the old one, from the session with `token`. Ends
        every other session of theirs, wherever it is. Raises `Unauthenticated` if the password
        was changed since."""
        async with self._database.write() as session:
            await people.confirm_password(session, user)
            await session.execute(
                update(User).where(User.id == user.id).values(password_hash=password_hash)
            )
            await session.execute(
                delete(SignIn).where(
                    SignIn.user_id == user.id, SignIn.token_hash != token_hash(token)
                )
            )

    async def sign_out(self, token: str) -> None:
        """Ends a session; the cookie is worthless from here on."""
        async with self._database.write() as session:
            await session.execute(delete(SignIn).where(SignIn.token_hash == token_hash(token)))


async def _home(session: AsyncSession, user_id: str, wanted: str | None) -> str:
    """The organization of a new session."""
    query = select(Membership.organization_id).where(Membership.user_id == user_id)
    if wanted is not None:
        query = query.where(Membership.organization_id == wanted)
    organization_id = await session.scalar(query.order_by(Membership.created_at).limit(1))
    if organization_id is None:
        raise Forbidden(
            "This account does not belong to the organization."
            if wanted
            else "This account belongs to no organization any more. Ask an owner of one for an "
            "invitation.",
            code="no_membership",
        )
    return organization_id


def _wrong() -> Unauthenticated:
    return Unauthenticated("The e-mail address or the password is wrong.", code="wrong_password")


class Brake:
    """Makes repeated failures wait: the first few are free, then the wait doubles each time.
    Kept in memory, for a bounded number of sources, of which it keeps no more than a hash."""

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, int]] = OrderedDict()  # count, free again at

    def attempt(self, keys: dict[str, int]) -> None:
        """Counts an attempt under each key, whose value is how many are free. Raises
        `RateLimited` while one of them has to wait, which then counts nothing."""
        keys = {token_hash(key): num_free for key, num_free in keys.items()}
        now_ns = clock.monotonic_ns()
        until_ns = max(self._failures.get(key, (0, 0))[1] for key in keys)
        if until_ns > now_ns:
            seconds = -(-(until_ns - now_ns) // SECOND_NS)
            raise RateLimited(
                f"Too many failed sign-ins. Try again in {seconds} seconds.",
                code="too_many_sign_ins",
                retry_after_seconds=seconds,
            )
        for key, num_free in keys.items():
            count = self._failures.pop(key, (0, 0))[0] + 1
            wait = min(2 ** min(count - num_free, 16), MAX_WAIT_SECONDS) if count >= num_free else 0
            self._failures[key] = (count, now_ns + wait * SECOND_NS)
        while len(self._failures) > MAX_REMEMBERED:
            self._failures.popitem(last=False)

    def forgive(self, keys: dict[str, int]) -> None:
        """Forgets what was counted, after a success."""
        for key in keys:
            self._failures.pop(token_hash(key), None)
