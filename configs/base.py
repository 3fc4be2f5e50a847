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
            "train": {"steps": 0, "steps_per_call": 1, "log_every": 50, "replay": True},
            "checkpoint": {"every": 0, "keep_latest": 2, "keep_best": 0, "best": "", "mode": "min"},
            "early_stopping": {"metric": "", "patience": 0, "mode": "min"},  # patience 0: never
            "warm_start": {"workdir": "", "rename": []},  # rename=["pattern->replacement"]
            "mesh": {"data": 1, "fsdp": 1},  # sizes; one may be -1
            "rules": {"batch": ["data", "fsdp"], "embed": ["fsdp"]},  # logical name -> mesh axes
        }
    )
