"""Webhooks: events signed and delivered, again until they are taken, and spoilt on demand.

A test either gives a URL and they are posted from a thread, or takes them and posts them itself.
"""

import json
import threading
from dataclasses import dataclass

import httpx
from stripe import WebhookSignature

from tests.stripe_stand_in.clock import Clock
from tests.stripe_stand_in.errors import Object
from tests.stripe_stand_in.faults import Faults

SECRET = "whsec_stand_in_0123456789abcdef"
# After each failure; about three days in all.
RETRY_SECONDS = (5, 300, 1800, 7200, 18000, 36000, 36000, 36000, 36000, 36000, 36000)
TIMEOUT_SECONDS = 10


@dataclass
class Delivery:
    """One sending of one event; `body` and `headers` as they go over the wire."""

    event_id: str
    type: str
    content: str
    due_at: int
    num_attempts: int = 0
    body: bytes = b""
    headers: dict[str, str] | None = None
    status: int = 0  # of the last answer


class Webhooks:
    """The one endpoint of the account."""

    def __init__(self, clock: Clock, faults: Faults) -> None:
        self.secrets = [SECRET]  # all of them sign, as while a secret is rolled
        self.delivered: list[Delivery] = []
        self.given_up: list[Delivery] = []
        self._clock = clock
        self._faults = faults
        self._url = ""
        self._waiting: list[Delivery] = []
        self._num_sending = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closing = False

    def add(self, event: Object) -> None:
        """Plans the deliveries of a new event."""
        spoilt = self._faults.webhooks
        if spoilt.take("drop"):
            return
        due_at = self._clock.now()
        if spoilt.take("delay"):
            due_at += spoilt.delay_seconds
        content = json.dumps(event, indent=2)
        num_deliveries = 2 if spoilt.take("duplicate") else 1
        with self._changed:
            for _ in range(num_deliveries):
                self._waiting.append(Delivery(event["id"], event["type"], content, due_at))
            self._changed.notify_all()

    def take(self) -> list[Delivery]:
        """All that is due now, signed; the test posts them and they count as delivered."""
        with self._changed:
            due = self._take_due()
            self.delivered += due
        return due

    def _take_due(self) -> list[Delivery]:
        now = self._clock.now()
        due = [each for each in self._waiting if each.due_at <= now]
        self._waiting = [each for each in self._waiting if each.due_at > now]
        if self._faults.webhooks.is_reordered:
            self._faults.random.shuffle(due)
        for delivery in due:
            self._sign(delivery)
        return due

    def _sign(self, delivery: Delivery) -> None:
        spoilt = self._faults.webhooks
        sent_at = self._clock.now()
        if spoilt.take("old_timestamp"):
            sent_at -= 301
        if spoilt.take("future_timestamp"):
            sent_at += 302
        secrets = ["whsec_of_someone_else"] if spoilt.take("bad_signature") else self.secrets
        headers = [
            WebhookSignature.generate_signature_header(delivery.content, secret, sent_at)
            for secret in secrets
        ]
        signatures = [header.partition(",")[2] for header in headers]
        content = delivery.content
        if spoilt.take("altered_body"):
            content = content.replace('"livemode": false', '"livemode": true')
        delivery.num_attempts += 1
        delivery.body = content.encode()
        delivery.headers = {
            "Stripe-Signature": f"t={sent_at}," + ",".join(signatures),
            "Content-Type": "application/json; charset=utf-8",
            "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
        }

    def deliver_to(self, url: str) -> None:
        """From now on posts what is due."""
        self._url = url
        if self._thread is None:
            self._thread = threading.Thread(target=self._post_all, name="webhooks", daemon=True)
            self._thread.start()

    def settle(self, timeout_seconds: int = 20) -> bool:
        """Waits until nothing that is due now is left; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(self._is_settled, timeout_seconds)

    def _is_settled(self) -> bool:
        now = self._clock.now()
        return not self._num_sending and not any(each.due_at <= now for each in self._waiting)

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(TIMEOUT_SECONDS + 1)

    def _post_all(self) -> None:
        with httpx.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            while True:
                with self._changed:
                    due = self._take_due()
                    while not due and not self._is_closing:
                        self._changed.wait(0.2)  # the clock may have been moved
                        due = self._take_due()
                    if self._is_closing:
                        return
                    self._num_sending = len(due)
                for delivery in due:
                    self._post(client, delivery)

    def _post(self, client: httpx.Client, delivery: Delivery) -> None:
        try:
            answer = client.post(self._url, content=delivery.body, headers=delivery.headers)
            delivery.status = answer.status_code
        except httpx.HTTPError:
            delivery.status = 0
        with self._changed:
            if 200 <= delivery.status < 300:
                self.delivered.append(delivery)
            elif delivery.num_attempts > len(RETRY_SECONDS):
                self.given_up.append(delivery)
            else:
                wait_seconds = RETRY_SECONDS[delivery.num_attempts - 1]
                delivery.due_at = self._clock.now() + wait_seconds
                self._waiting.append(delivery)
            self._num_sending -= 1
            self._changed.notify_all()
