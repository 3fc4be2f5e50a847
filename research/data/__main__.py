"""Data sets that are fetched once: `gnomon data fashion-mnist`, or `python -m research.data fashion-mnist`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from research.core.names import choose
from research.data import fashion_mnist, glyphs

FETCHED = {fashion_mnist.NAME: fashion_mnist.fetch, glyphs.FONTS: glyphs.fetch}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="gnomon data",
        description="Fetch a data set and check its files. Other data are made here, or read from your own files.",
        epilog="example: gnomon data fashion-mnist --to data/fashion-mnist",
    )
    parser.add_argument("name", help=f"which data set: {', '.join(sorted(FETCHED))}")
    parser.add_argument(
        "--to", metavar="DIR", help="folder for its files (default: in $GNOMON_DATA, else the user's cache, else ./data)"
    )
    arguments = parser.parse_args(argv)
    try:
        choose(FETCHED, arguments.name, "data set")(arguments.to, say=lambda line: print(line, flush=True))
    except ValueError as error:
        print(f"gnomon data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
