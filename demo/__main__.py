"""`python -m demo` runs the demo, `python -m demo stop` ends what it left running."""

import sys

from demo.appliance import DemoError, stop
from demo.tour import run

try:
    if sys.argv[1:] == ["stop"]:
        stop()
    else:
        run()
except DemoError as error:
    print(f"demo: {error}", file=sys.stderr)
    raise SystemExit(1) from None
except KeyboardInterrupt:
    raise SystemExit(130) from None
