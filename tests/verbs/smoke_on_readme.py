"""configs/lm/stdlib.py at its smoke size, on the README: the same run, whose splits are measured in a second."""

from __future__ import annotations

from ml_collections import ConfigDict, config_dict

from configs.lm import stdlib


def get_config(arg: str = "") -> ConfigDict:
    config = stdlib.get_config("smoke")
    config.data = {"name": "files", "paths": ["README.md"], "tokenizer": "bytes", "split": "position", "separator": "",
                   "field": config_dict.placeholder(str)}  # fmt: skip
    return config
