"""Every implementation gives the reference's values and gradients, on every case; hypothesis makes more of them."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings

from tests.pallas_kernels.attention import cases
from tests.pallas_kernels.attention.cases import CASES, CAUSAL, KERNEL, Case
from tests.pallas_kernels.attention.implementations import ALIKE, ALL, CHECKED, COMBINED, EACH, KERNELS, of, slow
from tests.pallas_kernels.attention.strategies import calls
from tests.pallas_kernels.kernel_base import (
    Results,
    equals,
    equals_oracle,
    identical,
    of_reference,
    results,
    rounds_as_plain,
    runner,
    same_results,
)


@functools.cache
def reference(name: str) -> Results:
    return of_reference(KERNEL, CASES[name])


@functools.cache
def adapted(implementation: str, name: str) -> tuple[Case, Results]:
    """The case as the implementation can have it, and the reference's results."""
    case = CHECKED[implementation].adapted(CASES[name])
    return case, reference(name) if case == CASES[name] else of_reference(KERNEL, case)


def on_cases():
    """Interpreted kernels are not run on what is ALIKE."""
    for implementation in CHECKED:
        for name in CASES:
            if name not in ALIKE:
                yield pytest.param(implementation, name, marks=pytest.mark.slow if name in COMBINED else slow(implementation))
            elif implementation not in KERNELS:
                yield pytest.param(implementation, name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in CASES])
def test_the_reference_is_the_definition(name):
    """Values and gradients of the reference are those of the oracle."""
    equals_oracle(KERNEL, CASES[name], reference(name))


@pytest.mark.parametrize("implementation, name", list(on_cases()))
def test_values_and_gradients_are_the_references(implementation, name):
    case, expected = adapted(implementation, name)
    with CHECKED[implementation].context():
        equals(KERNEL, case, implementation, expected)


@pytest.mark.parametrize("implementation", EACH)
def test_with_all_of_the_compilers_optimizations_too(implementation):
    case, expected = adapted(implementation, "everything")
    with CHECKED[implementation].context():
        equals(KERNEL, case, implementation, expected, quick=False)


