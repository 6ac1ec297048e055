"""A batch of members: one compiled program on each device of a mesh, and its size."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.core
import jax.extend.core
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rmsprop import _versions
from jax_rmsprop._validate import expected
from jax_rmsprop.sweeps._location import in_one_line
from jax_rmsprop.sweeps._training import Traced, equations

Rows = dict[str, np.ndarray]


def batched(traced: Traced, size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Vectorize `begin` and `advance` over `size` members; closed-over arrays first."""
    if size == 1:  # without the cost of a batch axis

        def begin(consts: list[Any], *numbers: Any) -> list[Any]:
            return [x[None] for x in traced.begin(consts, *(n[0] for n in numbers))]

        def advance(consts: list[Any], carry: list[Any], *numbers: Any) -> Any:
            own = traced.advance(
                consts, [x[0] for x in carry], *(n[0] for n in numbers)
            )
            return jax.tree.map(lambda x: x[None], own)

        return begin, advance
    if traced.has_rbg and traced.init.in_avals:  # one member after the other

        def mapped(function: Any) -> Callable[..., Any]:
            return lambda consts, *own: jax.lax.map(lambda x: function(consts, *x), own)

        return mapped(traced.begin), mapped(traced.advance)
    # Without numbers there is no batched input; `size` sets the lanes.
    numbers = (0,) * len(traced.init.in_avals)
    over = functools.partial(jax.vmap, axis_size=size)
    return (
        over(traced.begin, in_axes=(None, *numbers)),
        over(traced.advance, in_axes=(None, 0, *numbers)),
    )


class CompiledBatch:
    """`size` members on each device: vmap inside, the mesh outside.

    The devices do not communicate, and each runs the same program regardless of their
    number. So a member's bits depend on `size`, but not on its position in the batch or
    on the other members.

    Attributes:
      size: the number of members per device.
      devices: the number of devices.
      seconds: the time of compiling.
      memory_bytes: the memory a device needs, from the compiler; 0 if unknown.
      temporary_bytes: the part of it that is neither arguments nor results.
    """

    def __init__(self, traced: Traced, mesh: Mesh, size: int):
        """Compile for `size` members per device."""
        began = time.perf_counter()
        self.size, self.devices, self._traced = size, mesh.size, traced
        # The arrays that the training closes over are arguments: constants of the
        # program would be compiled again for every size.
        begin, advance = batched(traced, size)
        self._consts, self._per_member = traced.consts, None
        if not traced.has_mesh:
            replicated, self._per_member = _shardings(mesh)
            self._consts = jax.device_put(traced.consts, replicated)
        if mesh.size > 1:
            all_of, each = PartitionSpec(), PartitionSpec("member")
            own = (each,) * len(traced.init.in_avals)
            # `train` may have loops whose carries start replicated.
            over = functools.partial(
                jax.shard_map, mesh=mesh, out_specs=each, check_vma=False
            )
            begin = over(begin, in_specs=(all_of, *own))
            advance = over(advance, in_specs=(all_of, each, *own))
        avals = traced.init.in_avals, traced.carry_specs
        numbers, carry = (of_all(x, mesh.size * size, self._per_member) for x in avals)
        try:
            self._begin = None  # a plain training has no carry
            if carry:
                self._begin = jax.jit(begin).lower(self._consts, *numbers).compile()
            # The next carry reuses the memory of this one.
            step = jax.jit(advance, donate_argnums=1)
            self._step = step.lower(self._consts, carry, *numbers).compile()
        except (NotImplementedError, ValueError) as error:
            if isinstance(error, ValueError) and not traced.has_mesh:
                raise
            raise TypeError(
                f"`train` cannot run in a batch: {in_one_line(error)}; pass "
                "batch_size=1"
            ) from error
        memory = self._step.memory_analysis()
        self.temporary_bytes = memory.temp_size_in_bytes if memory else 0
        self.memory_bytes = self.temporary_bytes
        if memory:
            self.memory_bytes += memory.argument_size_in_bytes
            self.memory_bytes += memory.output_size_in_bytes
        self.seconds = time.perf_counter() - began

    def place(self, array: Any) -> Any:
        """Shard an array of all devices' members over the devices."""
        if self._per_member is None:
            return array
        if jax.process_count() == 1:
            return jax.device_put(array, self._per_member)
        return jax.make_array_from_callback(
            array.shape, self._per_member, array.__getitem__
        )

    def begin(self, numbers: Sequence[Any]) -> list[Any]:
        """The first carry of all members, from their hyperparameters."""
        return self._begin(self._consts, *numbers) if self._begin else []

    def resume(self, packed: np.ndarray) -> list[Any]:
        """The carry from its packed bytes."""
        return [self.place(x) for x in unpack(packed, self._traced.carry_specs)]

    def step(
        self, carry: Sequence[Any], numbers: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Dispatch a step, donating the carry: the next carry and the outputs."""
        return self._step(self._consts, list(carry), *numbers)

    def rows(self, outputs: Sequence[Any]) -> Rows:
        """Wait for the outputs of all processes' devices, in the mesh's order."""
        return as_rows(self._traced.outputs, map(on_host, outputs))


def of_all(specs: Sequence[Any], members: int, sharding: Any = None) -> list[Any]:
    """The shapes and dtypes of `members` members together."""
    return [
        jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=sharding)
        for x in specs
    ]


def as_rows(names: Iterable[str], outputs: Iterable[Any]) -> Rows:
    """Outputs in the dtypes of files: bfloat16 and the like as float32."""
    found = zip(names, map(np.asarray, outputs), strict=True)
    return {n: x.astype(file_dtype(x.dtype), copy=False) for n, x in found}


def on_host(array: Any) -> np.ndarray:
    """Gather an array from all processes' devices."""
    if jax.process_count() > 1:
        array = _versions.process_allgather(array, tiled=True)
    return np.asarray(array)


def pack(carry: Iterable[Any]) -> np.ndarray:
    """Pack each member's carry into bytes, [members, bytes]."""
    parts = [np.ascontiguousarray(x).reshape(len(x), -1) for x in map(on_host, carry)]
    return np.concatenate([x.view(np.uint8) for x in parts], axis=1)


def unpack(packed: np.ndarray, specs: Sequence[Any]) -> list[Any]:
    """Invert `pack`, given the arrays' shapes and dtypes."""
    ends = np.cumsum([x.dtype.itemsize * int(np.prod(x.shape)) for x in specs])
    parts = np.split(packed, ends[:-1], axis=1)
    return [
        np.ascontiguousarray(part).view(x.dtype).reshape(len(packed), *x.shape)
        for part, x in zip(parts, specs, strict=True)
    ]


def _shardings(mesh: Mesh) -> tuple[Any, Any]:
    """The shardings of arrays that members share, and of arrays of members."""
    if mesh.size == 1:
        one = jax.sharding.SingleDeviceSharding(mesh.devices.flat[0])
        return one, one
    each = PartitionSpec("member")
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, each)


