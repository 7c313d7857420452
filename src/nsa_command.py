"""What the ``nsa`` script calls: Ctrl-C is one line while PyTorch is still being imported too.

It stands outside the package, since importing anything of ``nsa`` imports PyTorch first.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Imports the command line and runs it."""
    # Where the caller ignores Ctrl-C (nohup), so do we.
    guarded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if guarded:
        signal.signal(signal.SIGINT, _leave)
    from nsa import cli

    if guarded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends the process at once: an exception in the midst of an import may be lost or wrapped."""
    os.write(2, b"Interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
