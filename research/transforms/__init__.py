"""Transforms: Task -> Task."""

from research.transforms import _augmentations as augmentations
from research.transforms.anil import anil
from research.transforms.augment import augment
from research.transforms.bilevel import bilevel, decayed, hyper
from research.transforms.cavia import cavia
from research.transforms.distill import distill, teach
from research.transforms.drawn import drawn
from research.transforms.imaml import imaml
from research.transforms.learned_loss import learned_loss, with_learned_loss
from research.transforms.maml import maml
from research.transforms.matching import matching
from research.transforms.meta_sgd import meta_sgd
from research.transforms.mixture import mixture
from research.transforms.over_tasks import over_tasks
from research.transforms.prototypical import prototypical
from research.transforms.reptile import reptile
from research.transforms.ridge_head import ridge_head
from research.transforms.unroll import unroll

__all__ = [
    "anil",
    "augment",
    "augmentations",
    "bilevel",
    "cavia",
    "decayed",
    "distill",
    "drawn",
    "hyper",
    "imaml",
    "learned_loss",
    "maml",
    "matching",
    "meta_sgd",
    "mixture",
    "over_tasks",
    "prototypical",
    "reptile",
    "ridge_head",
    "teach",
    "unroll",
    "with_learned_loss",
]
