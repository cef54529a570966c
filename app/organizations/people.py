"""People who sign in: the rules for e-mail addresses and passwords, and their accounts."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.core import clock
from app.core.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from app.core.ids import new_id
from app.core.security import hash_password, is_password_right
from app.organizations.tables import Invitation, Membership, SignIn, User

MIN_PASSWORD_CHARS = 10
MAX_PASSWORD_CHARS = 200
MAX_EMAIL_CHARS = 254
_EMAIL = re.compile(r"[^@\s]+@[^@\s]+")

# Argon2 takes 64 MiB a time; more at once than this would let strangers exhaust memory.
_hashing = ThreadPoolExecutor(2, thread_name_prefix="passwords")


def checked_email(email: str) -> str:
    """The address in the one spelling that is stored. Raises `InvalidRequest`."""
    email = email.strip().lower()
    if len(email) > MAX_EMAIL_CHARS or not _is_address(email):
        raise InvalidRequest("Enter an e-mail address such as ada@example.com.", param="email")
    return email


def _is_address(email: str) -> bool:
    """Whether it looks like one, and like itself: with what turns or hides text in it, it would
    look like somebody else's."""
    return email.isprintable() and _EMAIL.fullmatch(email) is not None


def check_password(password: str, email: str) -> None:
    """Raises `InvalidRequest` naming the rule that a new password breaks."""
    if len(password) < MIN_PASSWORD_CHARS:
        raise InvalidRequest(
            f"The password needs at least {MIN_PASSWORD_CHARS} characters.", param="password"
        )
    if len(password) > MAX_PASSWORD_CHARS:
        raise InvalidRequest(
            f"The password may have at most {MAX_PASSWORD_CHARS} characters.", param="password"
        )
    if len(set(password)) < 4 or password.lower() == email:
        raise InvalidRequest("This password is too easy to guess.", param="password")


async def create_person(
    session: AsyncSession, organization_id: str, email: str, password_hash: str, role: str
) -> User:
    """A new account with its membership. Raises `Conflict` if the address is taken."""
    user = User(id=new_id("user"), email=email, password_hash=password_hash, created_at=clock.now())
    session.add(user)
    try:
        await session.flush()
    except IntegrityError:
        raise Conflict(
            "There is already an account with this e-mail address.", param="email"
        ) from None
    session.add(
        Membership(
            id=new_id("member"),
            user_id=user.id,
            organization_id=organization_id,
            role=role,
            created_at=clock.now(),
        )
    )
    await session.flush()
    return user


async def reset_password(session: AsyncSession, email: str, password_hash: str) -> None:
    """A new password for somebody, whose every session ends, and every invitation that was made in
    one: whoever had the old password may have kept its link. Raises `NotFound`."""
    user_id = await session.scalar(
        update(User)
        .where(User.email == email)
        .values(password_hash=password_hash)
        .returning(User.id)
    )
    if user_id is None:
        raise NotFound(f"Nobody signs in as {email}.", code="user_not_found")
    # In this order: who is inviting somebody keeps their session until the invitation is there.
    await session.execute(delete(SignIn).where(SignIn.user_id == user_id))
    await session.execute(delete(Invitation).where(Invitation.creator_id == user_id))


async def confirm_password(session: AsyncSession, recognised: User) -> None:
    """That somebody's password is still the one they were recognised by, which nobody changes
    before the end of the transaction. Raises `Unauthenticated`."""
    password_hash = await session.scalar(
        select(User.password_hash).where(User.id == recognised.id).with_for_update()
    )
    if password_hash != recognised.password_hash:
        raise Unauthenticated("The password was changed meanwhile. Sign in with the new one.")


async def num_people(session: AsyncSession) -> int:
    """How many accounts the box has."""
    return await session.scalar(select(func.count()).select_from(User)) or 0


async def hashed(password: str) -> str:
    """Argon2id of a password, in a thread."""
    return await asyncio.get_running_loop().run_in_executor(_hashing, hash_password, password)


async def is_right(user: User | None, password: str) -> bool:
    """Whether it is this person's password; takes as long when there is no such person."""
    loop = asyncio.get_running_loop()
    password_hash = user.password_hash if user else None
    return await loop.run_in_executor(_hashing, _is_right, password_hash, password)


def _is_right(password_hash: str | None, password: str) -> bool:
    nobody = _nobody_hash()
    password = password[: MAX_PASSWORD_CHARS + 1]
    return is_password_right(password_hash or nobody, password) and password_hash is not None


@cache
def _nobody_hash() -> str:
    """What the password of an unknown person is compared with."""
    return hash_password("nobody has this password")
