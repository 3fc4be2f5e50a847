"""Sizes that cannot work, refused in one line that names the config's keys, before anything is built."""

from __future__ import annotations


def positive(name: str, value: int) -> None:
    """Raises ValueError unless value >= 1."""
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")


def divisible(name: str, value: int, by_name: str, by: int) -> None:
    """Raises ValueError unless value is a positive multiple of a positive `by`; names the nearest multiples."""
    positive(by_name, by)
    positive(name, value)
    if value % by:
        below, above = value // by * by, (value // by + 1) * by
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{name}={value} is not divisible by {by_name}={by}; nearest: {nearest}")


def not_negative(name: str, value: float) -> None:
    """Raises ValueError unless value >= 0."""
    if value < 0:
        raise ValueError(f"{name}={value} must be at least 0")


def fraction(name: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} must be at least 0 and below 1")
