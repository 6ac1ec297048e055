"""`sweep`: a training for every point of a grid, in batches, on all devices."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_rmsprop._sweep._grid import RESERVED, Grid, Group, distinct, parse
from jax_rmsprop._sweep._keep import Memory, Store, attributes, flat
from jax_rmsprop._sweep._location import Location, locate, locked
from jax_rmsprop._sweep._program import free_memory, mesh_of, widened
from jax_rmsprop._sweep._run import Run, patient
from jax_rmsprop._sweep._trace import Spec, Traced, fingerprint, takes, trace
from jax_rmsprop._validate import (
    check_bool,
    check_int,
    currently_jitting,
    require_extra,
)

if TYPE_CHECKING:
    import xarray as xr
    import zarr.abc.store

    StoreLike = str | os.PathLike[str] | zarr.abc.store.Store


def sweep(
    train: Callable[..., Any],
    grid: Mapping[str, Any],
    *,
    zipped: bool = False,
    batch_size: int | str = "auto",
    devices: Sequence[Any] | None = None,
    store: StoreLike | None = None,
    progress: bool = True,
) -> xr.Dataset:
    r"""Run a training for every point of a grid of hyperparameters.

    For every combination of the axes' values :math:`h` (or every pairing of them)

    .. math::
        y_h = \mathrm{train}(h)

    The members run in batches: `jax.vmap` over the members of a batch, a loop over
    the batches, each device of one mesh with a batch of its own, all processes of
    `jax.distributed` together. The last batch is filled up, so every batch of a size is
    the same compiled program: for a given `batch_size` a row has the same bits on one
    device, on many of its kind, and after a resumption, and at 1 those of
    `jax.jit(train)` of the same arrays. Another batch size adds in another order, and a
    number that is known when it is compiled may be rounded otherwise: rows then differ
    by rounding error, as the training amplifies it.

    Where float32 loses what a value is short of 1, such as 1 - 0.9999999, that is
    passed beside it, and an optimizer of this package that gets the very array that
    `train` got knows it.

    Args:
      train: a pure function of keyword arguments, the axes' names, to a tree of arrays,
        such as `{"loss": [steps], "accuracy": []}`; traceable, the same shapes for all
        members. An output is named by its path in the tree, with dots ("eval.loss"); a
        bare array is "value".
      grid: for each argument its values. Numbers (float32, int32; 64 bits under x64)
        arrive traced, as scalars, and share a program; each value once, and all of them
        different as the program has them. Python's values arrive as they
        are, one compilation for each combination: bools, strings, functions, None, and
        numbers in an array of dtype object.
      zipped: pair the axes' values, which must be equally many, instead of taking all
        combinations.
      batch_size: members that a device runs at once, at least 1. "auto" begins with
        1024, on a CPU with as many as fit into its cache (in either case fewer if the
        compiler says that they need more memory than there is), and tries four times
        more and less while compiling that costs at most a twentieth of the time left;
        what the trials compute is kept.
      devices: where to run; None for all devices of all processes.
      store: where each batch is written as zarr when it is done: a folder (for several
        processes, one that all share), a URL that fsspec knows, such as
        "s3://bucket/gamma.zarr" with the credentials of the environment, or a store of
        `zarr.storage`, such as a `FsspecStore` with credentials of its own. The same
        call goes on from what is there, whatever ended the last one, and gives the same
        bits. It must be the same grid, training, versions and batch size ("auto" takes
        the store's). While another process writes to a folder, a call waits, and says
        so; elsewhere nothing can wait: let one call at a time write there.
      progress: show members done, members a second, time left and how many diverged
        so far (of those of this process), with tqdm.

    Returns:
      An `xarray.Dataset`. Its dimensions are the axes, in their order, with the values
      as given as coordinates ("member" if zipped), then an output's own, called
      "loss_dim_0" and so on. Its variables are the outputs, kept as they came (bfloat16
      as float32), and

      - `diverged`: whether any number of any output is not finite;
      - `diverged_at` [..., output]: the first such index along the leading axis of the
        output; -1 where there is none;
      - `finished`: False only after Ctrl-C, which ends the sweep when the batch at hand
        is done (a second one at once, by KeyboardInterrupt); with several processes
        Ctrl-C always raises. Where a parent has switched the signal off, it stays off.

      With a `store` that takes more than a quarter of the machine's free memory its
      arrays are dask's, read from the store where they are needed. Its attributes
      hold the `batch_size` of the last members, and `devices`, `compile_seconds` and
      `run_seconds` of this call; where sweeps of other values of an axis are joined,
      `xarray.combine_by_coords(..., combine_attrs="drop_conflicts")` drops them.

    Raises:
      TypeError: an argument of the wrong kind; a `train` that does not take an axis,
        cannot be traced or returns something else than arrays.
      ValueError: an axis that is empty, has NaN, a value twice, or one that 32 bits
        make another; one near 1 that `train` changes before an optimizer has it; zipped
        axes of unequal lengths; a `store` that holds something else, which is said.
      RuntimeError: `train` raised an error.
      OSError: `store` cannot be read or written.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax_rmsprop import log_one_minus, rmsprop, sweep
      >>> def train(gamma, learning_rate):
      ...     optimizer = rmsprop(learning_rate, gamma)
      ...
      ...     def step(carry, _):
      ...         x, state = carry
      ...         loss, gradient = jax.value_and_grad(lambda x: (x**2).sum())(x)
      ...         updates, state = optimizer.update(gradient, state)
      ...         return (optax.apply_updates(x, updates), state), loss
      ...
      ...     x = jnp.array([-5.0, -2.0])
      ...     _, losses = jax.lax.scan(step, (x, optimizer.init(x)), length=50)
      ...     return {"loss": losses}
      >>> curves = sweep(
      ...     train,
      ...     {"gamma": log_one_minus(0.9, 0.999, 5), "learning_rate": [0.1, 0.01]},
      ...     progress=False,
      ... )
      >>> dict(curves.loss.sizes)
      {'gamma': 5, 'learning_rate': 2, 'loss_dim_0': 50}

    References:
      [xarray](https://docs.xarray.dev), [zarr](https://zarr.readthedocs.io)
    """
    require_extra("sweep", "psutil", "tqdm.auto", "xarray")
    if store is not None:
        require_extra("sweep", "dask.array", "zarr")
    check_bool("progress", progress)
    points = parse(grid, check_bool("zipped", zipped))
    distinct(points)
    if batch_size != "auto":
        check_int("batch_size", batch_size, low=1)
    mesh = mesh_of(devices)
    takes(train, tuple(points.axes))
    if currently_jitting():
        raise TypeError("`sweep` must be called outside a jit, a vmap and the like")
    at = None if store is None else locate(store)
    # It is compiled programs, of which a member that diverges is a result; these
    # switches are for a training by itself.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return _swept(train, points, mesh, at, batch_size, progress)


def _swept(
    train: Callable[..., Any],
    points: Grid,
    mesh: Mesh,
    store: Location | None,
    batch_size: int | str,
    progress: bool,
) -> xr.Dataset:
    """The sweep itself, its arguments checked."""
    from tqdm.auto import tqdm

    groups = points.groups()
    traced = [
        trace(train, group.python, {n: x.dtype for n, x in group.numbers.items()})
        for group in groups
    ]
    outputs = _outputs(points, groups, traced)
    described = _described(points, groups, outputs)
    with contextlib.nullcontext() if store is None else locked(store):
        if store is None:
            kept = Memory(outputs, points.size)
        else:
            identity = _identity(points, outputs, traced, mesh, batch_size)
            kept = Store(store, identity, outputs, points.size)
            kept.describe(described)
            batch_size = kept.batch_size
        bar = tqdm(
            total=points.size,
            unit="member",
            disable=not progress or jax.process_index() > 0,
        )
        run = Run(mesh, kept, batch_size, bar)
        with bar, patient(run):
            for group, program in zip(groups, traced, strict=True):
                run.group(group, program)
        if not kept.segments:
            raise KeyboardInterrupt  # before anything ran
        curves = _shaped(kept.flat(), described)
        done = int(curves["finished"].sum())
        if done < points.size:
            again = "" if store is None else ", and the same call computes them"
            warnings.warn(
                f"interrupted: {done} of {points.size} members are finished; those "
                f"where `finished` is False are missing{again}",
                stacklevel=3,
            )
        return curves.assign_attrs(
            batch_size=kept.segments[-1].size,
            devices=mesh.size,
            compile_seconds=round(run.compile_seconds, 3),
            run_seconds=round(run.run_seconds, 3),
        )


def load_sweep(store: StoreLike) -> xr.Dataset:
    """Open what `sweep` wrote to a store, without the training, finished or not.

    Args:
      store: as it was given to `sweep`.

    Returns:
      The Dataset that `sweep` would return, without the attributes of a call.

    Raises:
      ValueError: the store holds something else, or no segment of a sweep yet.
      OSError: it cannot be read.

    Example:
      >>> import tempfile
      >>> from jax_rmsprop import load_sweep, sweep
      >>> def train(gamma):
      ...     return {"loss": gamma**2}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     curves = sweep(train, {"gamma": [0.5]}, store=folder, progress=False)
      ...     load_sweep(folder).loss.sel(gamma=0.5).item()
      0.25

    References:
      [xarray](https://docs.xarray.dev), [zarr](https://zarr.readthedocs.io)
    """
    require_extra("sweep", "dask.array", "psutil", "xarray", "zarr")
    import xarray as xr

    at = locate(store)
    found = attributes(at)
    if found is None or not found["segments"]:
        raise ValueError(f"`store` {at.name} has no finished members")
    described = xr.open_zarr(
        at.target, group="grid", chunks=None, consolidated=False
    ).load()
    # Zarr's strings are of variable length, NumPy's usual ones are not.
    strings = [n for n, x in described.variables.items() if x.dtype.kind in "OT"]
    described = described.assign_coords(
        {
            n: (described[n].dims, np.array(described[n].values.tolist()))
            for n in strings
        }
    )
    return _shaped(
        flat(at, len(found["segments"]), described.sizes["in it"]), described
    )


def _outputs(points: Grid, groups: list[Group], traced: list[Traced]) -> Spec:
    """The outputs, which all groups must share.

    Raises:
      ValueError: naming the output that is another in a group, or that is called as
        an axis or as something of the result.
    """
    outputs = traced[0].outputs
    for group, other in zip(groups, traced, strict=True):
        for name in outputs | other.outputs:
            ours, theirs = _text(outputs.get(name)), _text(other.outputs.get(name))
            if ours != theirs:
                raise ValueError(
                    "`train` must return the same for all Python values, but "
                    f"{name} is {ours} with {groups[0].python} and {theirs} with "
                    f"{group.python}"
                )
    taken = {*points.axes, *RESERVED}
    for name in outputs:
        if name in taken:
            raise ValueError(f"`train` must not call an output {name!r}: it is taken")
    return outputs


def _identity(
    points: Grid,
    outputs: Spec,
    traced: list[Traced],
    mesh: Mesh,
    batch_size: int | str,
) -> dict[str, Any]:
    """Describe the sweep that a store belongs to."""
    return {
        "axes": {n: [len(a.labels), a.digest] for n, a in points.axes.items()},
        "zipped": points.zipped,
        "outputs": {name: _text(x) for name, x in outputs.items()},
        "train": "".join(map(fingerprint, traced)),
        "versions": {
            "jax_rmsprop": importlib.metadata.version("jax-rmsprop"),
            "jax": jax.__version__,
            "jaxlib": importlib.metadata.version("jaxlib"),
            "device": mesh.devices.flat[0].device_kind,
        },
        "batch_size": batch_size,
    }


def _described(points: Grid, groups: list[Group], outputs: Spec) -> xr.Dataset:
    """The grid as a Dataset: its coordinates, and which of its members ran when."""
    import xarray as xr

    return xr.Dataset(
        # Names that no axis can have.
        {"running order": ("in it", np.concatenate([g.members for g in groups]))},
        coords=points.coordinates,
        attrs={
            "dims": list(points.dims),
            "shape": list(points.shape),
            "outputs": list(outputs),
        },
    )


def _shaped(flat: xr.Dataset, described: xr.Dataset) -> xr.Dataset:
    """The results along the axes of the grid, from those in the order of running."""
    import xarray as xr

    order, names = described["running order"].values, list(described.attrs["outputs"])
    dims, shape = described.attrs["dims"], described.attrs["shape"]
    if not flat["finished"].values.all():
        for name in names:
            if flat[name].dtype.kind in "fc":
                flat[name] = flat[name].where(flat["finished"])
        flat["diverged_at"] = flat["diverged_at"].where(flat["finished"], -1)
    flat["diverged"] = (flat["diverged_at"] >= 0).any("output")
    if (np.diff(order) != 1).any():
        flat = flat.isel(member=np.argsort(order))
    curves = xr.Dataset(
        {
            name: (
                (*dims, *flat[name].dims[1:]),
                flat[name].data.reshape(*shape, *flat[name].shape[1:]),
            )
            for name in (*names, "diverged", "diverged_at", "finished")
        },
        coords=described.coords.assign({"output": names}),
    )
    return curves.load() if curves.nbytes <= free_memory() / 4 else curves


def _text(spec: jax.ShapeDtypeStruct | None) -> str:
    """As "float32[50]"."""
    if spec is None:
        return "missing"
    return f"{widened(spec.dtype)}[{','.join(map(str, spec.shape))}]"
