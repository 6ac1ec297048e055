"""`sweep`: a training for every point of a grid, in batches, on all devices."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_rmsprop._sweep._batch_size import auto_batch_size
from jax_rmsprop._sweep._cluster import check_client, make_job, run_on_cluster
from jax_rmsprop._sweep._grid import (
    RESERVED,
    Axis,
    Combination,
    Grid,
    Members,
    check_distinct,
    parse_grid,
)
from jax_rmsprop._sweep._location import Location, locate, locked
from jax_rmsprop._sweep._program import (
    broadcast_from_process_0,
    device_bytes,
    file_dtype,
    free_memory,
    make_mesh,
    versions_of,
)
from jax_rmsprop._sweep._run import (
    Programs,
    Progress,
    finish_batch_on_sigint,
    run_tasks,
    split_missing,
)
from jax_rmsprop._sweep._table import (
    Memory,
    Store,
    create,
    read_columns,
    read_header,
    select_rows,
    update_header,
)
from jax_rmsprop._sweep._trace import (
    OutputSpecs,
    Traced,
    check_signature,
    fingerprint,
    trace,
)
from jax_rmsprop._validate import check_bool, check_int, require_extra

if TYPE_CHECKING:
    import distributed
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
    client: distributed.Client | None = None,
    progress: bool = True,
) -> xr.Dataset:
    r"""Run a training for every point of a grid of hyperparameters.

    For every combination of the axes' values :math:`h` (or every pairing of them)

    .. math::
        y_h = \mathrm{train}(h)

    The members run in batches: `jax.vmap` over the members of a batch, a loop over
    the batches, each device with a batch of its own, all processes of `jax.distributed`
    or all workers of a dask cluster together. The last batch is filled up, so every
    batch is the same compiled program: for a given `batch_size` a row has the same bits
    on one device, on many of its kind, after a resumption, and wherever in a batch it
    stands; at 1 those of `jax.jit(train)` of the same arrays. Another batch size adds
    in another order, and a number that is known when it is compiled may be rounded
    otherwise: rows then differ by rounding error, as the training amplifies it.

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
        combinations; `points` makes such.
      batch_size: members that a device runs at once, at least 1. "auto" depends on the
        program and the kind of device alone: 128 on a CPU, fewer where the arrays of a
        step would not fit its cache (4 with convolutions), 1024 elsewhere, in either
        case fewer if the compiler says that they need more memory than there is. It
        suits hundreds of members; of fewer, the rest of a batch is computed in vain,
        and a number is better.
      devices: where to run; None for all devices of all processes.
      store: where the members are kept as zarr when they are done: a folder (for
        several processes, one that all share), a URL that fsspec knows, such as
        "s3://bucket/gamma.zarr" with the credentials of the environment, or a store of
        `zarr.storage`, such as a `FsspecStore` with credentials of its own. It is a
        table that grows: a call computes those of its members that are not there,
        whatever ended the last one, adds them, and returns what it asked for, so more
        seeds, values of any axis or other points are the same call with more of them.
        It must be the same training, axes, versions, kind of device and batch size
        ("auto" takes the store's). Any number of calls may use a folder at once;
        elsewhere nothing can be locked, so let one at a time write there.
        `xarray.open_zarr(store)` reads it without this package: a row for each member,
        of which those count where `finished`.
      client: a `dask.distributed.Client`: its workers run the batches, and write to the
        store where they find its folder. They may join, leave and be killed; each needs
        the caller's versions and kind of device.
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
      arrays are dask's, read from the store where they are needed. Its attributes hold
      how many members this call has `computed`, the `batch_size`, and `devices`,
      `compile_seconds` and `run_seconds` of this call.

    Raises:
      TypeError: an argument of the wrong kind; a `train` that does not take an axis,
        cannot be traced or returns something else than arrays.
      ValueError: an axis that is empty, has NaN, a value twice, or one that 32 bits
        make another; or whose distance to 1 they do not hold; zipped
        axes of unequal lengths; a `store` that holds something else, or a worker with
        other versions, which is said.
      RuntimeError: `train`, or a worker, raised an error.
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
    require_extra("sweep", "pandas", "psutil", "tqdm.auto", "xarray")
    if store is not None:
        require_extra("sweep", "dask.array", "zarr")
    check_bool("progress", progress)
    points = parse_grid(grid, check_bool("zipped", zipped))
    check_distinct(points)
    if batch_size != "auto":
        check_int("batch_size", batch_size, low=1)
    if client is not None:
        require_extra("cluster", "distributed", "flatbuffers")
        check_client(client, devices)
    mesh = make_mesh(devices)
    check_signature(train, tuple(points.axes))
    if isinstance(jnp.zeros([]), jax.core.Tracer):
        raise TypeError("`sweep` must be called outside a jit, a vmap and the like")
    at = None if store is None else locate(store)
    # It is compiled programs, of which a member that diverges is a result; these
    # switches are for a training by itself.
    with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
        return _sweep(train, points, mesh, at, client, batch_size, progress)


def _sweep(
    train: Callable[..., Any],
    points: Grid,
    mesh: Mesh,
    at: Location | None,
    client: distributed.Client | None,
    batch_size: int | str,
    progress: bool,
) -> xr.Dataset:
    """The sweep itself, its arguments checked."""
    from tqdm.auto import tqdm

    combinations = points.combinations()
    traced = [
        trace(train, c.python, {name: x.dtype for name, x in c.numbers.items()})
        for c in combinations
    ]
    outputs = _outputs(points, combinations, traced)
    members, number = points.members()
    bar = functools.partial(tqdm, total=members.size, unit="member")
    # If shown, as tqdm itself has it, so that TQDM_DISABLE is heard.
    shown = progress and jax.process_index() == 0
    bar = bar() if shown else bar(disable=True)
    seen = Progress(bar)
    programs = Programs(traced, mesh, seen)
    with bar, finish_batch_on_sigint(seen):
        choose = functools.partial(_batch_size, batch_size, traced, mesh, programs)
        if at is None:
            table, size = Memory(members, outputs), choose()
        else:
            header = _header(points, combinations, traced, outputs, mesh)
            table = _open_store(at, header, batch_size, choose, members, outputs)
            size = table.header["batch_size"]
        seen.there(int(table.finished.sum()))
        used = mesh.size
        tasks = split_missing(table.finished, combinations, number, size)
        if client is None or not tasks:
            run_tasks(tasks, size, programs, table, seen)
        else:
            versions = versions_of(mesh.devices.flat[0])
            job = make_job(traced, size, versions, table, members, outputs)
            used = run_on_cluster(client, tasks, job, table, seen)
    if seen.stopped and not table.finished.any():
        raise KeyboardInterrupt  # before anything ran
    rows = table.to_dataset(free_memory() // 4)
    curves = _to_grid(rows, number, points, list(outputs))
    missing = int((~table.finished).sum())
    if missing:
        again = "" if at is None else ", and the same call computes them"
        warnings.warn(
            f"interrupted: {members.size - missing} of {members.size} members are "
            f"finished; those where `finished` is False are missing{again}",
            stacklevel=3,
        )
    return curves.assign_attrs(
        computed=seen.computed,
        batch_size=size,
        devices=used,
        compile_seconds=round(seen.compile_seconds, 3),
        run_seconds=round(seen.run_seconds, 3),
    )


def load_sweep(store: StoreLike) -> xr.Dataset:
    """Open what `sweep` wrote to a store, without the training, finished or not.

    Args:
      store: as it was given to `sweep`.

    Returns:
      The Dataset that `sweep` would return for all values that are there, sorted along
      each axis, without the attributes of a call; `finished` is False for combinations
      that nobody has computed. Along "member", sorted by the axes, if any points have
      been zipped.

    Raises:
      ValueError: the store holds something else, or no finished members.
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
    require_extra("sweep", "dask.array", "pandas", "psutil", "xarray", "zarr")
    at = locate(store)
    header = read_header(at)
    if header is None:
        raise ValueError(f"`store` {at.name} has no finished members")
    names, outputs = list(header["axes"]), list(header["outputs"])
    columns = read_columns(at, [*names, "finished"])
    rows = np.flatnonzero(columns.pop("finished"))
    if not len(rows):
        raise ValueError(f"`store` {at.name} has no finished members")
    # Texts as NumPy's usual ones, which those of a file are not.
    labels = {n: np.array(columns[n][rows].tolist()) for n in names}
    values, entries = {}, []
    for name in names:
        values[name], entry = np.unique(labels[name], return_inverse=True)
        entries.append(entry)
    if header["zipped"]:
        order = np.lexsort(entries[::-1])
        axes = {n: _labelled(labels[n][order]) for n in names}
        position = rows[order]
    else:
        axes = {n: _labelled(values[n]) for n in names}
        position = np.full([len(v) for v in values.values()], -1)
        position[tuple(entries)] = rows
    points = Grid(axes, header["zipped"])
    position = position.ravel()
    found = select_rows(at, position, outputs, free_memory() // 4)
    return _to_grid(found, np.arange(len(position)), points, outputs)


def _labelled(labels: np.ndarray) -> Axis:
    """An axis of which the values of a program are not known any more."""
    return Axis(labels, None, (), np.zeros(len(labels), int))


def _outputs(
    points: Grid, combinations: list[Combination], traced: list[Traced]
) -> OutputSpecs:
    """The outputs, which all combinations of Python's values must share.

    Raises:
      ValueError: naming the output that is another for some, or that is called as an
        axis or as something of the result.
    """
    outputs = traced[0].outputs
    for combination, other in zip(combinations, traced, strict=True):
        for name in outputs | other.outputs:
            ours = _format_spec(outputs.get(name))
            theirs = _format_spec(other.outputs.get(name))
            if ours != theirs:
                raise ValueError(
                    "`train` must return the same for all Python values, but "
                    f"{name} is {ours} with {combinations[0].python} and {theirs} with "
                    f"{combination.python}"
                )
    taken = {*points.axes, *RESERVED}
    for name in outputs:
        if name in taken:
            raise ValueError(f"`train` must not call an output {name!r}: it is taken")
    return outputs


def _batch_size(
    given: int | str, traced: list[Traced], mesh: Mesh, programs: Programs
) -> int:
    """The batch size that was given, or that of the programs."""
    if isinstance(given, int):
        return given
    device = mesh.local_mesh.devices.flat[0]
    return auto_batch_size(
        traced,
        device.platform,
        int(broadcast_from_process_0(float(device_bytes(device)))),
        lambda which, size: programs.get(which, size).memory_bytes,
    )


def _header(
    points: Grid,
    combinations: list[Combination],
    traced: list[Traced],
    outputs: OutputSpecs,
    mesh: Mesh,
) -> dict[str, Any]:
    """Describe the sweep that a store belongs to."""
    return {
        "axes": points.kinds,
        "zipped": points.zipped,
        "outputs": {name: _format_spec(x) for name, x in outputs.items()},
        "programs": {
            combination.name: fingerprint(each)
            for combination, each in zip(combinations, traced, strict=True)
        },
        "versions": versions_of(mesh.devices.flat[0]),
    }


def _open_store(
    at: Location,
    header: dict[str, Any],
    batch_size: int | str,
    choose: Callable[[], int],
    members: Members,
    outputs: OutputSpecs,
) -> Store:
    """Open the store of a sweep, or make it.

    Raises:
      ValueError: it holds something else; the message says what differs.
      OSError: it cannot be read or written.
    """
    first = jax.process_index() == 0
    found = read_header(at)
    if broadcast_from_process_0(found is None):
        size = choose()
        if first:
            create(at, {**header, "batch_size": size}, members.kinds, outputs)
        broadcast_from_process_0(0)  # it is there
        found = read_header(at)
    if found is None:
        raise OSError(f"`store` {at.name} is not there for all processes")
    check_same_sweep(at, header, batch_size, found)
    if first:
        with locked(at):
            found = read_header(at) or found
            check_same_sweep(at, header, batch_size, found)
            more = {
                "programs": found["programs"] | header["programs"],
                "zipped": found["zipped"] or header["zipped"],
            }
            if more != {name: found[name] for name in more}:
                update_header(at, found | more)
    broadcast_from_process_0(0)
    return Store(at, found, members, outputs)


def check_same_sweep(
    at: Location,
    ours: Mapping[str, Any],
    batch_size: int | str,
    theirs: Mapping[str, Any],
) -> None:
    """Refuse a store of another training.

    Raises:
      ValueError: saying the first thing that differs.
    """

    def refuse(what: str) -> None:
        raise ValueError(f"`store` {at.name} holds another sweep: {what}")

    if sorted(ours["axes"]) != sorted(theirs["axes"]):
        refuse(
            f"its axes are {', '.join(theirs['axes'])}, this one's "
            f"{', '.join(ours['axes'])}"
        )
    for name, kind in ours["axes"].items():
        if kind != theirs["axes"][name]:
            refuse(f"its {name} is {theirs['axes'][name]}, this one's {kind}")
    for name, now in ours["versions"].items():
        then = theirs["versions"].get(name)
        if now != then:
            refuse(
                f"it was computed with {name} {then}, this one is with {now}, "
                "so the bits may differ; `load_sweep` reads it"
            )
    for name in theirs["outputs"] | ours["outputs"]:
        now, then = (x["outputs"].get(name, "missing") for x in (ours, theirs))
        if now != then:
            refuse(f"its output {name} is {then}, this one's {now}")
    for name, program in ours["programs"].items():
        if theirs["programs"].get(name, program) != program:
            where = f" for {name}" if name else ""
            refuse(f"its `train` is another function{where}, or closes over other data")
    if batch_size not in ("auto", theirs["batch_size"]):
        refuse(
            f"its `batch_size` is {theirs['batch_size']!r}, this one's {batch_size!r}"
        )


def _to_grid(
    rows: xr.Dataset, number: np.ndarray, points: Grid, outputs: list[str]
) -> xr.Dataset:
    """The results along the axes of the grid, from those of each member."""
    import xarray as xr

    if not np.array_equal(number, np.arange(rows.sizes["member"])):
        rows = rows.isel(member=number)
    if not rows["finished"].values.all():
        for name in outputs:
            lost = np.nan if rows[name].dtype.kind in "fc" else rows[name].dtype.type(0)
            rows[name] = rows[name].where(rows["finished"], lost)
        rows["diverged_at"] = rows["diverged_at"].where(rows["finished"], -1)
    rows["diverged"] = (rows["diverged_at"] >= 0).any("output")
    curves = xr.Dataset(
        {
            name: (
                (*points.dims, *rows[name].dims[1:]),
                rows[name].data.reshape(*points.shape, *rows[name].shape[1:]),
            )
            for name in (*outputs, "diverged", "diverged_at", "finished")
        },
        coords=points.coordinates | {"output": ("output", outputs)},
    )
    return curves


def _format_spec(spec: jax.ShapeDtypeStruct | None) -> str:
    """As "float32[50]"."""
    if spec is None:
        return "missing"
    return f"{file_dtype(spec.dtype)}[{','.join(map(str, spec.shape))}]"
