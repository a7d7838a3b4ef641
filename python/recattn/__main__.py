"""`python -m recattn info` and `python -m recattn lrea-size`."""

import argparse

from recattn import info
from recattn.serving import sizing


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recattn", description="Fused attention kernels for recommenders.")
    commands = parser.add_subparsers(dest="command", required=True)
    info_help = "what was built, what each operator runs on here, and why anything is missing"
    commands.add_parser("info", help=info_help).set_defaults(report=lambda _: info.report())
    size = commands.add_parser("lrea-size", help="memory and bandwidth that LREA's states take to serve")
    sizing.add_arguments(size)
    size.set_defaults(report=sizing.report)
    arguments = parser.parse_args()
    print(arguments.report(arguments))


if __name__ == "__main__":
    main()
