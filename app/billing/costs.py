"""What an hour of a device costs the operator: the only figure of cost that the box cannot
measure."""

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.billing.payments.tables import DeviceCost
from app.core import clock
from app.core.errors import InvalidRequest
from app.core.money import NANO_PER_UNIT, parse_amount

MS_PER_HOUR = 3_600_000
MAX_HOUR_NANO = 10**6 * NANO_PER_UNIT


async def device_hour_nano(session: AsyncSession, device: str) -> int | None:
    """None while the operator has not said it."""
    return await session.scalar(select(DeviceCost.hour_nano).where(DeviceCost.device == device))


async def set_device_hour(session: AsyncSession, device: str, hour_nano: int) -> None:
    """Raises `InvalidRequest`."""
    if not 0 <= hour_nano <= MAX_HOUR_NANO:
        raise InvalidRequest("An hour of a device costs 0 to a million.", param="hour_nano")
    row = await session.get(DeviceCost, device)
    if row is None:
        session.add(DeviceCost(device=device, hour_nano=hour_nano, updated_at=clock.now()))
    else:
        row.hour_nano, row.updated_at = hour_nano, clock.now()


def parse_hour(text: str) -> int:
    """Nano-units from an amount as people write it. Raises `InvalidRequest`."""
    try:
        return parse_amount(text)
    except ValueError as error:
        raise InvalidRequest(f"The price of an hour is {error}.", param="hour") from None


def cost_of(device_ms: int, hour_nano: int) -> int:
    """Nano-units of device time, rounded down."""
    return device_ms * hour_nano // MS_PER_HOUR
