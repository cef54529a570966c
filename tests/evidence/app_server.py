"""The whole appliance as a process of its own, with workers that compute nothing; started again
on the same data directory it finds what was deployed. Arguments: data directory, port."""

import sys
from pathlib import Path

from benchmarks import gateway_server


def main() -> None:
    if (Path(sys.argv[1]) / "artifacts" / "art_decoder").exists():

        async def nothing(_: object) -> None:
            return None

        gateway_server.deploy = nothing
    gateway_server.main()


if __name__ == "__main__":
    main()
