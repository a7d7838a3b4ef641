"""`python -m recattn info`."""

import argparse

from recattn.info import report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recattn", description="Fused attention kernels for recommenders.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what was built, what each operator runs on here, and why anything is missing")
    parser.parse_args()
    print(report())


if __name__ == "__main__":
    main()
