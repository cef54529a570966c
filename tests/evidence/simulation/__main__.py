"""Runs one history and prints it, or many and prints the seeds that fail.

python -m tests.evidence.simulation --seed 7
python -m tests.evidence.simulation --seeds 1000 --first 0
"""

import argparse
import sys
import time
import traceback

from tests.evidence.machine.people import Money
from tests.evidence.simulation import Failed, simulate, world

TOLD_SEEDS = 20


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    with world() as money_class:
        if arguments.seed is not None:
            trace = simulate(money_class, arguments.seed, arguments.steps)
            sys.stdout.write("\n".join(trace) + "\n")
            return 0
        return run_many(money_class, arguments.first, arguments.seeds, arguments.steps)


def run_many(money_class: type[Money], first: int, num_seeds: int, num_steps: int) -> int:
    """Tells what it did on the way and when it is interrupted. The exit status."""
    started, num_run, num_steps_run, failed = time.monotonic(), 0, 0, list[int]()

    def tell() -> None:
        seconds = round(time.monotonic() - started)
        failures = f"{len(failed)} failed" + (f" {failed}" if failed else "")
        sys.stdout.write(f"{num_run} seeds, {num_steps_run:,} steps, {failures}, {seconds} s\n")
        sys.stdout.flush()

    try:
        for seed in range(first, first + num_seeds):
            try:
                num_steps_run += len(simulate(money_class, seed, num_steps))
            except Failed:
                failed.append(seed)
                traceback.print_exc()
            num_run += 1
            if num_run % TOLD_SEEDS == 0:
                tell()
    except KeyboardInterrupt:
        sys.stdout.write("interrupted: ")
    tell()
    return 1 if failed or num_run < num_seeds else 0


if __name__ == "__main__":
    sys.exit(main())