def make_mesh(devices: Any) -> Mesh:
    """The mesh of these devices, or of all devices of all processes.

    Raises:
      TypeError: not a sequence of devices.
      ValueError: no device, a duplicate, or none of this process.
    """
    if devices is None:
        devices = jax.devices()
    if not isinstance(devices, Sequence) or not all(
        isinstance(d, jax.Device) for d in devices
    ):
        raise TypeError(expected("devices", "a sequence of jax devices", devices))
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(expected("devices", "at least one device, each once", devices))
    if all(d.process_index != jax.process_index() for d in devices):
        raise ValueError(
            "`devices` must include a device of this process, got "
            f"{list(devices)} in process {jax.process_index()}"
        )
    return Mesh(np.array(devices), ("member",))


def broadcast_from_process_0(value: Any) -> Any:
    """The value of the first process, in every process."""
    if jax.process_count() == 1:
        return value
    return _versions.broadcast_one_to_all(value)


def versions_of(device: Any) -> dict[str, str]:
    """Versions and device kind that affect bitwise results."""
    kind = device.device_kind
    if device.platform == "cpu":
        kind = f"{platform.machine()} {_vectors()}".rstrip()
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "device": kind,
    }


@functools.cache
def _vectors() -> str:
    """The widest vector instructions of this CPU."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ""
    return next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")


def device_bytes(device: Any) -> int:
    """The memory that a program may use on a device.

    On a CPU, a quarter of the machine's, since other programs share it.
    """
    import psutil

    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] * 9 // 10
    return psutil.virtual_memory().total // 4


def file_dtype(dtype: Any) -> np.dtype:
    """The narrowest native NumPy dtype that holds all values of this one."""
    dtype = np.dtype(dtype)
    if dtype.isbuiltin == 1:
        return dtype
    is_float = jax.numpy.issubdtype(dtype, jax.numpy.floating)
    return np.dtype("float32" if is_float else "int16")


# Enough members to hide a CPU's overhead per operation, if a step of all of them fits
# the private cache of a current core. XLA on a CPU runs a convolution in which each
# member has its own kernels group by group.
_ON_CPU, _CACHE_BYTES, _CONVOLUTIONS_ON_CPU = 128, 4_000_000, 4
# An accelerator takes as many as fit; beyond this it gets no faster.
_ELSEWHERE, _TEMPORARY_BYTES = 65_536, 2**30


def auto_batch_size(
    traced: Sequence[Traced],
    platform: str,
    device_bytes: int,
    compiled: Callable[[int, int], CompiledBatch],
) -> int:
    """The number of members that a device runs at once: a power of two.

    On a CPU, enough to hide the overhead of an operation, but few enough that the
    largest array of a step, over all members, fits a core's cache; elsewhere as many as
    need 1 GiB of temporary arrays. The number is halved until the program, according to
    the compiler, fits the device's memory.

    Args:
      traced: the programs; the most demanding one decides.
      platform: the devices' platform.
      device_bytes: the memory of a device.
      compiled: compiles the program of that number at a batch size; on a CPU called
        only if the memory might not suffice.
    """
    if not any(each.init.in_avals for each in traced):
        return 1  # each program has one member
    try:
        needs = [member_needs(each) for each in traced]
    except NotImplementedError:
        return 1  # it cannot be batched, such as some callbacks
    if platform == "cpu":
        size, most = _ON_CPU, _CACHE_BYTES
        each = max(need.step_bytes for need in needs)
        if any(need.has_own_kernels for need in needs):
            size = _CONVOLUTIONS_ON_CPU
    else:  # estimate from a small batch, and compile the largest once
        size, most = _ELSEWHERE, _TEMPORARY_BYTES
        small = [compiled(which, 1024) for which in range(len(needs))]
        each = max(program.temporary_bytes for program in small) / 1024
    while size > 1 and size * each > most:
        size //= 2
    for which, need in enumerate(needs):
        while size > 1 and size * need.all_bytes > device_bytes:
            if compiled(which, size).memory_bytes <= device_bytes:
                break
            size //= 2
    return size


class Needs(NamedTuple):
    """The memory that a member needs for itself, without what all members share.

    Attributes:
      step_bytes: the bytes of the largest array in an innermost loop, or anywhere if
        there is no loop: the working set of the inner steps.
      all_bytes: the bytes of all arrays together, if no memory were reused.
      has_own_kernels: whether it convolves with kernels of its own.
    """

    step_bytes: int
    all_bytes: int
    has_own_kernels: bool


# A prime, so that it divides the sizes of members' own arrays alone.
_MEMBERS = 10_007


def member_needs(traced: Traced) -> Needs:
    """Measure a member's needs.

    Arrays that members share, such as data in one order, do not count.
    """
    step = jax.vmap(jax.extend.core.jaxpr_as_fun(traced.step), axis_size=_MEMBERS)
    program = jax.make_jaxpr(step)(*of_all(traced.step.in_avals, _MEMBERS))

    def bytes_each(jaxprs: Any) -> list[int]:
        arrays = (x.aval for equation in equations(jaxprs) for x in equation.outvars)
        return [
            x.size * x.dtype.itemsize // _MEMBERS
            for x in arrays
            if isinstance(x, jax.core.ShapedArray) and x.size % _MEMBERS == 0
        ]

    groups = (
        equation.params["feature_group_count"] * equation.params["batch_group_count"]
        for equation in equations(program)
        if equation.primitive.name == "conv_general_dilated"
    )
    loops, every = list(_innermost(program)), bytes_each(program)
    return Needs(
        max(bytes_each(loops) if loops else every, default=0),
        sum(every),
        any(count % _MEMBERS == 0 for count in groups),
    )


def _innermost(jaxprs: Any) -> Generator[Any]:
    """The jaxprs of the innermost loops."""
    for equation in equations(jaxprs):
        if equation.primitive.name in ("scan", "while"):
            body = tuple(equation.params.values())
            if not any(True for _ in _innermost(body)):
                yield body
