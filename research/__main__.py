"""`gnomon <verb>`: the same as `python -m research.<verb>`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from research.core.names import suggestion

VERBS = {
    "train": "train what a config says",
    "launch": "run one of these in several processes",
    "evaluate": "measure a trained run again",
    "sample": "draw from a trained run",
    "reproduce": "run a paper's experiment and compare with what it published",
    "bench": "time ours beside its peer, both in one run",
    "data": "fetch a data set",
}


def usage() -> str:
    lines = [f"  {verb:<10} {what}" for verb, what in VERBS.items()]
    return "\n".join(
        ["usage: gnomon <verb> [options]", "", *lines, "", "`gnomon <verb> --help` shows its options and a working example:"]
        + ["  gnomon train --config configs/lm/stdlib.py:smoke"]
    )


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        print(f"gnomon: no verb {verb!r}; allowed: {', '.join(VERBS)}{suggestion(verb, VERBS)}", file=sys.stderr)
        return 2
    name = "research.data.__main__" if verb == "data" else f"research.{verb}"
    return importlib.import_module(name).main(rest)


if __name__ == "__main__":
    sys.exit(main())
