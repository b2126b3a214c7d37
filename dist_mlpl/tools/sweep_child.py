"""Owns one run of a sweep, as a process that does not outlive the sweep, however that ends.

Started as `python -m dist_mlpl.tools.sweep_child PARENT ARGUMENTS`, it runs `dist-mlpl ARGUMENTS`. When process PARENT
dies, the kernel sends it SIGTERM, and the run commits and stops.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

from dist_mlpl.cli_options import INTERRUPTED

_PR_SET_PDEATHSIG: Final = 1  # an option of Linux's prctl


def main(arguments: list[str]) -> None:
    """Tie this process to its parent, then run the command.

    Args:
        arguments: process id of the parent, then the arguments of `dist-mlpl`.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != int(arguments[0]):  # the parent died before this process was tied to it
        sys.exit(INTERRUPTED)
    sys.argv = ["dist-mlpl", *arguments[1:]]
    from dist_mlpl.cli import main as command

    command()


if __name__ == "__main__":
    main(sys.argv[1:])
