"""How a script ends."""

import os
import sys
from typing import NoReturn

STOPPED = 130  # what a shell reports of a command that Ctrl-C ended


def leave(status: int) -> NoReturn:
    """End the process with an exit code.

    After Ctrl-C at once: a training in this process still computes in a thread, which Python could
    only abort, with a message of its own.
    """
    if status == STOPPED:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
