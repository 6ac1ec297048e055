"""A batch of trainings as one compiled call, on every device of a mesh."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_rmsprop import _versions
from jax_rmsprop._sweep._location import in_one_line
from jax_rmsprop._sweep._trace import Traced
from jax_rmsprop._validate import short_repr

Rows = dict[str, np.ndarray]


def batched(traced: Traced, size: int) -> Callable[..., list[Any]]:
    """A function of what a training closes over and so many members' numbers."""

    def batch(consts: list[Any], *numbers: Any) -> list[Any]:
        if size == 1:  # the training as it is, without the cost of a batch axis
            outputs = traced.member(consts, *(x[0] for x in numbers))
            return [x[None] for x in outputs]
        # A sweep without numbers has one member in a batch for each lane.
        axes = (None, *(0 for _ in numbers))
        return jax.vmap(traced.member, axes, axis_size=size)(consts, *numbers)

    return batch


class CompiledBatch:
    """`size` members on each device: vmap inside, the mesh outside.

    The devices do not talk to each other, and each runs the same program whatever
    their number. So a member's bits depend on `size`, on its place in the batch, and
    on nothing else.

    Attributes:
      size: the members that a device runs at once.
      seconds: how long it took to compile.
      memory_bytes: what a device needs, as the compiler says; 0 if it doesn't.
    """

    def __init__(self, traced: Traced, mesh: Mesh, size: int):
        """Compile for that many members a device; what it closes over is there."""
        began = time.perf_counter()
        self.size, self._names = size, tuple(traced.outputs)
        replicated, per_member = PartitionSpec(), PartitionSpec("member")
        self._per_member = NamedSharding(mesh, per_member)
        # What the training closes over is an argument here: as constants of the
        # program, data would be compiled again with every size.
        jaxpr, self._consts = traced.jaxpr, list(traced.jaxpr.consts)

        sharded = jax.shard_map(
            batched(traced, size),
            mesh=mesh,
            in_specs=(replicated, *(per_member for _ in jaxpr.in_avals)),
            out_specs=per_member,
            check_vma=False,  # `train` may hold loops whose carries start replicated
        )
        numbers = [
            jax.ShapeDtypeStruct(
                (mesh.size * size,), x.dtype, sharding=self._per_member
            )
            for x in jaxpr.in_avals
        ]
        try:
            lowered = jax.jit(sharded).lower(self._consts, *numbers)
        except NotImplementedError as error:
            raise TypeError(
                f"`train` cannot run in a batch: {in_one_line(error)}; at "
                "`batch_size` 1 it need not"
            ) from error
        self._call = lowered.compile()
        memory = self._call.memory_analysis()
        self.memory_bytes = 0
        if memory is not None:
            self.memory_bytes = (
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                + memory.temp_size_in_bytes
            )
        self.seconds = time.perf_counter() - began

    def __call__(self, numbers: Sequence[np.ndarray]) -> list[jax.Array]:
        """Begin to run one batch on each device.

        Args:
          numbers: the hyperparameters of all devices' members, [devices * size], in
            the order of the jaxpr.
        """
        placed: Sequence[Any] = numbers
        if jax.process_count() > 1:  # where a call takes no array of one process
            placed = [
                jax.make_array_from_callback(x.shape, self._per_member, x.__getitem__)
                for x in numbers
            ]
        return self._call(self._consts, *placed)

    def rows(self, outputs: Sequence[jax.Array]) -> Rows:
        """Wait for the outputs of this process' devices, in the mesh's order."""
        rows = map(addressable_rows, outputs)
        return dict(zip(self._names, rows, strict=True))


def make_mesh(devices: Any) -> Mesh:
    """The mesh of these devices, or of all that all processes have.

    Raises:
      TypeError: not a sequence of devices.
      ValueError: none, one twice, or none of this process.
    """
    if devices is None:
        devices = jax.devices()
    if not isinstance(devices, Sequence) or not all(
        isinstance(d, jax.Device) for d in devices
    ):
        raise TypeError(
            f"`devices` must be a sequence of jax devices, got {short_repr(devices)}"
        )
    if not devices or len(set(devices)) < len(devices):
        raise ValueError(
            f"`devices` must be at least one device, each once, got {list(devices)}"
        )
    if all(d.process_index != jax.process_index() for d in devices):
        raise ValueError(
            "`devices` must have one of this process' own, got "
            f"{list(devices)} in process {jax.process_index()}"
        )
    return Mesh(np.array(devices), ("member",))


def replicate_consts(traced: Traced, mesh: Mesh) -> Traced:
    """The same with what it closes over on every device of the mesh, once."""
    consts = jax.device_put(
        list(traced.jaxpr.consts), NamedSharding(mesh, PartitionSpec())
    )
    return traced._replace(jaxpr=traced.jaxpr.replace(consts=consts))


def broadcast_from_process_0(value: Any) -> Any:
    """The first process' value, in every process."""
    if jax.process_count() == 1:
        return value
    return _versions.broadcast_one_to_all(value)


def versions_of(device: Any) -> dict[str, str]:
    """What decides about a member's last bits, besides its program."""
    return {
        "jax_rmsprop": importlib.metadata.version("jax-rmsprop"),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "device": device.device_kind,
    }


def device_bytes(device: Any) -> int:
    """The memory that a program may use on a device of this kind.

    Of a CPU's, which everything else uses too, a quarter of the machine's.
    """
    import psutil

    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] * 9 // 10
    return psutil.virtual_memory().total // 4


def free_memory() -> int:
    """Bytes that this machine has to give."""
    import psutil

    return psutil.virtual_memory().available


def addressable_rows(array: jax.Array) -> np.ndarray:
    """The rows of this process' devices."""
    shards = sorted(array.addressable_shards, key=lambda s: s.index[0].start or 0)
    rows = np.concatenate([np.asarray(s.data) for s in shards])
    if rows.dtype.kind == "V":  # bfloat16 and the like, which files do not know
        rows = rows.astype(file_dtype(rows.dtype))
    return rows


def file_dtype(dtype: Any) -> np.dtype:
    """The narrowest of NumPy's own dtypes that holds all of this one's values."""
    dtype = np.dtype(dtype)
    if dtype.kind != "V":
        return dtype
    is_float = jax.numpy.issubdtype(dtype, jax.numpy.floating)
    return np.dtype("float32" if is_float else "int16")
