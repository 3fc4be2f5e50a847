"""Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): a small CNN, or a ViT.

    gnomon data fashion-mnist                                    # once: finds or fetches the four files
    gnomon train --config configs/vision/fashion_mnist.py        # the CNN
    gnomon train --config configs/vision/fashion_mnist.py:vit

Settings were chosen on 5,000 of the 60,000 training images ("val"); "test" is measured once, at the end.
Expected: see docs/results.md. The data set's README has 0.916 for two convolutions with pooling, 0.925 below 100k parameters.
"""

from ml_collections import ConfigDict

from configs.base import base

ARGS = ("smoke", "vit", "vit_smoke")

CNN = {
    "name": "cnn",
    "widths": [16, 32, 64],
    "blocks": 2,
    "normalization": "batch",
    "residual": False,
    "dropout": 0.0,
    "dtype": "float32",
    "convolution": "lax",
}
VIT = {
    "name": "vit",
    "patch": 4,
    "width": 96,
    "layers": 4,
    "heads": 4,
    "attention": {"mask": ["full()"], "implementation": ""},
    "qk_norm": 1.0,
    "mlp": "gelu",
    "mlp_width": 192,
    "norm": "layer",
    "dropout": 0.0,
    "zero_init": True,
    "dtype": "float32",
    "scan_layers": False,
    "remat": ["none"],
}


ADAMW = {
    "name": "adamw",
    "learning_rate": 2e-3,
    "weight_decay": 0.05,
    "clip": 1.0,
    "schedule": {"name": "cosine", "warmup": 200},
}
# A convolution's kernel [height, width, in, out] is one matrix from its patches to its outputs.
MUON = {
    "name": "muon",
    "learning_rate": 0.02,
    "weight_decay": 0.05,
    "adam_learning_rate": 4e-3,
    "adam_match": "head|norm|bias",
    "layouts": {"convolutions": {"match": "kernel", "inputs": 3}},
    "clip": 1.0,
    "schedule": {"name": "cosine", "warmup": 100},
}


def get_config(arg: str = "") -> ConfigDict:
    config = base()
    vit = arg.startswith("vit")
    config.task = {"name": "classification", "label_smoothing": 0.1 if vit else 0.0}
    config.data = {"name": "fashion_mnist"}
    config.model = VIT if vit else CNN
    config.stream = {"batch": 128, "validation": 5000, "bad_records": "raise"}
    config.transforms = {"wrap": ["augment"], "augment": {"crop": 2 if vit else 1, "flip": True}}
    config.optimizer = ADAMW if vit else MUON
    config.evaluate = {"every": 500, "batch": 500}
    config.train.update({"steps": 4500, "log_every": 50})
    config.checkpoint.update({"every": 500, "keep_best": 1, "best": "val/accuracy", "mode": "max"})
    if arg.endswith("smoke"):
        config.stream.batch = 16
        config.optimizer.schedule.warmup = 2
        config.train.update({"steps": 20, "log_every": 5})
        config.evaluate.every = 0
    return config
