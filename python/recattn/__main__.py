"""`python -m recattn check`, `info` and `lrea-size`."""

import argparse
import sys

from recattn import info
from recattn.checks import command as checks
from recattn.serving import sizing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m recattn", description="Fused attention kernels for recommenders.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="hold every operator to the float64 reference on this device")
    checks.add_arguments(check)
    check.set_defaults(run=checks.check)
    info_help = "what was built, what each operator runs on here, and why anything is missing"
    commands.add_parser("info", help=info_help).set_defaults(run=_printed(lambda _: info.report()))
    size = commands.add_parser("lrea-size", help="memory and bandwidth that LREA's states take to serve")
    sizing.add_arguments(size)
    size.set_defaults(run=_printed(sizing.report))
    arguments = parser.parse_args()
    return arguments.run(arguments)


def _printed(report):
    def run(arguments: argparse.Namespace) -> int:
        print(report(arguments))
        return 0

    return run


if __name__ == "__main__":
    sys.exit(main())
