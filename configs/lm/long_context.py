"""The language model of lm/stdlib.py reading 8,192 bytes at once, which sparse attention makes affordable.

    gnomon train --config configs/lm/long_context.py             # 200 steps of 0.9 s on 2 cores, and evaluations
    gnomon train --config configs/lm/long_context.py --config.model.attention.mask='["full()"]' --workdir runs/full
    gnomon train --config configs/lm/long_context.py:smoke       # half a minute

A layer sees the 512 latest bytes and the first 64 (Longformer: Beltagy et al. 2020, arXiv 2004.05150, section 3.1; that a
window wants the first tokens kept: Xiao et al. 2023, arXiv 2309.17453). The second command lets every byte see all before it,
with nothing else changed; with --config.model.attention.implementation=reference, too, it is the plain dense formula.
Embeddings of what followed the last few bytes when they last occurred look through all 8,192.
Expected: see docs/results.md.
"""

from ml_collections import ConfigDict

from configs.lm import stdlib

ARGS = ("smoke",)


def get_config(arg: str = "") -> ConfigDict:
    config = stdlib.get_config(arg)
    config.model.attention.mask = ["window(511, 0) | global_tokens(64)"]
    config.model.context = 8192
    config.stream = {"batch": 1, "length": 8192}
    config.evaluate.update({"every": 100, "batch": 2, "length": 8192, "context": 512, "windows": 8})
    config.train.steps = 200
    config.checkpoint.every = 100
    if arg == "smoke":
        config.model.update({"context": 1024, "layers": 2})
        config.stream.length = 1024
        config.evaluate.update({"every": 0, "batch": 8, "length": 1024, "context": 0})
        config.closing = ["sample"]
        config.train.steps = 8
        config.checkpoint.every = 4
    return config