PLAIN = {
    "causal": ({"is_causal": True}, Case(CAUSAL, q_len=129, kv_len=129, d_qk=32, d_v=32, lse=False)),
    "window": ({"local_window_size": (9, 4)}, Case(["window", 9, 4], kv_heads=1, d_qk=32, d_v=32, lse=False)),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("implementation", EACH)
def test_bfloat16_is_at_most_twice_as_far_from_the_truth_as_jaxs_own(implementation, name):
    arguments, case = PLAIN[name]
    checked = of(implementation)
    with checked.context():
        case = checked.adapted(case)
        rounds_as_plain(
            KERNEL, case, implementation, lambda of: jax.nn.dot_product_attention(of["q"], of["k"], of["v"], **arguments)
        )


@pytest.mark.parametrize("implementation", ALL)
def test_the_same_call_gives_the_same_bits(implementation):
    """Also compiled anew: nothing depends on what was compiled before, or on the order of threads."""
    case = CASES["learned score"]
    checked = of(implementation)
    with checked.context():
        case = checked.adapted(case)
        arrays = cases.arrays(case)
        identical(results(cases.call(case, implementation), arrays), results(cases.call(case, implementation), arrays))


# Keys that are not numbers. Where the reference is NaN is seen in the comparison, which wants NaN in the same places.

BAD = {"NaN": np.nan, "infinite": np.inf, "minus infinite": -np.inf}
POISONED = {
    "keys that nobody sees": (Case(["prefix", 40], sinks=True), slice(40, 60)),
    "keys that no segment has": (Case(["full"], batch=1, segments=([[0] * 67], [[0] * 30 + [1] * 37])), slice(30, 67)),
    "keys that are not selected": (Case(cases.selected(cases.PICKS % 2, ["full"])), slice(64, 67)),
    "keys in the future of most": (Case(CAUSAL), slice(50, 51)),
    "keys at an offset": (Case(["window", 9, 0], q_len=31, offset=(36,), traced=True), slice(0, 27)),
}


@pytest.mark.parametrize("name", POISONED)
@pytest.mark.parametrize("implementation", ALL)
def test_keys_that_are_not_finite_change_only_what_sees_them(implementation, name):
    checked = of(implementation)
    case, where = POISONED[name]
    each = list(zip(BAD.items(), ("k", "v", "k")))
    if implementation in KERNELS:  # one each: interpreted, a call takes seconds
        each = [each[list(POISONED).index(name) % len(each)]]
    with checked.context():
        case = checked.adapted(case)
        seen = cases.seen(case)
        arrays = cases.arrays(case)
        run = runner(cases.call(case, implementation))
        clean = run(arrays)
        for (bad, value), operand in each:
            dirty = {n: x.copy() for n, x in arrays.items()}
            dirty[operand][:, where, :, 3] = value
            got = run(dirty)
            touched = seen[..., where].any(-1).swapaxes(1, 2)  # [batch, q_len, heads]
            out, lse = got.values
            np.testing.assert_array_equal(np.isnan(out).all(-1), touched, bad)
            np.testing.assert_array_equal(np.isnan(lse), touched, bad)
            for mine, theirs in ((out, clean.values[0]), (lse, clean.values[1]), (got.gradients["q"], clean.gradients["q"])):
                np.testing.assert_array_equal(np.asarray(mine)[~touched], np.asarray(theirs)[~touched], bad)
            blind = ~(seen & ~seen[..., where].any(-1, keepdims=True)).any((1, 2))  # keys that only touched queries see
            reached = (seen & seen[..., where].any(-1, keepdims=True)).any((1, 2))
            for n in "kv":
                finite = np.isfinite(got.gradients[n]).all((-2, -1))
                assert finite[~reached].all(), (bad, n)
                assert not finite[reached & blind].any(), (bad, n)
        if not touched.any():
            same_results(got, clean, 0, 0)


@pytest.mark.parametrize("implementation", ALL)
def test_who_sees_nothing_gets_nothing_and_gives_nothing(implementation):
    """Zero, log-sum-exp -inf, zero gradients, without a NaN on the way; with a sink, the log-sum-exp is the sink."""
    checked = of(implementation)
    for name in ("fewer keys, nothing seen", "nothing seen at all", "fewer keys"):
        with checked.context():
            case = checked.adapted(CASES[name])
            blind = ~cases.seen(case).any(-1).swapaxes(1, 2)
            arrays = cases.arrays(case)
            got = results(cases.call(case, implementation), arrays)
            assert blind.any()
            assert (np.asarray(got.values[0])[blind] == 0).all()
            assert (np.asarray(got.gradients["q"])[blind] == 0).all()
            assert all(np.isfinite(x).all() for x in got.gradients.values())
            lse = np.broadcast_to(arrays["sinks"], blind.shape)[blind] if case.sinks else -np.inf
            np.testing.assert_allclose(np.asarray(got.values[1])[blind], lse, rtol=1e-6)
            if blind.all():
                assert all((np.asarray(x) == 0).all() for x in got.gradients.values())


# Cases that hypothesis makes.


def equals_the_definition(implementation, case):
    with CHECKED[implementation].context():
        case = CHECKED[implementation].adapted(case)
        equals_oracle(KERNEL, case, results(cases.call(case, implementation), cases.arrays(case)))


@settings(max_examples=3)
@given(case=calls())
def test_what_hypothesis_makes_equals_the_definition(case):
    equals_the_definition("xla", case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=30)
@given(case=calls())
def test_much_of_what_hypothesis_makes_equals_the_definition(case):
    equals_the_definition("xla", case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=8)
@given(case=calls())
@pytest.mark.parametrize("implementation", KERNELS)
def test_what_hypothesis_makes_equals_the_definition_in_kernels(implementation, case):
    equals_the_definition(implementation, case)
