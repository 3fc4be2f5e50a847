"""What most configs begin with; each says what it changes. Every key that a run reads is here or in the config itself."""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """The sections that all kinds of task share; `task`, `model`, `data`, `stream` and `optimizer` are the config's own."""
    return ConfigDict(
        {
            "seed": 0,
            "transforms": {"wrap": []},  # Task -> Task, innermost first, such as ["augment"]
            "estimate": {"name": "exact", "wrap": []},  # such as wrap=["accumulated"] with accumulated={"n": 4}
            "learner": {"wrap": [], "watch": {}},  # around the gradient learner; watch={"group": "regular expression"}
            # stall_after: seconds without a step after which every process prints its stacks; 0: never
            "train": {"steps": 0, "steps_per_call": 1, "log_every": 50, "replay": True, "stall_after": 0.0},
            "checkpoint": {"every": 0, "keep_latest": 2, "keep_best": 0, "best": "", "mode": "min"},
            "early_stopping": {"metric": "", "patience": 0, "mode": "min"},  # patience 0: never
            "warm_start": {"workdir": "", "rename": []},  # rename=["pattern->replacement"]
            # Sizes of the mesh's axes; one may be -1, for all devices that are left.
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1, "pipeline": 1, "population": 1},
            # How layers run where mesh.pipeline is above 1: "gpipe", or "interleaved" with 2 groups or more; nn/pipeline.py.
            "pipeline": {"schedule": "gpipe", "microbatches": 4, "groups": 1, "remat": True},
            # Logical name of a dimension -> the mesh axes that it is laid over; docs/meshes.md has the picture.
            "rules": {
                "batch": ["data", "fsdp"],
                "length": ["sequence"],
                "embed": ["fsdp"],
                "mlp": ["tensor"],
                "heads": ["tensor"],
                "kv_heads": ["tensor"],
                "vocab": ["tensor"],
                "layers": ["pipeline"],
                "matrices": ["pipeline", "fsdp", "tensor"],  # whole, each on one device: what Muon, SOAP, Shampoo do to them
                "population": ["population"],
                "particles": ["data", "fsdp"],
            },
        }
    )
