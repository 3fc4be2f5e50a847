"""Masks as a config writes them: what they mean, what is refused, and how far they reach."""

import numpy as np
import pytest

from pallas_kernels.attention import masks
from research.nn.masks import FUNCTIONS, causally, layered, parse, reach

GOOD = {
    "full()": masks.full(),
    " causal() ": masks.causal(),
    "window(63, 0)": masks.window(63, 0),
    "window(left=3, right=None)": masks.window(3, None),
    "window(511, 0) | global_tokens(64)": masks.window(511, 0) | masks.global_tokens(64),
    "causal() & (window(8, 0) | strided(8))": masks.causal() & (masks.window(8, 0) | masks.strided(8)),
    "~prefix(4)": ~masks.prefix(4),
    "global_tokens([0, 7])": masks.global_tokens([0, 7]),
    "document([0, 0, 1])": masks.document([0, 0, 1]),
    "dilated(2, 0, 3)": masks.dilated(2, 0, 3),
    "block_window(4, 1, 0)": masks.block_window(4, 1, 0),
    "random_blocks(-1, 4, 1, 16, heads=2)": masks.random_blocks(-1, 4, 1, 16, heads=2),
    "bigbird(0, 2, 16, count=1)": masks.bigbird(0, 2, 16, count=1),
    "per_head(full(), causal())": masks.per_head(masks.full(), masks.causal()),
}


@pytest.mark.parametrize("text", GOOD)
def test_an_expression_is_the_mask_that_python_would_make(text):
    assert parse(text, "mask") == GOOD[text]


def test_every_mask_but_those_of_functions_can_be_written():
    public = {name for name, value in vars(masks).items() if getattr(value, "__module__", "") == masks.__name__}
    assert {name for name in public if not name.startswith("_")} - {"from_function"} == set(FUNCTIONS)
    assert all(any(f"{name}(" in text for text in GOOD) for name in FUNCTIONS)


BAD = {
    "windw(3, 0)": "windw is unknown; allowed: bigbird, block_window, causal, .*; nearest: 'window'$",
    "from_function(3)": "from_function is unknown; allowed: ",
    "__import__('os').system('true')": r".* is not understood; allowed: calls of masks with integers, None, lists and masks",
    "().__class__": "is not understood",
    "[full() for _ in [1]]": "is not understood",
    "(lambda: full())()": "is not understood",
    "full() if 1 else 2": "is not understood",
    "full() + full()": "is not understood",
    "not full()": "is not understood",
    "window": r"window is not called; allowed: window\(left, right\)$",
    "window(1)": r"window: missing a required argument: 'right'; allowed: window\(left, right\)$",
    "window(1, 2, up=3)": r"window: got an unexpected keyword argument 'up'; allowed: window\(left, right\)$",
    "window(-1, 0)": "window's left: got -1, wanted a whole number >= 0$",
    "window(1.5, 0)": "1.5 is not understood",
    "window(True, 0)": "True is not understood",
    "window('3', 0)": "'3' is not understood",
    "window(10**9, 0)": r"10 \*\* 9 is not understood",
    "window(99999999999, 0)": "99999999999 is too large; allowed: at most 2147483647$",
    "window(*[1, 0])": "is not understood",
    "window(**{})": r"\*\*{} is not understood; allowed: window\(left, right\)$",
    "prefix(full())": r"prefix does not take full\(\); allowed: prefix\(n\)$",
    "per_head(1)": r"per_head does not take 1; allowed: per_head\(masks\)$",
    "per_head()": "per_head: got no masks, wanted one a query head$",
    "per_head(random_blocks(0, 1, 1, 4, 2))": "per_head takes masks that are the same for all heads$",
    "random_blocks([1], 8, 1, 64)": r"random_blocks' key: got \[1\], wanted an int or a JAX key$",
    "global_tokens(None)": "global_tokens: got None, wanted a whole number or a sequence of them$",
    "document([1, [2]])": r"document's ids: got \[1, \[2\]\], wanted integers \[length\] or \[batch, length\]$",
    "full() & 3": "3 is no mask; allowed: ",
    "3": "3 is no mask",
    "[full()]": r"\[full\(\)\] is no mask",
    "": "is no expression",
    "full(": "is no expression",
    "import os": "is no expression",
    "\x00": "null bytes",
    "~" * 100_000 + "full()": "is nested too deeply; allowed: ",
    "full()" + " & full()" * 20_000: "is nested too deeply; allowed: ",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:30].replace("\x00", "0"))
