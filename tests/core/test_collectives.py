"""What a program's text says of its collectives is what it was written to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from research.core.collectives import Collective, collectives, totals
from research.core.mesh import entered, make_layout


def text_of(f, x, spec=P("data"), out=P("data")):
    with entered(make_layout({"data": 4})):
        return jax.jit(jax.shard_map(f, in_specs=spec, out_specs=out, check_vma=False)).lower(x).compile().as_text()


@pytest.mark.parametrize(
    "f, kind, size",
    [
        (lambda x: jax.lax.all_gather(x, "data"), "all-gather", 4 * 2 * 3 * 4),
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 2 * 3 * 4),
        (lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 2), (2, 3), (3, 0)]), "collective-permute", 2 * 3 * 4),
        (lambda x: jax.lax.all_to_all(jnp.tile(x, (2, 1)), "data", 0, 0), "all-to-all", 4 * 3 * 4),
    ],
)
def test_kind_and_bytes_on_one_device(f, kind, size):
    found = collectives(text_of(f, jnp.zeros((8, 3))))
    assert totals(found) == {kind: (1, size)}


def test_those_of_a_loop_count_as_often_as_it_turns():
    def f(x):
        return jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.psum(x, "data") / 4, jax.lax.psum(x, "data"))

    found = collectives(text_of(f, jnp.zeros((8, 3))))
    assert sorted(c.times for c in found) == [1, 5] and totals(found)["all-reduce"] == (6, 6 * 24)


def test_one_that_is_only_started_counts_what_it_will_make():
    text = """HloModule m

ENTRY %main (x: f32[2,3]) -> f32[8,3] {
  %x = f32[2,3]{1,0} parameter(0)
  %a = (f32[2,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%x), dimensions={0}, metadata={op_name="jit(f)/gathered"}
  %p = (bf16[2,3]{1,0}, bf16[2,3]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  ROOT %d = f32[8,3]{1,0} all-gather-done(%a)
}
"""
    assert collectives(text) == [
        Collective("all-gather", 1, 96, "jit(f)/gathered"),
        Collective("collective-permute", 1, 12, ""),
    ]


def test_a_program_of_one_device_says_nothing():
    assert collectives(jax.jit(jnp.sin).lower(jnp.zeros(3)).compile().as_text()) == []
