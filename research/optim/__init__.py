"""Optimizers from plain values: `make(config, steps=...)`."""

from research.optim.build import OPTIMIZERS, Core, Optimizer, chained, describe, make, optimizer
from research.optim.groups import group
from research.optim.muon import scale_by_muon
from research.optim.rates import rates, scale_by_rates
from research.optim.schedules import SCHEDULES, schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Core",
    "Optimizer",
    "chained",
    "describe",
    "group",
    "make",
    "optimizer",
    "rates",
    "scale_by_muon",
    "scale_by_rates",
    "schedule",
]
