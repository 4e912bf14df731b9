"""The command `deit`: its subcommands are typed dataclasses, one field a flag, one file a verb.

No file of commands/ imports torch before a subcommand runs, so that `deit --help` answers at once.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Sequence

from deit.commands import flags
from deit.commands.eval import Eval
from deit.commands.explain_image import ExplainImage
from deit.commands.export import Export
from deit.commands.info import Info
from deit.commands.predict import Predict
from deit.commands.report import Report
from deit.commands.train import Finetune, Fixres, Train
from deit.commands.tune import Tune

BAD_INPUT = 2


# Each is named as its class is: `explain-image`.
Command = Info | Predict | Train | Finetune | Fixres | Eval | Report | Export | ExplainImage | Tune


def _any_name(error: UnicodeError) -> tuple[bytes, int]:
    """Encodes what a stream's encoding has no character for, which a file's name may hold.

    A byte of a name that is no UTF-8 stays that byte; anything else becomes its escape.
    """
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    return b"".join(
        bytes([ord(c) - 0xDC00])
        if "\udc80" <= c <= "\udcff"
        else c.encode("ascii", "backslashreplace")
        for c in characters
    ), error.end


def _print_any_name() -> None:
    codecs.register_error("deit-any-name", _any_name)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="deit-any-name")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (the process's own if None) and return its exit code.

    Bad input, a ValueError, TypeError or OSError, becomes one line on stderr and exit code 2;
    with DEIT_TRACEBACK=1 in the environment it stays a traceback.
    """
    _print_any_name()
    try:
        command = flags.cli(
            Command,
            arguments,
            prog="deit",
            description="DeiT vision transformers on fused kernels.",
        )
        return command.run()
    except BrokenPipeError:
        # The reader of our output has gone (`deit train --help | head`): nothing is wrong here.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("deit: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("DEIT_TRACEBACK") == "1":
            raise
        print(f"deit: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
