"""A byte-level transformer on the source of the Python standard library, which every machine has.

    make train                                                   # this config, about four minutes on 2 cores
    gnomon train --config configs/lm/stdlib.py:30min             # as low as half an hour goes
    gnomon train --config configs/lm/stdlib.py:smoke             # half a minute

Expected: see docs/results.md. Split by sha256 of the path (data/stdlib.py); settings were chosen on the validation split.
Sliding attention, hashed n-gram embeddings, and embeddings of what followed the last few bytes when they last occurred, which
are induction heads wired by hand (nn/ngrams.py). Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
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
        "context": 2048,
        "width": 256,
        "layers": 2,
        "heads": 2,
        "kv_heads": 2,
        "head_dim": 64,
        "attention": {"mask": ["window(63, 0)"], "implementation": ""},
        "rope_base": 10000.0,
        "qk_norm": 3.0,
        "mlp": "squared_relu",
        "mlp_width": 1024,
        "norm": "rms",
        "conv": 4,
        "dropout": 0.0,
        "ngrams": [2, 3, 4, 5],
        "ngram_bits": 14,
        "ngram_width": 64,
        "induction": [3, 4, 6, 8, 12, 16, 24],
        "copy": True,
        "tie_embeddings": False,
        "embed_scale": 0.5,
        "embed_norm": True,
        "zero_init": True,
        "dtype": "bfloat16",
        "scan_layers": False,
        "remat": ["none"],
    }
    config.stream = {"batch": 2, "length": 2048}
    config.optimizer = {
        "name": "muon",
        "learning_rate": 0.02,
        "adam_learning_rate": 0.008,
        "adam_match": "embed|tables|head|norm|scale|bias|conv|copy",
        "schedule": {"name": "wsd", "warmup": 20, "decay": 0.7},
    }
    config.evaluate = {"every": 350, "batch": 8, "length": 2048, "context": 512, "windows": 32}
    config.sample = {"prompt": "def ", "tokens": 400, "temperature": 0.7, "top_k": 0}
    config.closing = ["compressors", "sample"]
    config.train.steps = 700
    config.checkpoint.update({"every": 350, "keep_best": 1, "best": "val/bits_per_byte"})
    if arg == "30min":
        config.model.layers = 3
        config.train.steps = 3000
        config.evaluate.every = 500
    if arg == "smoke":
        config.model.update({"width": 64, "layers": 4, "heads": 4, "kv_heads": 4, "head_dim": 16, "mlp_width": 128})
        config.model.update({"context": 512, "ngram_bits": 10, "ngram_width": 16, "induction": [3, 6], "dtype": "float32"})
        config.stream = {"batch": 8, "length": 64}
        config.optimizer.update({"dtype": "float32", "schedule": {"name": "wsd", "warmup": 2, "decay": 0.5}})
        config.train.update({"steps": 24, "log_every": 4})
        config.evaluate.update({"every": 0, "batch": 16, "length": 512, "context": 0})
        config.sample.tokens = 100
        config.closing = ["sample"]
        config.checkpoint.every = 8
    return config
