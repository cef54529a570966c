"""money"""

import hashlib
import json

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from app.core.database import UtcDateTime

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# What makes a new row of an append-only table take the place of an old one, see `refuse_changes`.
APPEND_ONLY = {
    "ledger_transaction": "id = NEW.id OR idempotency_key = NEW.idempotency_key",
    "ledger_entry": "(transaction_id = NEW.transaction_id AND account = NEW.account)",
    "seal": "number = NEW.number OR sha256 = NEW.sha256",
    "sealed_transaction": "ledger_transaction_id = NEW.ledger_transaction_id"
    " OR (seal_number = NEW.seal_number AND position = NEW.position)",
    "lot_use": "(ledger_transaction_id = NEW.ledger_transaction_id AND lot_id = NEW.lot_id)",
}
# What may be added to while its transaction waits for its seal, and the column that names it.
ACTIONS = ("update", "delete", "replace")
UNTIL_SEALED = {"ledger_entry": "transaction_id", "lot_use": "ledger_transaction_id"}
SERIES_COLUMNS = (
    "e.organization_id",
    "e.api_key_id",
    "e.endpoint_name",
    "e.version_number",
    "e.service_class",
    "l.dimension",
    "l.disposition",
    "e.price_book_id",
    "l.price_nano",
    "l.unit_scale",
)


