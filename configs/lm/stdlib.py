"""A byte-level transformer on the source of the Python standard library, which every machine has.

    make train                                                   # this config, about four minutes on 2 cores
    gnomon train --config configs/lm/stdlib.py:30min             # as low as half an hour goes
    gnomon train --config configs/lm/stdlib.py:smoke             # seconds

Expected: see docs/results.md. Split by sha256 of the path (data/stdlib.py). Muon: Jordan 2024, https://kellerjordan.github.io/posts/muon.
"""

from ml_collections import ConfigDict

from configs.base import base

ARGS = ("smoke", "30min")


def get_config(arg: str = "") -> ConfigDict:
    config = base()
    config.task = {"name": "language_model", "label_smoothing": 0.0, "z_loss": 0.0}
    config.data = {"name": "stdlib"}
    config.model = {
        "name": "transformer",
        "context": 1024,
        "width": 192,
        "layers": 4,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 0,
        "pattern": "G",
        "window": 0,
        "rope_base": 10000.0,
        "qk_norm": True,
        "mlp": "squared_relu",
        "mlp_width": 768,
        "norm": "rms",
        "conv": 0,
        "dropout": 0.0,
        "tie_embeddings": False,
        "zero_init": True,
        "dtype": "float32",
        "attention": "dense",
        "scan_layers": False,
        "remat": False,
    }
    config.stream = {"batch": 16, "length": 256}
    config.optimizer = {"name": "muon", "learning_rate": 0.02}
    config.evaluate = {"every": 500, "batch": 16, "length": 512, "context": 256, "windows": 64}
    config.sample = {"prompt": "def ", "tokens": 300, "temperature": 0.8, "top_k": 0}
    config.train.steps = 400
    config.checkpoint.update({"every": 500, "keep_best": 1, "best": "val/bits_per_byte"})
    return config
