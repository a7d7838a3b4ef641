"""`python -m recattn check`, `info` and `lrea-size`; alone it prints help."""

import argparse
import os
import sys
from collections.abc import Callable

from recattn import info
from recattn.checks import command as checks
from recattn.serving import sizing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m recattn", description="Fused attention kernels for recommenders.")
    parser.set_defaults(run=_printed(lambda _: parser.format_help().rstrip()))
    commands = parser.add_subparsers()
    check = commands.add_parser("check", help="hold every operator to the float64 reference on this device")
    checks.add_arguments(check)
    check.set_defaults(run=checks.check)
    info_help = "what was built, what each operator runs on here, and how to get what is missing"
    commands.add_parser("info", help=info_help).set_defaults(run=_printed(lambda _: info.report()))
    size = commands.add_parser("lrea-size", help="memory and bandwidth that LREA's states take to serve")
    sizing.add_arguments(size)
    size.set_defaults(run=_printed(sizing.report))
    arguments = parser.parse_args()
    try:
        status = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at exit
        return 1
    return status


def _printed(report: Callable[[argparse.Namespace], str]) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        print(report(arguments))
        return 0

    return run


if __name__ == "__main__":
    sys.exit(main())
