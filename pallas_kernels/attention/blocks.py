"""Block sizes: one table by implementation and device, the shape deciding within a row."""

from __future__ import annotations
