"""Measure this package's optimizers against every form of stock.

Run ``python benchmarks/compare.py --help`` for the options. Ends with status 0, with 1 if a
contestant computed something else than stock does, with 2 if it cannot do what it is asked for, and
with 130 after Ctrl-C; what was measured until then is saved.
"""

import signal
import sys

from check import missing

if __name__ == "__main__":
    # Imports take seconds; until they are done, Ctrl-C ends this without a traceback.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if lacking := missing():
        print(lacking, file=sys.stderr)
        sys.exit(2)
    from torch_freeze_bench.command import main

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
