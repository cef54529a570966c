"""Runs a stand-in until it is interrupted: `python -m tests.stripe_stand_in --port 12111`."""

import argparse
import time

from tests.stripe_stand_in.server import StandIn


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for Stripe")
    parser.add_argument("--port", type=int, default=12111)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--webhook-url", default="")
    chosen = parser.parse_args()
    with StandIn(chosen.seed, chosen.port) as stand_in:
        if chosen.webhook_url:
            stand_in.webhooks.deliver_to(chosen.webhook_url)
        print(f"TAPEOUT_STRIPE_API_BASE={stand_in.url}")  # noqa: T201
        print(f"TAPEOUT_STRIPE_API_KEY={stand_in.api_key}")  # noqa: T201
        print(f"TAPEOUT_STRIPE_WEBHOOK_SECRET={stand_in.webhook_secret}", flush=True)  # noqa: T201
        while True:
            time.sleep(1)
            stand_in.let_time_pass()


if __name__ == "__main__":
    main()
