"""Copies standard input to standard output, line by line, and says in one line what jax's coordination service says in twenty
when it ends a process because another is lost. Run as a script by `core.processes`, beside each process of several."""

import re
import sys

NOISE = re.compile(r"[IWE]\d{4} .*coordination_service")
FATAL = re.compile(r"F\d{4} .*client\.h:\d+\] Terminating process because the JAX distributed service detected fatal errors")
LOST = re.compile(r"stopped sending heartbeats\):\s*([\d, \n]+?)\s*\n")


def line(text: str) -> str:
    """What a fatal error of the coordination service comes to."""
    lost = LOST.search(text)
    who = f"process {lost[1]} has stopped sending heartbeats" if lost else "process 0, which coordinates, cannot be reached"
    return f"gnomon: {who}: this process ends too; the same command goes on from the last checkpoint"


def main() -> None:
    noise = False
    for text in sys.stdin.buffer:
        shown = text.decode(errors="replace")
        if FATAL.match(shown):
            rest = shown + sys.stdin.buffer.read().decode(errors="replace")  # it ends with the process
            sys.stdout.write(line(rest) + "\n")
            return
        head = re.match(r"[IWE]\d{4} ", shown)
        noise = bool(NOISE.search(shown)) or (noise and not head and bool(re.match(r"\d|The tasks have crashed", shown)))
        if not noise:
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