def upgrade() -> None:
    op.create_table(
        "billing_profile",
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("stripe_customer_id", sa.String(length=255), nullable=True),
        sa.Column("payment_method_id", sa.String(length=255), nullable=True),
        sa.Column("card_label", sa.String(length=80), nullable=False),
        sa.Column("recharge_below_nano", sa.BigInteger(), nullable=True),
        sa.Column("recharge_cents", sa.BigInteger(), nullable=True),
        sa.Column("recharge_paused", sa.String(length=200), nullable=False),
        sa.Column("low_balance_nano", sa.BigInteger(), nullable=True),
        sa.Column("notify_url", sa.String(length=500), nullable=False),
        sa.Column("notify_secret", sa.String(length=80), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("organization_id", name=op.f("pk_billing_profile")),
        sa.UniqueConstraint(
            "stripe_customer_id", name=op.f("uq_billing_profile_stripe_customer_id")
        ),
    )
    op.create_table(
        "budget",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("subject_name", sa.String(length=80), nullable=False),
        sa.Column("period", sa.String(length=8), nullable=False),
        sa.Column("limit_nano", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("period IN ('day', 'month')", name=op.f("ck_budget_period")),
        sa.CheckConstraint(
            "scope IN ('organization', 'key', 'model')", name=op.f("ck_budget_scope")
        ),
        sa.CheckConstraint(
            "limit_nano BETWEEN 0 AND 4000000000000000000", name=op.f("ck_budget_limit")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_budget")),
        sa.UniqueConstraint(
            "organization_id",
            "scope",
            "subject",
            "period",
            name=op.f("uq_budget_organization_id_scope_subject_period"),
        ),
    )
    op.create_table(
        "budget_window",
        sa.Column("budget_id", sa.String(length=40), nullable=False),
        sa.Column("starts_on", sa.String(length=10), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("limit_nano", sa.BigInteger(), nullable=False),
        sa.Column("posted_nano", sa.BigInteger(), nullable=False),
        sa.Column("held_nano", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "held_nano = 0 OR posted_nano + held_nano <= limit_nano",
            name=op.f("ck_budget_window_limit"),
        ),
        sa.CheckConstraint(
            "held_nano BETWEEN 0 AND 4000000000000000000", name=op.f("ck_budget_window_held")
        ),
        sa.CheckConstraint(
            "posted_nano BETWEEN 0 AND 4000000000000000000", name=op.f("ck_budget_window_posted")
        ),
        sa.PrimaryKeyConstraint("budget_id", "starts_on", name=op.f("pk_budget_window")),
    )
    op.create_table(
        "credit_lot",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("amount_nano", sa.BigInteger(), nullable=False),
        sa.Column("remaining_nano", sa.BigInteger(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("source", sa.String(length=120), nullable=False),
        sa.Column("note", sa.String(length=200), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("kind IN ('paid', 'promotional')", name=op.f("ck_credit_lot_kind")),
        sa.CheckConstraint(
            "amount_nano BETWEEN 0 AND 4000000000000000000", name=op.f("ck_credit_lot_amount")
        ),
        sa.CheckConstraint(
            "remaining_nano BETWEEN 0 AND amount_nano", name=op.f("ck_credit_lot_remaining")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credit_lot")),
        sa.UniqueConstraint("source", name=op.f("uq_credit_lot_source")),
    )
    with op.batch_alter_table("credit_lot", schema=None) as batch_op:
        batch_op.create_index(
            "ix_credit_lot_organization_id_remaining_nano",
            ["organization_id", "remaining_nano"],
            unique=False,
        )

    op.create_table(
        "device_cost",
        sa.Column("device", sa.String(length=80), nullable=False),
        sa.Column("hour_nano", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_device_cost")),
    )
    op.create_table(
        "hold_window",
        sa.Column("request_id", sa.String(length=40), nullable=False),
        sa.Column("budget_id", sa.String(length=40), nullable=False),
        sa.Column("starts_on", sa.String(length=10), nullable=False),
        sa.Column("amount_nano", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("request_id", "budget_id", name=op.f("pk_hold_window")),
    )
    op.create_table(
        "invoice",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("organization_name", sa.String(length=80), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("usage_nano", sa.BigInteger(), nullable=False),
        sa.Column("credit_nano", sa.BigInteger(), nullable=False),
        sa.Column("carry_in_nano", sa.BigInteger(), nullable=False),
        sa.Column("due_cents", sa.BigInteger(), nullable=False),
        sa.Column("carry_out_nano", sa.BigInteger(), nullable=False),
        sa.Column("stripe_invoice_id", sa.String(length=255), nullable=True),
        sa.Column("hosted_url", sa.Text(), nullable=True),
        sa.Column("error", sa.String(length=300), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("paid_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint(
            "state IN ('frozen', 'pushed', 'finalised', 'paid', 'past_due', 'uncollectible', 'void', 'differs', 'settled')",
            name=op.f("ck_invoice_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invoice")),
        sa.UniqueConstraint("number", name=op.f("uq_invoice_number")),
        sa.UniqueConstraint("stripe_invoice_id", name=op.f("uq_invoice_stripe_invoice_id")),
    )
    with op.batch_alter_table("invoice", schema=None) as batch_op:
        batch_op.create_index(
            "uq_invoice_organization_id_period", ["organization_id", "period"], unique=True
        )

    op.create_table(
        "invoice_line",
        sa.Column("invoice_id", sa.String(length=40), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("endpoint_name", sa.String(length=64), nullable=False),
        sa.Column("dimension", sa.String(length=16), nullable=False),
        sa.Column("service_class", sa.String(length=16), nullable=False),
        sa.Column("price_nano", sa.BigInteger(), nullable=False),
        sa.Column("unit_scale", sa.BigInteger(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("amount_nano", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("invoice_id", "position", name=op.f("pk_invoice_line")),
    )
    op.create_table(
        "lot_use",
        sa.Column("ledger_transaction_id", sa.String(length=40), nullable=False),
        sa.Column("lot_id", sa.String(length=40), nullable=False),
        sa.Column("amount_nano", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("ledger_transaction_id", "lot_id", name=op.f("pk_lot_use")),
    )
    op.create_table(
        "notice",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("message", sa.String(length=400), nullable=False),
        sa.Column("data", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("ended_at", UtcDateTime(), nullable=True),
        sa.Column("dismissed_at", UtcDateTime(), nullable=True),
        sa.Column("num_attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", UtcDateTime(), nullable=True),
        sa.Column("delivered_at", UtcDateTime(), nullable=True),
        sa.Column("delivery_error", sa.String(length=300), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notice")),
    )
    with op.batch_alter_table("notice", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_notice_next_at"), ["next_at"], unique=False)
        batch_op.create_index(
            "ix_notice_organization_id_created_at", ["organization_id", "created_at"], unique=False
        )

    op.create_table(
        "reconciliation_run",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("started_at", UtcDateTime(), nullable=False),
        sa.Column("finished_at", UtcDateTime(), nullable=False),
        sa.Column("num_differences", sa.Integer(), nullable=False),
        sa.Column(
            "checks", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_reconciliation_run")),
    )
    with op.batch_alter_table("reconciliation_run", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_reconciliation_run_started_at"), ["started_at"], unique=False
        )

    op.create_table(
        "seal",
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("previous_sha256", sa.String(length=64), nullable=False),
        sa.Column("root_sha256", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("signature", sa.String(length=128), nullable=False),
        sa.Column("num_transactions", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_seal")),
        sa.UniqueConstraint("sha256", name=op.f("uq_seal_sha256")),
    )
    op.create_table(
        "sealed_transaction",
        sa.Column("ledger_transaction_id", sa.String(length=40), nullable=False),
        sa.Column("seal_number", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("ledger_transaction_id", name=op.f("pk_sealed_transaction")),
        sa.UniqueConstraint(
            "seal_number", "position", name=op.f("uq_sealed_transaction_seal_number_position")
        ),
    )
    op.create_table(
        "stripe_event",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("type", sa.String(length=80), nullable=False),
        sa.Column("object_id", sa.String(length=255), nullable=False),
        sa.Column("raw", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("num_attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", UtcDateTime(), nullable=False),
        sa.Column("error", sa.String(length=300), nullable=False),
        sa.Column("received_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint(
            "state IN ('received', 'done', 'parked', 'dead')", name=op.f("ck_stripe_event_state")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stripe_event")),
    )
    with op.batch_alter_table("stripe_event", schema=None) as batch_op:
        batch_op.create_index("ix_stripe_event_state_next_at", ["state", "next_at"], unique=False)

    op.create_table(
        "stripe_mirror",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("data", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False),
        sa.Column("read_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stripe_mirror")),
    )
    op.create_table(
        "stripe_operation",
        sa.Column("id", sa.String(length=120), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("subject_id", sa.String(length=40), nullable=False),
        sa.Column(
            "params", sa.JSON().with_variant(postgresql.JSONB(), "postgresql"), nullable=False
        ),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("num_attempts", sa.Integer(), nullable=False),
        sa.Column("first_sent_at", UtcDateTime(), nullable=True),
        sa.Column("next_at", UtcDateTime(), nullable=False),
        sa.Column("stripe_id", sa.String(length=255), nullable=True),
        sa.Column("error", sa.String(length=300), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint(
            "state IN ('planned', 'sent', 'unknown', 'confirmed', 'rejected', 'quarantined')",
            name=op.f("ck_stripe_operation_state"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_stripe_operation")),
    )
    with op.batch_alter_table("stripe_operation", schema=None) as batch_op:
        batch_op.create_index(
            "ix_stripe_operation_state_next_at", ["state", "next_at"], unique=False
        )

    op.create_table(
        "top_up",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("amount_cents", sa.BigInteger(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("refunded_cents", sa.BigInteger(), nullable=False),
        sa.Column("disputed_cents", sa.BigInteger(), nullable=False),
        sa.Column("checkout_session_id", sa.String(length=255), nullable=True),
        sa.Column("checkout_url", sa.Text(), nullable=True),
        sa.Column("payment_intent_id", sa.String(length=255), nullable=True),
        sa.Column("error", sa.String(length=300), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("paid_at", UtcDateTime(), nullable=True),
        sa.CheckConstraint("kind IN ('checkout', 'recharge')", name=op.f("ck_top_up_kind")),
        sa.CheckConstraint(
            "state IN ('created', 'pending', 'paid', 'failed', 'expired', 'refunded', 'disputed')",
            name=op.f("ck_top_up_state"),
        ),
        sa.CheckConstraint(
            "amount_cents > 0 AND refunded_cents >= 0", name=op.f("ck_top_up_amount")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_top_up")),
        sa.UniqueConstraint("checkout_session_id", name=op.f("uq_top_up_checkout_session_id")),
        sa.UniqueConstraint("payment_intent_id", name=op.f("uq_top_up_payment_intent_id")),
    )
    with op.batch_alter_table("top_up", schema=None) as batch_op:
        batch_op.create_index(
            batch_op.f("ix_top_up_organization_id"), ["organization_id"], unique=False
        )

    op.create_table(
        "unsealed_transaction",
        sa.Column("ledger_transaction_id", sa.String(length=40), nullable=False),
        sa.PrimaryKeyConstraint("ledger_transaction_id", name=op.f("pk_unsealed_transaction")),
    )
    op.create_table(
        "usage_hour",
        sa.Column("series_id", sa.String(length=32), nullable=False),
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("amount_nano", sa.BigInteger(), nullable=False),
        sa.Column("saved_nano", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("series_id", "hour", name=op.f("pk_usage_hour")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "usage_series",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("organization_id", sa.String(length=40), nullable=False),
        sa.Column("api_key_id", sa.String(length=40), nullable=False),
        sa.Column("api_key_name", sa.String(length=80), nullable=False),
        sa.Column("endpoint_name", sa.String(length=64), nullable=False),
        sa.Column("version_number", sa.Integer(), nullable=False),
        sa.Column("service_class", sa.String(length=16), nullable=False),
        sa.Column("dimension", sa.String(length=16), nullable=False),
        sa.Column("disposition", sa.String(length=8), nullable=False),
        sa.Column("price_book_id", sa.String(length=40), nullable=False),
        sa.Column("price_nano", sa.BigInteger(), nullable=False),
        sa.Column("unit_scale", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "dimension IN ('input', 'cached_input', 'cache_write', 'kv_device', 'kv_host', 'kv_disk', 'output', 'request', 'device_ms')",
            name=op.f("ck_usage_series_dimension"),
        ),
        sa.CheckConstraint(
            "disposition IN ('billed', 'waived', 'free')", name=op.f("ck_usage_series_disposition")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_series")),
        sa.UniqueConstraint(
            "organization_id",
            "api_key_id",
            "endpoint_name",
            "version_number",
            "service_class",
            "dimension",
            "disposition",
            "price_book_id",
            "price_nano",
            "unit_scale",
            name="uq_usage_series",
        ),
    )
    with op.batch_alter_table("account_balance", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("forced_nano", sa.BigInteger(), server_default="0", nullable=False)
        )
        batch_op.add_column(sa.Column("closed_until", UtcDateTime(), nullable=True))
        batch_op.drop_constraint(batch_op.f("ck_account_balance_limit"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_account_balance_limit"),
            "credit_limit_nano IS NULL OR held_nano = 0"
            " OR posted_nano - held_nano + forced_nano >= -credit_limit_nano",
        )
        batch_op.create_check_constraint(
            batch_op.f("ck_account_balance_forced"),
            "forced_nano BETWEEN 0 AND 4000000000000000000",
        )

    with op.batch_alter_table("ledger_transaction", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("organization_id", sa.String(length=40), server_default="", nullable=False)
        )
        batch_op.add_column(
            sa.Column("content_sha256", sa.String(length=64), server_default="", nullable=False)
        )

    with op.batch_alter_table("price_book", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column(
                "policy",
                sa.JSON().with_variant(postgresql.JSONB(), "postgresql"),
                server_default="{}",
                nullable=False,
            )
        )
        batch_op.add_column(sa.Column("cancelled_at", UtcDateTime(), nullable=True))

    with op.batch_alter_table("price_item", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("above_tokens", sa.BigInteger(), server_default="0", nullable=False)
        )
        batch_op.add_column(
            sa.Column("from_minute", sa.Integer(), server_default="0", nullable=False)
        )
        batch_op.add_column(
            sa.Column("until_minute", sa.Integer(), server_default="1440", nullable=False)
        )
        batch_op.create_check_constraint(
            batch_op.f("ck_price_item_above_tokens"), "above_tokens >= 0"
        )
        batch_op.create_check_constraint(
            batch_op.f("ck_price_item_window"),
            "from_minute BETWEEN 0 AND 1439 AND until_minute BETWEEN 1 AND 1440",
        )
        batch_op.drop_constraint(
            batch_op.f("uq_price_item_price_book_id_endpoint_name_dimension_service_class"),
            type_="unique",
        )
        batch_op.create_unique_constraint(
            "uq_price_item",
            [
                "price_book_id",
                "endpoint_name",
                "dimension",
                "service_class",
                "above_tokens",
                "from_minute",
                "until_minute",
            ],
        )

    with op.batch_alter_table("usage_event", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column(
                "ledger_transaction_id", sa.String(length=40), server_default="", nullable=False
            )
        )
        batch_op.drop_index(batch_op.f("ix_usage_event_api_key_id"))
        batch_op.create_index(
            batch_op.f("ix_usage_event_ledger_transaction_id"),
            ["ledger_transaction_id"],
            unique=False,
        )

    refuse_changes()
    add_up_usage()
    queue_for_sealing()


def refuse_changes() -> None:
    """The ledger is only ever added to, whoever asks for something else, and a transaction to
    which nothing is to be added any more is not."""
    if op.get_bind().dialect.name == "sqlite":
        refuse_changes_in_sqlite()
        return
    refuse("refuse_change", "TG_TABLE_NAME || ' is append-only'")
    for table in APPEND_ONLY:
        op.execute(
            f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()"
        )
    for table, column in UNTIL_SEALED.items():
        refuse(
            f"refuse_late_{table}",
            f"NEW.{column} || ' is not waiting for its seal: nothing is added to it'",
            "NOT EXISTS (SELECT FROM unsealed_transaction "
            f"WHERE ledger_transaction_id = NEW.{column})",
        )
        op.execute(
            f"CREATE TRIGGER {table}_until_sealed BEFORE INSERT ON {table} "
            f"FOR EACH ROW EXECUTE FUNCTION refuse_late_{table}()"
        )
    refuse(
        "refuse_queueing",
        "NEW.ledger_transaction_id || ' is sealed'",
        "EXISTS (SELECT FROM sealed_transaction "
        "WHERE ledger_transaction_id = NEW.ledger_transaction_id)",
    )
    op.execute(
        "CREATE TRIGGER unsealed_transaction_once BEFORE INSERT ON unsealed_transaction "
        "FOR EACH ROW EXECUTE FUNCTION refuse_queueing()"
    )


def refuse(function: str, message: str, where: str = "true") -> None:
    """Makes PostgreSQL's function for a trigger; both texts are SQL."""
    op.execute(
        f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF {where} THEN RAISE EXCEPTION '%', {message} "
        "USING ERRCODE = 'integrity_constraint_violation'; END IF; RETURN NEW; END $$"
    )


def refuse_changes_in_sqlite() -> None:
    for table, is_same in APPEND_ONLY.items():
        is_append_only = f"SELECT RAISE(ABORT, '{table} is append-only')"
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{action.lower()} BEFORE {action} ON {table} "
                f"BEGIN {is_append_only}; END"
            )
        # INSERT OR REPLACE deletes without calling the trigger above, by any unique key.
        op.execute(
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE rowid = NEW.rowid OR {is_same}) "
            f"BEGIN {is_append_only}; END"
        )
    for table, column in UNTIL_SEALED.items():
        op.execute(
            f"CREATE TRIGGER {table}_until_sealed BEFORE INSERT ON {table} WHEN NOT EXISTS "
            f"(SELECT 1 FROM unsealed_transaction WHERE ledger_transaction_id = NEW.{column}) "
            "BEGIN SELECT RAISE(ABORT, 'a transaction that is not waiting for its seal: "
            "nothing is added to it'); END"
        )
    op.execute(
        "CREATE TRIGGER unsealed_transaction_once BEFORE INSERT ON unsealed_transaction "
        "WHEN EXISTS (SELECT 1 FROM sealed_transaction "
        "WHERE ledger_transaction_id = NEW.ledger_transaction_id) "
        "BEGIN SELECT RAISE(ABORT, 'a transaction that is sealed'); END"
    )


def allow_changes() -> None:
    if op.get_bind().dialect.name == "sqlite":
        names = [f"{table}_no_{action}" for table in APPEND_ONLY for action in ACTIONS]
        names += [f"{table}_until_sealed" for table in UNTIL_SEALED]
        for name in [*names, "unsealed_transaction_once"]:
            op.execute(f"DROP TRIGGER {name}")
        return
    # With their triggers.
    for name in ("change", "queueing", *(f"late_{table}" for table in UNTIL_SEALED)):
        op.execute(f"DROP FUNCTION refuse_{name}() CASCADE")


def add_up_usage() -> None:
    """Hours of the requests that are settled already, and the transactions they belong to."""
    connection = op.get_bind()
    is_sqlite = connection.dialect.name == "sqlite"
    connection.exec_driver_sql(
        "UPDATE usage_event SET ledger_transaction_id = t.id FROM ledger_transaction t"
        " WHERE t.idempotency_key = 'usage:' || usage_event.id"
    )
    at = "t.created_at" if is_sqlite else "timezone('UTC', t.created_at)"
    hour = (
        f"CAST(strftime('%s', {at}) AS INTEGER) / 3600"
        if is_sqlite
        else f"CAST(floor(extract(epoch FROM {at}) / 3600) AS integer)"
    )
    ended = hour.replace("t.created_at", "e.finished_at")
    columns = ", ".join(f"{name}" for name in SERIES_COLUMNS)
    rows = connection.exec_driver_sql(
        f"SELECT {columns}, max(e.api_key_name), coalesce({hour}, {ended}) AS hour,"
        " sum(l.quantity), sum(l.amount_nano)"
        " FROM usage_event e JOIN usage_line l ON l.event_id = e.id"
        " LEFT JOIN ledger_transaction t ON t.id = e.ledger_transaction_id"
        f" GROUP BY {columns}, coalesce({hour}, {ended})"
    ).all()
    names = [name.partition(".")[2] for name in SERIES_COLUMNS]
    series: dict[str, dict[str, object]] = {}
    hours = []
    for *key, api_key_name, in_hour, quantity, amount_nano in rows:
        text = json.dumps(key, separators=(",", ":"), ensure_ascii=False)
        series_id = hashlib.sha256(text.encode()).hexdigest()[:32]
        series[series_id] = {
            "id": series_id,
            "api_key_name": api_key_name,
            **dict(zip(names, key, strict=True)),
        }
        hours.append(
            {
                "series_id": series_id,
                "hour": in_hour,
                "quantity": int(quantity),
                "amount_nano": int(amount_nano),
                "saved_nano": 0,
            }
        )
    if series:
        op.bulk_insert(table_of("usage_series", ["id", "api_key_name", *names]), [*series.values()])
        op.bulk_insert(table_of("usage_hour", list(hours[0])), hours)


def table_of(name: str, columns: list[str]) -> sa.TableClause:
    return sa.table(name, *(sa.column(column) for column in columns))


def queue_for_sealing() -> None:
    op.execute("INSERT INTO unsealed_transaction SELECT id FROM ledger_transaction")


def downgrade() -> None:
    allow_changes()
    with op.batch_alter_table("usage_event", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_usage_event_ledger_transaction_id"))
        batch_op.create_index(batch_op.f("ix_usage_event_api_key_id"), ["api_key_id"], unique=False)
    # Not in a batch, which would make the table anew: SQLite drops none that others refer to.
    op.drop_column("usage_event", "ledger_transaction_id")

    with op.batch_alter_table("price_item", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_price_item_window"), type_="check")
        batch_op.drop_constraint(batch_op.f("ck_price_item_above_tokens"), type_="check")
        batch_op.drop_constraint("uq_price_item", type_="unique")
        batch_op.create_unique_constraint(
            batch_op.f("uq_price_item_price_book_id_endpoint_name_dimension_service_class"),
            ["price_book_id", "endpoint_name", "dimension", "service_class"],
        )
        batch_op.drop_column("until_minute")
        batch_op.drop_column("from_minute")
        batch_op.drop_column("above_tokens")

    # Before, a book that was cancelled was deleted.
    cancelled = "(SELECT id FROM price_book WHERE cancelled_at IS NOT NULL)"
    op.execute(f"DELETE FROM price_item WHERE price_book_id IN {cancelled}")
    op.execute("DELETE FROM price_book WHERE cancelled_at IS NOT NULL")
    op.drop_column("price_book", "cancelled_at")
    op.drop_column("price_book", "policy")
    op.drop_column("ledger_transaction", "content_sha256")
    op.drop_column("ledger_transaction", "organization_id")

    with op.batch_alter_table("account_balance", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_account_balance_forced"), type_="check")
        batch_op.drop_constraint(batch_op.f("ck_account_balance_limit"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_account_balance_limit"),
            "credit_limit_nano IS NULL OR held_nano = 0"
            " OR posted_nano - held_nano >= -credit_limit_nano",
        )
        batch_op.drop_column("closed_until")
        batch_op.drop_column("forced_nano")

    op.drop_table("usage_series")
    op.drop_table("usage_hour")
    op.drop_table("unsealed_transaction")
    with op.batch_alter_table("top_up", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_top_up_organization_id"))

    op.drop_table("top_up")
    with op.batch_alter_table("stripe_operation", schema=None) as batch_op:
        batch_op.drop_index("ix_stripe_operation_state_next_at")

    op.drop_table("stripe_operation")
    op.drop_table("stripe_mirror")
    with op.batch_alter_table("stripe_event", schema=None) as batch_op:
        batch_op.drop_index("ix_stripe_event_state_next_at")

    op.drop_table("stripe_event")
    op.drop_table("sealed_transaction")
    op.drop_table("seal")
    with op.batch_alter_table("reconciliation_run", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_reconciliation_run_started_at"))

    op.drop_table("reconciliation_run")
    with op.batch_alter_table("notice", schema=None) as batch_op:
        batch_op.drop_index("ix_notice_organization_id_created_at")
        batch_op.drop_index(batch_op.f("ix_notice_next_at"))

    op.drop_table("notice")
    op.drop_table("lot_use")
    op.drop_table("invoice_line")
    with op.batch_alter_table("invoice", schema=None) as batch_op:
        batch_op.drop_index("uq_invoice_organization_id_period")

    op.drop_table("invoice")
    op.drop_table("hold_window")
    op.drop_table("device_cost")
    with op.batch_alter_table("credit_lot", schema=None) as batch_op:
        batch_op.drop_index("ix_credit_lot_organization_id_remaining_nano")

    op.drop_table("credit_lot")
    op.drop_table("budget_window")
    op.drop_table("budget")
    op.drop_table("billing_profile")
