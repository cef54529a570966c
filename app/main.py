"""The composition root: builds every part of the control plane once and ties them together.

Owns the order of start and stop. No other module constructs a part that another one uses.
"""

import asyncio
import gc
import logging
import signal
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from litestar import Litestar, Request, Response
from litestar.datastructures import State
from litestar.exceptions import HTTPException

import app.api.errors
import app.console.errors
from app import console
from app.api import (
    billing,
    budgets,
    credits,
    default_model,
    deployments,
    documentation,
    earnings,
    health,
    inference_v2,
    invoices,
    keys,
    members,
    messages,
    metrics,
    model_docs,
    models,
    notices,
    openai,
    optimisations,
    organization,
    payments,
    predict,
    prices,
    receipts,
    reconciliation,
    seals,
    uploads,
    usage,
)
from app.api.arriving import ArrivingBodies
from app.api.relay import Relay
from app.billing.accounts import AccountWriter
from app.billing.archiving import Archivist
from app.billing.clerk import Clerk
from app.billing.currency import require_currency
from app.billing.ledger import open_account
from app.billing.payments import invoice_ending
from app.billing.payments.calls import Calls
from app.billing.payments.invoice_books import refresh_invoice
from app.billing.payments.month_jobs import add_month_jobs
from app.billing.payments.service import Payments
from app.billing.prices import PriceTable
from app.billing.reconciliation import reconciler
from app.billing.records import Records
from app.billing.sealing import Sealer
from app.billing.sealing_key import open_sealing_key
from app.billing.usage_archive import UsageArchive
from app.core.broadcast import Broadcast
from app.core.claim import DatabaseClaim, DatabaseInUse
from app.core.database import Database, create_writer_engine
from app.core.errors import AppError
from app.core.lock import hold_data_dir
from app.core.migration import upgrade
from app.core.storage import Storage
from app.deployments.builder import Builder
from app.deployments.devices import Devices
from app.deployments.fleet import Fleet
from app.deployments.launchers.base import Launcher
from app.deployments.launchers.docker import DockerLauncher
from app.deployments.launchers.local import LocalLauncher
from app.deployments.optimiser import Optimiser
from app.metering.journal import Journal
from app.metering.meters import Meters
from app.organizations.keys import KeyRing
from app.organizations.service import bootstrap, default_organization_id
from app.organizations.signins import SignIns
from app.registry.uploads import UploadStore
from app.settings import Settings

EXPIRE_SECONDS = 3600
RENEW_SECONDS = 5.0

log = logging.getLogger(__name__)

Renderer = Callable[[Request[Any, Any, Any], Any], Response[Any]]


def create_app(settings: Settings, announce: Callable[[str], object] = log.info) -> Litestar:
    """The whole control plane of one box. It starts with the application's lifespan;
    `announce` then gets the lines a person should read: the address and the set-up link."""

    @asynccontextmanager
    async def lifespan(application: Litestar) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            await start(application.state, settings, announce, stack)
            yield

    return Litestar(
        route_handlers=[
            health.router,
            metrics.router,
            openai.router,
            messages.router,
            predict.router,
            inference_v2.router,
            model_docs.router,
            receipts.router,
            seals.router,
            usage.router,
            prices.router,
            uploads.router,
            models.router,
            optimisations.router,
            deployments.router,
            default_model.router,
            keys.router,
            members.router,
            organization.router,
            billing.router,
            billing.webhook_router,
            payments.router,
            budgets.router,
            invoices.router,
            credits.router,
            notices.router,
            reconciliation.router,
            earnings.router,
            documentation.router,
            console.router,
        ],
        lifespan=[lifespan],
        state=State({"settings": settings, "broadcast": Broadcast()}),
        exception_handlers=exception_handlers(),
        openapi_config=documentation.OPENAPI_CONFIG,
        request_max_body_size=settings.max_request_bytes,
        logging_config=None,  # whoever runs the application decides about logs
    )