def test_what_is_no_mask_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match=BAD[text]) as error:
        parse(text, "model.attention.mask[1]")
    assert "\n" not in str(error.value)
    if text != "\x00":
        assert str(error.value).startswith(f"model.attention.mask[1]={text!r}"[:50])


def section(*mask, implementation=""):
    return {"mask": list(mask), "implementation": implementation}


def test_a_section_gives_masks_one_a_layer_and_an_implementation():
    made, implementation = layered(section("window(3, None)", "full()"), 4, 2, causal=True)
    assert made == (masks.window(3, 0), masks.causal()) and implementation is None
    assert layered(section("full()", implementation=None), 4, 2, causal=False) == ((masks.full(),), None)
    assert layered(section("full()", implementation="xla"), 4, 2, causal=False)[1] == "xla"


SECTIONS = [
    ("blockwise", "model.attention='blockwise' is no section; allowed: mask, implementation, as in {'mask': ['full()'], "),
    ({"mask": ["full()"]}, "model.attention lacks model.attention.implementation; given: mask"),
    (section("full()") | {"window": 3}, "model.attention.window is unknown; allowed in model.attention: mask, implementation"),
    ({"mask": "full()", "implementation": ""}, "model.attention.mask='full()' is of the wrong type; allowed: Sequence"),
    (section(), "model.attention.mask=[] must have an expression or more"),
    (section("full()", "full()", "full()"), "model.layers=4 is not divisible by the number of masks in model.attention.mask=3"),
    (section("full()", "ful()"), "model.attention.mask[1]='ful()': ful is unknown; allowed: "),
    (section("full()", implementation="flash"), "model.attention.implementation='flash' is unknown; allowed: gpu, reference, "),
    (section("per_head(full())"), "model.attention.mask[0]='per_head(full())': it is of 1 heads; allowed: model.heads=2, or "),
    (
        section("document([[0], [1]])"),
        "model.attention.mask[0]='document([[0], [1]])': it tells the sequences of a batch apart",
    ),
]


@pytest.mark.parametrize(
    "text", ["~causal()", "window(9, 0) & ~causal()", "~full()", "per_head(full(), ~causal())", "prefix(0)", "~window(2000, 0)"]
)
def test_a_mask_by_which_no_query_sees_a_key_is_refused(text):
    """And one by which some do is not, be it far away or for a while nothing."""
    if text != "~window(2000, 0)":
        with pytest.raises(
            ValueError, match=r"^model.attention.mask\[0\]='.*': no query sees any key; a decoder's .*; allowed: a"
        ) as e:
            layered(section(text), 4, 2, causal=True)
        assert "\n" not in str(e.value)
    seeing = ["~window(2000, 0)", "global_tokens([3000])", "global_tokens([9000])", "strided(3)", "~prefix(5000)"]
    layered(section(*seeing[:4]), 4, 2, causal=True)
    layered(section("~causal()", seeing[4]), 4, 2, causal=False)
    with pytest.raises(ValueError, match=r"no query sees any key; allowed: a mask"):
        layered(section("~full()"), 4, 2, causal=False)


@pytest.mark.parametrize("given, message", SECTIONS)
def test_a_section_that_cannot_be_is_refused_in_one_line_by_key(given, message):
    with pytest.raises(ValueError) as error:
        layered(given, 4, 2, causal=True)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


REACHES = {
    "window(3, 0)": 3,
    "window(3, 2)": 3,
    "full()": None,
    "prefix(2) & window(3, 0)": 3,
    "dilated(2, 0, 3)": 6,
    "window(3, 0) & (full() | window(1, 0))": 3,
    "window(3, 0) | window(5, 0)": 5,
    "window(3, 0) | global_tokens(1)": None,
    "~window(3, 0)": None,
    "block_window(4, 1, 0)": None,
    "per_head(window(3, 0), window(1, 0))": None,
    "window(3, 0) & per_head(full(), strided(2))": None,
}


@pytest.mark.parametrize("text", REACHES)
def test_nothing_is_seen_beyond_the_reach_and_nothing_to_come(text):
    mask = causally(parse(text, "mask"))
    assert reach(mask) == REACHES[text]
    q, kv = np.arange(12)[:, None], np.arange(12)[None]
    for head in range(2):
        seen, given = mask(0, head, q, kv), parse(text, "mask")(0, head, q, kv)
        np.testing.assert_array_equal(seen, given & (kv <= q))
        if reach(mask) is not None:
            assert (q - kv)[seen].max() == reach(mask)
