"""Side-by-side timings against other libraries: python -m benchmarks."""

import sys

from qlora_lib.base.endings import quiet_interrupt

if sys.argv[0] == "-m":  # python -m, which imports this first, and torch after it
    quiet_interrupt()
