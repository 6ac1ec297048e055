"""How many members to run at once, where nobody says: a function of the program.

Not of time, of how many devices or members there are, or of what else the machine does,
so that a sweep has the same bits today and tomorrow, here and there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core

from jax_rmsprop._sweep._trace import Traced, inner_jaxprs

# As many as hide what a CPU spends on each operation besides the arithmetic; an
# accelerator wants all that it can hold.
_AT_MOST = {"cpu": 128}
_AT_MOST_ELSEWHERE = 1024
# Bytes of cache that a core of today's processors has for itself, about.
_CACHE_BYTES = 4_000_000
# A CPU's compiler runs a convolution whose kernels are the members' own group by group.
_AT_MOST_CONVOLUTIONS = 4


def auto_batch_size(
    traced: Sequence[Traced],
    platform: str,
    device_bytes: int,
    compiled_bytes: Callable[[int, int], int],
) -> int:
    """The number of members that a device runs at once: a power of two.

    As many as hide the cost of an operation, but on a CPU no more than what keeps the
    largest array of a step, of all of them together, in a core's cache; and half as
    many for as long as the compiler says that the device has not the memory.

    Args:
      traced: the programs, of which the most demanding one decides.
      platform: of the devices.
      device_bytes: the memory of a device of this kind.
      compiled_bytes: what the program of that number needs at a batch size, as its
        compiler says; asked only where it might be too much.
    """
    if not any(each.jaxpr.in_avals for each in traced):
        return 1  # each program has one member
    size = _AT_MOST.get(platform, _AT_MOST_ELSEWHERE)
    try:
        needs = [member_needs(each) for each in traced]
    except NotImplementedError:
        return 1  # there is no batch of it, as of a callback
    if platform == "cpu":
        largest = max(need.step_bytes for need in needs)
        while size > 1 and size * largest > _CACHE_BYTES:
            size //= 2
        if any(need.has_own_kernels for need in needs):
            size = min(size, _AT_MOST_CONVOLUTIONS)
    for which, need in enumerate(needs):
        while size > 1 and size * need.all_bytes > device_bytes:
            if compiled_bytes(which, size) <= device_bytes:
                break
            size //= 2
    return size


class Needs(NamedTuple):
    """What a member needs of its own; what all share is there once for all of them.

    Attributes:
      step_bytes: of the largest array in an innermost loop, or anywhere if there is
        none: what the inner steps touch again and again.
      all_bytes: of all arrays together, were no memory used twice.
      has_own_kernels: whether it convolves with kernels that it has changed.
    """

    step_bytes: int
    all_bytes: int
    has_own_kernels: bool


def member_needs(traced: Traced) -> Needs:
    """What each member has of its own: what a batch of three has more than one of two.

    Data in one order for all of them, for instance, do not count.
    """
    two, three = (_batched(traced.jaxpr, members) for members in (2, 3))
    loops = _innermost_loops(two), _innermost_loops(three)
    own = _growth(_array_bytes, two, three)
    stepped = _growth(_array_bytes, *loops) if loops[0] else own
    return Needs(
        max(stepped, default=0),
        sum(own),
        any(_growth(_convolution_groups, two, three)),
    )


def _batched(closed: Any, members: int) -> Any:
    """The program of so many members."""
    arguments = [jax.ShapeDtypeStruct((members,), x.dtype) for x in closed.in_avals]
    batch = jax.vmap(jax.extend.core.jaxpr_as_fun(closed), axis_size=members)
    return jax.make_jaxpr(batch)(*arguments)


def _growth(
    measure: Callable[[Any], Generator[int]], two: Any, three: Any
) -> list[int]:
    """What each thing that is measured grows by with one more member."""
    return [b - a for a, b in zip(measure(two), measure(three), strict=False)]


def _array_bytes(jaxprs: Any) -> Generator[int]:
    """The bytes of all arrays that are made, in order."""
    for inner in inner_jaxprs(jaxprs):
        for equation in inner.eqns:
            for variable in equation.outvars:
                array = variable.aval  # untyped: in JAX 0.8 not all have an itemsize
                if isinstance(variable.aval, jax.core.ShapedArray):
                    yield array.size * array.dtype.itemsize


def _convolution_groups(jaxprs: Any) -> Generator[int]:
    """In how many groups each convolution is done, in order."""
    for inner in inner_jaxprs(jaxprs):
        for equation in inner.eqns:
            if equation.primitive.name == "conv_general_dilated":
                groups = equation.params
                yield groups["feature_group_count"] * groups["batch_group_count"]


def _innermost_loops(jaxprs: Any) -> list[Any]:
    """What is within the loops that have no loop within."""
    return [body for body in _loops(jaxprs) if not any(True for _ in _loops(body))]


def _loops(jaxprs: Any) -> Generator[Any]:
    for inner in inner_jaxprs(jaxprs):
        for equation in inner.eqns:
            if equation.primitive.name in ("scan", "while"):
                yield tuple(equation.params.values())
