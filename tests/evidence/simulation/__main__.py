"""Runs one history and prints it, or many and prints the seeds that fail.

python -m tests.evidence.simulation --seed 7
python -m tests.evidence.simulation --seeds 1000 --first 0
"""

import argparse
import sys
import time
import traceback

from tests.evidence.simulation import Failed, simulate, world


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
        started, num_steps, failed = time.monotonic(), 0, 0
        for seed in range(arguments.first, arguments.first + arguments.seeds):
            try:
                num_steps += len(simulate(money_class, seed, arguments.steps))
            except Failed:
                failed += 1
                traceback.print_exc()
        seconds = round(time.monotonic() - started)
        sys.stdout.write(
            f"{arguments.seeds} seeds, {num_steps:,} steps, {failed} failed, {seconds} s\n"
        )
        return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
