"""The process that compiles for one target: `python -m pallas_kernels.aot.worker TARGET DUMP`, started by pool.py.

It reads a job a line from its input and writes an answer a line: {"ready": versions} first, then {"result": …} each. A job
names either a case, {"module", "kernel", "name"}, or any function that gives what a case's `build` gives, {"entry":
"module:function", "arguments": {…}}. An error is an answer; a crash ends the process, which is what it is a process for.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from pallas_kernels import cases
from pallas_kernels.aot import cuda, results, targets, tpu
from pallas_kernels.cases import Case

COMPILERS = {"tpu": tpu, "gpu": cuda}


def wanted(job: dict[str, Any], target: targets.Target) -> Case:
    if "entry" in job:
        module, _, name = job["entry"].partition(":")
        build = functools.partial(getattr(importlib.import_module(module), name), **job["arguments"])
        return Case("", job["entry"], target.implementation, build)
    return next(c for _, c in cases.load([job["module"]]) if (c.kernel, c.name) == (job["kernel"], job["name"]))


def answer(job: dict[str, Any], target: targets.Target, compiler: Any) -> results.Result:
    case = wanted(job, target)
    try:
        seconds, calls = compiler.compile(case.build)
    except Exception as error:  # whatever it is, it is why this case did not compile
        return results.row(case, target, results.FAILED, f"{type(error).__name__}: {error}")
    return results.judged(case, target, seconds, calls)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers print goes where errors go
    (target,) = targets.named([sys.argv[1]])
    compiler = COMPILERS[target.implementation].Compiler(target, Path(sys.argv[2]))
    answers.write(json.dumps({"ready": compiler.versions}) + "\n")
    for line in sys.stdin:
        result = answer(json.loads(line), target, compiler)
        answers.write(json.dumps({"result": results.as_json(result)}) + "\n")


if __name__ == "__main__":
    main()
