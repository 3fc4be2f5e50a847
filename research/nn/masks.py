"""Which positions a layer's queries see: masks as a config writes them, and what a cache has to know of one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pallas_kernels.attention import block_mask, masks
from pallas_kernels.attention.algebra import Both, Either, Mask
from pallas_kernels.attention.api import IMPLEMENTATIONS
from pallas_kernels.attention.patterns import BlockWindow, Everything, Window
from research.core.names import call_checked, choose, suggestion
from research.nn import checks

FUNCTIONS: Mapping[str, Callable[..., Mask]] = {
    "bigbird": masks.bigbird,
    "block_window": masks.block_window,
    "causal": masks.causal,
    "dilated": masks.dilated,
    "document": masks.document,
    "full": masks.full,
    "global_tokens": masks.global_tokens,
    "per_head": masks.per_head,
    "prefix": masks.prefix,
    "random_blocks": masks.random_blocks,
    "strided": masks.strided,
    "window": masks.window,
}
LARGEST = 2**31 - 1  # positions are int32
LOOKED_AT = 4096  # positions, for whether a mask sees anything
ALLOWED = "calls of masks with integers, None, lists and masks, joined by & | ~"


def parse(expression: str, where: str) -> Mask:
    """The mask that an expression in Python's syntax says, such as "window(511, 0) | global_tokens(64)", without running it.

    It is made of calls of FUNCTIONS, whose arguments are integers, None, lists of these and masks, and of & | ~ and
    parentheses. `where` names the config's key. Raises ValueError (one line) for anything else: what was given, what is
    allowed, the nearest match.
    """
    at = f"{where}={expression!r}"
    try:
        found = _value(ast.parse(expression.strip(), mode="eval").body, at)
    except SyntaxError as error:
        raise ValueError(f"{at} is no expression ({error.msg}); allowed: {ALLOWED}") from None
    except (RecursionError, MemoryError):
        raise ValueError(f"{at[:80]}… is nested too deeply; allowed: {ALLOWED}") from None
    return _mask(found, at)


def _value(node: ast.expr, at: str) -> Any:
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return _called(name, node, at)
        case ast.BinOp(op=ast.BitAnd()):
            return _mask(_value(node.left, at), at) & _mask(_value(node.right, at), at)
        case ast.BinOp(op=ast.BitOr()):
            return _mask(_value(node.left, at), at) | _mask(_value(node.right, at), at)
        case ast.UnaryOp(op=ast.Invert()):
            return ~_mask(_value(node.operand, at), at)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))) if type(number) is int:
            return _within(-number, at)
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=int(number)) if type(number) is int:  # not a bool
            return _within(number, at)
        case ast.List():
            return [_value(one, at) for one in node.elts]
        case ast.Name(id=name) if name in FUNCTIONS:
            raise ValueError(f"{at}: {name} is not called; allowed: {_signature(name)}")
    raise ValueError(f"{at}: {ast.unparse(node)} is not understood; allowed: {ALLOWED}")


def _within(number: int, at: str) -> int:
    if abs(number) > LARGEST:
        raise ValueError(f"{at}: {number} is too large; allowed: at most {LARGEST}")
    return number


def _mask(value: Any, at: str) -> Mask:
    if not isinstance(value, Mask):
        raise ValueError(f"{at}: {value!r} is no mask; allowed: {ALLOWED}")
    return value


def _signature(name: str) -> str:
    return f"{name}({', '.join(inspect.signature(FUNCTIONS[name]).parameters)})"


def _called(name: str, call: ast.Call, at: str) -> Mask:
    if name not in FUNCTIONS:
        raise ValueError(f"{at}: {name} is unknown; allowed: {', '.join(FUNCTIONS)}{suggestion(name, FUNCTIONS)}")
    args = [_value(one, at) for one in call.args]
    named: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise ValueError(f"{at}: **{ast.unparse(keyword.value)} is not understood; allowed: {_signature(name)}")
        named[keyword.arg] = _value(keyword.value, at)
    try:
        inspect.signature(FUNCTIONS[name]).bind(*args, **named)
    except TypeError as error:
        raise ValueError(f"{at}: {name}: {error}; allowed: {_signature(name)}") from None
    for value in (*args, *named.values()):
        if isinstance(value, Mask) is not (name == "per_head"):
            raise ValueError(f"{at}: {name} does not take {value!r}; allowed: {_signature(name)}")
    try:
        return FUNCTIONS[name](*args, **named)
    except TypeError:
        raise ValueError(f"{at}: {ast.unparse(call)} is not understood; allowed: {_signature(name)}") from None
    except ValueError as error:
        raise ValueError(f"{at}: {str(error).splitlines()[0]}") from None


def layered(section: Any, layers: int, heads: int, *, causal: bool) -> tuple[tuple[Mask, ...], str | None]:
    """(masks, one a layer, repeated over the layers; implementation, None for the best) of a config's section
    `model.attention`: {"mask": expressions, "implementation": a name, or "" or None for the best that supports the call}.

    causal: no layer sees what comes later, whatever its mask says. Raises ValueError (one line), naming the config's key, for
    what cannot be and for a mask by which no query sees any key.
    """
    if not isinstance(section, Mapping):
        raise ValueError(
            f"model.attention={section!r} is no section; allowed: mask, implementation, as in "
            "{'mask': ['full()'], 'implementation': ''}"
        )

    def read(*, mask: Sequence[str], implementation: str | None) -> tuple[tuple[Mask, ...], str | None]:
        if not mask:
            raise ValueError("model.attention.mask=[] must have an expression or more, one a layer, such as 'full()'")
        checks.divisible("model.layers", layers, "the number of masks in model.attention.mask", len(mask))
        if implementation:
            choose(IMPLEMENTATIONS, implementation, "model.attention.implementation")
        made = (_of_a_layer(text, f"model.attention.mask[{i}]", heads, causal) for i, text in enumerate(mask))
        return tuple(made), implementation or None

    return call_checked(read, section, "model.attention")


def _of_a_layer(expression: str, where: str, heads: int, causal: bool) -> Mask:
    mask = parse(expression, where)
    try:
        mask = causally(mask) if causal else mask
        if mask.batch:
            raise ValueError("it tells the sequences of a batch apart; allowed: a mask that all of them share")
        if mask.heads not in (0, heads):
            raise ValueError(f"it is of {mask.heads} heads; allowed: model.heads={heads}, or one that all of them share")
        if sees_nothing(mask):
            later = "; a decoder's masks are & causal(), which need not be written" if causal else ""
            raise ValueError(f"no query sees any key{later}; allowed: a mask that sees something, such as 'full()'")
    except ValueError as error:
        raise ValueError(f"{where}={expression!r}: {error}") from None
    return mask


def sees_nothing(mask: Mask) -> bool:
    """Whether no query sees any key in some head, as far as twice the positions that the mask names; one that names positions
    beyond LOOKED_AT is not looked at."""
    far = _named(mask)
    if far > LOOKED_AT:
        return False
    length = mask.length or 2 * far + 64
    for n in (min(64, length), length):  # nearly all masks show something at once
        blocks = block_mask(mask, n, n, 64, 64)
        if all(blocks.table(h=h).any() for h in range(blocks.heads)):
            return False
    return True


def _named(value: Any) -> int:
    """The largest position that a mask, or a part of one, names."""
    if isinstance(value, BlockWindow):
        return value.size * (max(value.left, value.right) + 1)
    if isinstance(value, Mask):
        return max([value.length or 0, *(_named(getattr(value, field.name)) for field in dataclasses.fields(value))])
    if isinstance(value, tuple):
        return max(map(_named, value), default=0)
    return abs(value) if isinstance(value, int) else 0


def causally(mask: Mask) -> Mask:
    """The mask & causal(); of a window, the window to the left."""
    if isinstance(mask, Everything):
        return masks.causal()
    return Window(mask.left, 0) if isinstance(mask, Window) else mask & masks.causal()


def reach(mask: Mask) -> int | None:
    """How many positions before its own a query sees at most, for a mask that says so for all positions and heads; else None.

    A cache of as many and one more positions is enough then, however long the context.
    """
    if mask.heads:
        return None
    if isinstance(mask, Window):
        return mask.left
    if isinstance(mask, Both | Either):
        ends = [end for one in (mask.left, mask.right) if (end := reach(one)) is not None]
        if isinstance(mask, Both):
            return min(ends, default=None)
        return max(ends) if len(ends) == 2 else None
    return None