async def start(
    state: State, settings: Settings, announce: Callable[[str], object], stack: AsyncExitStack
) -> None:
    """Starts every part in the order of dependence; `stack` stops them in reverse."""
    stack.enter_context(hold_data_dir(settings.data_dir))
    state.storage = storage = Storage(settings.data_dir)
    await claim_database(state, settings, stack)
    await asyncio.to_thread(migrate, settings)
    state.database = database = Database(settings.async_database_url)
    stack.push_async_callback(database.close)
    setup_token = await bootstrap(database, settings)
    async with database.write() as session:
        await require_currency(session, settings.currency)
        await open_account(session, await default_organization_id(session), settings.currency)

    state.key_ring = KeyRing(database)
    stack.push_async_callback(state.key_ring.close)
    state.sign_ins = SignIns(database, settings.session_days)
    state.uploads = UploadStore(database, storage, settings)
    state.arriving = ArrivingBodies(settings.max_request_bytes)
    await start_money(state, settings, stack)
    await start_records(state, settings, stack)
    await start_serving(state, settings, stack)
    await start_payments(state, settings, stack)
    await start_reconciling(state, settings, stack)
    start_clerk(state, settings, stack)
    stack.push_async_callback(stop_task, asyncio.create_task(expire_uploads(state.uploads)))

    stack.callback(state.broadcast.close)
    spare_the_collector(stack)
    announce(f"Tapeout is at {settings.url}")
    if setup_token is not None:
        announce(f"Set it up with this one-time link: {settings.url}/console/setup/{setup_token}")


async def claim_database(state: State, settings: Settings, stack: AsyncExitStack) -> None:
    """Before anything is read or written: a second app would take this one's builds, workers and
    set-up link for what a dead process left. Raises `DatabaseInUse`."""
    state.claim = claim = DatabaseClaim(settings.sync_database_url)
    stack.callback(claim.release)
    await asyncio.to_thread(claim.take)
    stack.push_async_callback(stop_task, asyncio.create_task(renew_claim(claim)))


async def renew_claim(claim: DatabaseClaim) -> None:
    """Takes the database again when its claim was lost with a connection. Ends this process when
    another one has it by then: two would undo each other's work."""
    while True:
        await asyncio.sleep(RENEW_SECONDS)
        try:
            await asyncio.to_thread(claim.renew)
        except DatabaseInUse as error:
            log.critical("this Tapeout ends, for it has lost its database: %s", error.message)
            signal.raise_signal(signal.SIGTERM)
            return
        except AppError as error:
            log.error("the claim on the database is lost for now: %s", error.message)


def spare_the_collector(stack: AsyncExitStack) -> None:
    """Takes all that was loaded so far out of garbage collection: going through it would stop
    every request for a tenth of a second, about once a second under load."""
    gc.collect()
    gc.freeze()
    stack.callback(gc.unfreeze)


async def start_money(state: State, settings: Settings, stack: AsyncExitStack) -> None:
    """Prices, journal, accounts and the relay; what an earlier process left is settled first."""
    state.prices = prices = PriceTable(state.database, settings.currency)
    await prices.start()
    stack.push_async_callback(prices.close)
    journal = Journal(state.storage.journal_dir)
    unsettled = await journal.start()
    stack.push_async_callback(journal.close)
    accounts = AccountWriter(
        settings.sync_database_url, currency=settings.currency, on_settled=journal.settled
    )
    await accounts.start(journal.id)
    stack.push_async_callback(accounts.close)
    state.journal, state.accounts = journal, accounts
    state.meters = meters = Meters()
    state.relay = relay = Relay(
        journal, prices, accounts, timeout_seconds=settings.request_timeout_seconds, meters=meters
    )
    await relay.recover(unsettled)
    stack.push_async_callback(relay.close)


async def start_records(state: State, settings: Settings, stack: AsyncExitStack) -> None:
    """What is signed, kept for good and read back: seals, the archive and receipts."""
    url = settings.sync_database_url
    key = await asyncio.to_thread(open_sealing_key, url, state.storage.receipt_key)
    archive = UsageArchive(state.storage.usage_archive)
    state.sealer = Sealer(url, key)
    state.archivist = Archivist(url, archive, settings.usage_detail_days, state.journal.sync)
    state.records = Records(url, archive, key.public_hex)
    for part in (state.sealer, state.archivist, state.records):
        stack.push_async_callback(part.close)


async def start_serving(state: State, settings: Settings, stack: AsyncExitStack) -> None:
    """The launcher and its users: workers of what is deployed, builds and optimisations of what is
    queued."""
    state.devices = Devices(settings.device)
    launcher = choose_launcher(settings, state.storage)
    stack.push_async_callback(launcher.close)
    parts = (state.database, state.storage, launcher, state.broadcast, settings)
    state.fleet = fleet = Fleet(*parts, state.journal.commit_step)
    await fleet.start()
    stack.push_async_callback(fleet.close, settings.drain_seconds)
    state.builder = builder = Builder(*parts)
    await builder.start()
    stack.push_async_callback(builder.close)
    state.optimiser = optimiser = Optimiser(*parts, fleet)
    await optimiser.start()
    stack.push_async_callback(optimiser.close)


def choose_launcher(settings: Settings, storage: Storage) -> Launcher:
    if settings.launcher == "docker":
        return DockerLauncher(storage, settings.launcher_socket)
    return LocalLauncher(storage)


async def start_payments(state: State, settings: Settings, stack: AsyncExitStack) -> None:
    """What an earlier process was asking of Stripe is taken up again."""
    calls = Calls()
    stack.callback(calls.close)

    async def follow_invoice(stripe_invoice_id: str) -> None:
        await refresh_invoice(state.database, payments.link.stripe, calls, stripe_invoice_id)

    kinds = invoice_ending.kinds()
    state.payments = payments = Payments(state.database, settings, kinds, follow_invoice)
    stack.push_async_callback(payments.close)
    await payments.resume()


async def start_reconciling(state: State, settings: Settings, stack: AsyncExitStack) -> None:
    """Over all that is started before, as it compares it."""
    state.reconciler = await reconciliation.make_reconciler(state, settings)
    stack.push_async_callback(state.reconciler.close)


def start_clerk(state: State, settings: Settings, stack: AsyncExitStack) -> None:
    """What is done about money beside the requests."""
    state.clerk = clerk = Clerk()
    clerk.add("seals", 5, state.sealer.turn)
    clerk.add("usage archive", 3600, state.archivist.turn)
    clerk.add("reconciliation", reconciler.SECONDS, state.reconciler.run)
    add_payment_jobs(clerk, state.payments)
    has_stripe = state.payments.is_configured
    add_month_jobs(clerk, state.database, settings.currency, has_stripe=has_stripe)
    clerk.start()
    stack.push_async_callback(clerk.close)


def add_payment_jobs(clerk: Clerk, payments: Payments) -> None:
    """Nothing on a box without Stripe."""
    if payments.is_configured:
        link = payments.link
        clerk.add("outbox", 5, link.outbox.turn)
        clerk.add("webhooks", 10, link.inbox.turn)
        clerk.add("missed webhooks", 600, link.inbox.backfill)
        clerk.add("recharging", 5, payments.recharge)


def migrate(settings: Settings) -> None:
    """Brings the schema up to date; blocks, so it runs in a thread."""
    engine = create_writer_engine(settings.sync_database_url)
    try:
        upgrade(engine)
    finally:
        engine.dispose()


async def expire_uploads(store: UploadStore) -> None:
    """Removes abandoned uploads, now and once an hour."""
    while True:
        try:
            await store.expire()
        except Exception:
            log.exception("abandoned uploads could not be removed")
        await asyncio.sleep(EXPIRE_SECONDS)


async def stop_task(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.wait([task])


def exception_handlers() -> dict[int | type[Exception], Any]:
    """Errors as pages where a person looks, as JSON everywhere else."""

    def choose(as_page: Renderer, as_json: Renderer) -> Renderer:
        def render(request: Request[Any, Any, Any], error: Any) -> Response[Any]:
            chosen = as_page if app.console.errors.is_page(request) else as_json
            return chosen(request, error)

        return render

    pages, answers = app.console.errors, app.api.errors
    return {
        AppError: choose(pages.render_app_error, answers.render_app_error),
        HTTPException: choose(pages.render_http_error, answers.render_http_error),
        Exception: choose(pages.render_unknown_error, answers.render_unknown_error),
    }
