"""`sweep`: a training for every point of a grid, in batches, on all devices."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_rmsprop._validate import (
    check_bool,
    check_int,
    expected,
    require_extra,
    short_repr,
)
from jax_rmsprop.sweeps import (
    _batch,
    _cluster,
    _location,
    _members,
    _points,
    _results,
    _run,
    _store,
    _training,
)
from jax_rmsprop.sweeps._training import Training

if TYPE_CHECKING:
    import distributed
    import xarray as xr
    import zarr.abc.store

    StoreLike = str | os.PathLike[str] | zarr.abc.store.Store


def sweep(
    train: Callable[..., Any] | Training,
    axes: Mapping[str, Any],
    *,
    steps: int | None = None,
    zipped: bool | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    batch_size: int | str = "auto",
    devices: Sequence[Any] | None = None,
    store: StoreLike | None = None,
    save_every: float = 60.0,
    on_step: Callable[[xr.Dataset], None] | None = None,
    client: distributed.Client | None = None,
    wait: float | None = None,
    progress: bool = True,
) -> xr.Dataset:
    r"""Run a training for every point of a grid of hyperparameters.

    For every combination of the axes' values :math:`h` (or every pairing of them)

    .. math::
        y_h = \mathrm{train}(h)

    The members run in batches: `jax.vmap` over the members of a batch, a loop over
    the batches, one batch on each device; all processes of `jax.distributed` or all
    workers of a dask cluster share the work. The last batch is padded, so every batch
    runs the same compiled program: for a given `batch_size` a member has the same bits
    on one device, on many of its kind, after resuming, and anywhere in a batch; with
    `batch_size=1` they are those of `jax.jit(train)` on the same arrays. Another batch
    size adds in another order, and a number known at compile time may be rounded
    differently: members then differ by rounding error, as the training amplifies it.

    Args:
      train: a pure, traceable function of keyword arguments, the axes' names. It
        returns a tree of arrays, such as `{"loss": [steps], "accuracy": []}`, of the
        same shapes for all members. An output's name is its path in the tree, with
        dots ("eval.loss"); a bare array is "value".
        A `Training` runs for many steps and can resume after any of them.
      axes: the values of each argument. Numbers (float32, int32; 64 bits under x64)
        arrive traced, as scalars, and share a program; they must be distinct, also in
        the program's dtype. Python values arrive as they are, one compilation for each
        combination: bools, strings, functions, None, and numbers in an array of dtype
        object. For values of `log_one_minus`, float32 must hold the distance to 1 to
        within a thousandth.
      steps: for a `Training`, the step up to which each member runs; with a store, the
        same call with more steps resumes each member where it is.
      zipped: pair the axes' values, which must be equally many, instead of taking all
        combinations; None pairs `points` and nothing else.
      labels: for an axis of Python values, a text for each value, which identifies it
        in results and stores; by default its contents do.
      batch_size: members that a device runs at once, at least 1; if they draw from
        keys of "rbg", which `jax.vmap` mixes up, one after the other. "auto" depends on
        the program and the device: 128 on a CPU, fewer if the arrays of a step would
        not fit its cache (4 with convolutions); elsewhere as many, up to 65,536, as
        need 1 GiB of temporary arrays; in either case fewer if the compiler says that
        they need more memory than there is. It suits hundreds of members; with fewer,
        pass a number, or the padding is wasted work. A training that calls back to this
        process, by `jax.debug.callback` or the like, is never padded: "auto" is then 1.
      devices: where to run; None for all devices of all processes.
      store: where to save finished members as zarr: a folder (shared, if there are
        several processes), a URL that fsspec knows, such as "s3://bucket/gamma.zarr"
        with the credentials of the environment, or a store of `zarr.storage`, such as
        a `FsspecStore` with its own credentials. A store only grows: a call computes
        and adds the members it lacks, and returns those asked for. Repeat a call to
        resume it, however it ended; extend it by more seeds, values of any axis or
        other points. Training, axes, versions, kind of device and batch size must be
        the store's ("auto" takes its batch size). Any number of calls may share a
        folder if its file system has locks; nothing else can be locked, so use one
        writer at a time there. `xarray.open_zarr(store)` reads it without this package:
        one row for each member, valid if its `steps` are more than 0.
      save_every: seconds between saves of a `Training` with a store; each includes the
        carries to resume from. It is also saved at the end and at Ctrl-C.
      on_step: called in this process after each step of each batch with a Dataset of
        its members and of the steps that this call has run for them. An error that it
        raises ends the sweep as Ctrl-C does, with everything saved.
      client: a `dask.distributed.Client`: its workers run the batches, and this process
        writes their results. Workers may join, leave and be killed; each needs the
        caller's versions and kind of device.
      wait: with a client, the seconds without any worker before an error; None for
        never. After a minute there is a warning.
      progress: show members done (steps, for a `Training`), time left, the median loss
        and the number of members that have diverged, with tqdm.

    Returns:
      An `xarray.Dataset`. Its dimensions are the axes, in their order, with the given
      values as coordinates ("member" if zipped), then "step" for a `Training`, from 0,
      then an output's own, called "loss_dim_0" and so on. Its variables are the
      outputs, in their own dtypes (bfloat16 as float32), and

      - `diverged`: whether any number of any output is not finite;
      - `diverged_at` [..., output]: the first such index along the leading axis of the
        output; -1 if all are finite;
      - `steps`, for a `Training`: the number of steps of each member; steps that did
        not run are NaN. A member stops when its loss (or first output) is not finite;
      - `finished`: False only after Ctrl-C, which ends the sweep after the current
        batch (a second one raises KeyboardInterrupt immediately); with several
        processes Ctrl-C always raises. A signal that a parent ignores stays ignored.

      With a `store`, results larger than a quarter of the machine's free memory are
      dask arrays, read from the store when needed. The attributes are the number of
      members that this call has `computed`, the `batch_size`, and this call's
      `devices`, `compile_seconds` and `run_seconds`.

    Raises:
      TypeError: an argument of the wrong type; a `train` that does not take an axis,
        cannot be traced or returns anything but arrays.
      ValueError: an axis that is empty or has NaN, a duplicate, a value that 32 bits
        change or a distance to 1 that they do not hold; zipped axes of unequal lengths;
        a `store` of something else, or a worker with other versions, which the message
        names.
      RuntimeError: `train` raised an error while it was traced, or for every member (a
        single member that raises is flagged as diverged); or there was no worker.
      OSError: `store` cannot be read, written or locked.

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
    call = Call(**locals())
    with call.running():
        call.run(call.every, call.steps)
    return call.curves(call.every)


# The modules that reading a store needs.
_OF_STORES = "dask.array", "filelock", "pandas", "psutil", "xarray", "zarr"


@dataclasses.dataclass
class Call:
    """A call of `sweep`: its checked arguments, and its state.

    Attributes:
      keeps_carries: whether members can resume without a store.
      points: the axes.
      every: the numbers of all members.
      number: for each point of the axes, the number of its member.
      shown: its progress.
    """

    train: Any
    axes: Any
    steps: Any = None
    zipped: Any = None
    labels: Any = None
    batch_size: Any = "auto"
    devices: Any = None
    store: Any = None
    save_every: Any = 60.0
    on_step: Any = None
    client: Any = None
    wait: Any = None
    progress: Any = True
    keeps_carries: bool = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        require_extra("sweep", "pandas", "psutil", "tqdm.auto", "xarray")
        if self.store is not None:
            require_extra("sweep", "dask.array", "filelock", "zarr")
        check_bool("progress", self.progress)
        if self.zipped is None:
            self.zipped = isinstance(self.axes, _points.Points)
        self.zipped = check_bool("zipped", self.zipped)
        self.points = _members.parse_grid(self.axes, self.zipped, self.labels)
        _members.check_distinct(self.points)
        if self.batch_size != "auto":
            check_int("batch_size", self.batch_size, low=1)
        _check_seconds("save_every", self.save_every)
        if self.wait is not None:
            _check_seconds("wait", self.wait)
        if self.on_step is not None and not callable(self.on_step):
            raise TypeError(expected("on_step", "a function", self.on_step))
        if self.client is not None:
            require_extra("cluster", "distributed", "flatbuffers")
            _cluster.check_client(self.client, self.devices)
        self._mesh = _batch.make_mesh(self.devices)
        _training.check_signature(self.train, tuple(self.points.axes))
        self._stepped = isinstance(self.train, Training)
        if self._stepped:
            check_int("steps", self.steps, low=1)
        elif self.steps is not None:
            allowed = "None unless `train` is a Training"
            raise ValueError(expected("steps", allowed, self.steps))
        self.steps = int(self.steps or 1)
        with jax.transfer_guard("allow"):
            traced = isinstance(jnp.zeros([]), jax.core.Tracer)
        if traced:
            raise TypeError("`sweep` must be called outside a jit, a vmap and the like")
        self._at = None if self.store is None else _location.locate(self.store)

    @contextlib.contextmanager
    def running(self) -> Generator[None]:
        """Trace, open the store and show a bar, for `run` within it."""
        from tqdm.auto import tqdm

        silent = not self.progress or jax.process_index() > 0 or sys.stderr is None
        bar = tqdm(unit="step" if self._stepped else "member", disable=silent)
        with _without_switches(), bar:
            self.shown = _run.Progress(bar)
            with _run.finish_batch_on_sigint(self.shown):
                self._open()
                bar.total = len(self.every) * self.steps
                bar.update(int(np.minimum(self.results.steps, self.steps).sum()))
                yield

    def _open(self) -> None:
        """Trace the first training, and look up the members in the store."""
        at = self._at
        header = None if at is None else _store.read_header(at)
        header = header if _batch.broadcast_from_process_0(header is not None) else None
        values: dict[str, dict[str, str]] = {}
        if at is not None:
            known, axes = (header or {}).get("values", {}), dict[str, _members.Axis]()
            for name, axis in self.points.axes.items():
                axes[name], values[name] = axis.named_by(known.get(name, {}))
            self.points = dataclasses.replace(self.points, axes=axes)
        self._members, self.number = self.points.members()
        self.every = np.arange(len(self._members.index))
        self._groups = self.points.combinations(self._members)
        self._traced, self._checked = dict[int, _training.Traced](), None
        self._specs, self._device_count = dict[str, str](), self._mesh.size
        outputs = self.traced(0).outputs
        self._shapes = _results.Shapes(outputs, self._stepped, self.steps)
        self.shown.judged = self._shapes.judged
        free = () if self._stepped else ("rung", "step")
        dims = self._shapes.dimensions()
        for name in outputs:
            taken = _members.is_reserved(name) and name not in free
            if taken or any(x in self.points.axes for x in (name, *dims[name])):
                raise ValueError(
                    f"`train` must not return an output {name!r}: the name is taken"
                )
        self.programs = _run.Programs(self.traced, self._mesh, self.shown)
        if at is None:
            self.size, count = self._batch_size(), len(self.every)
            self.results: Any = _results.InMemory(
                count, self._shapes, self.keeps_carries
            )
            return
        kinds = self.points.kinds
        ours = {
            "format": _store.FORMAT,
            "axes": kinds,
            "zipped": self.points.zipped,
            "stepped": self._stepped,
            "outputs": self._specs,
            "programs": {},
            "values": values,
            "versions": _batch.versions_of(self._mesh.devices.flat[0]),
        }
        if header is None:
            size = self._batch_size()
            if jax.process_index() == 0:
                _store.create(at, {**ours, "batch_size": size}, kinds, self._shapes)
            _batch.broadcast_from_process_0(0)
            header = _store.open_header(at)
        self.size = header["batch_size"]
        size = self.size if self.batch_size == "auto" else self.batch_size
        check_same_sweep(at, header, {**ours, "batch_size": size})
        self.results = _store.ZarrStore(at, self._members, self._shapes)
        self.results.agree()
        more = {n: x for n, x in values.items() if x != header["values"].get(n)}
        if more or (self.points.zipped and not header["zipped"]):
            self.results.add_to_header(values=values, zipped=self.points.zipped)
        self._checked = dict(header["programs"])
        for number in list(self._traced):
            self._check(number)

    def traced(self, number: int) -> _training.Traced:
        """The training of a combination of Python values.

        Raises:
          ValueError: its outputs differ from the first one's, or it is not the store's.
        """
        if number not in self._traced:
            combination, first = self._groups[number], self._groups[0]
            if len(self._groups) > 1:
                self.shown.bar.set_description(f"tracing {combination.name}")
            new = trace(self.train, combination, self._members)
            specs = {name: _format_spec(x) for name, x in new.outputs.items()}
            self._specs = self._specs or specs
            for name in self._specs | specs:
                ours, theirs = (x.get(name, "missing") for x in (self._specs, specs))
                if ours != theirs:
                    raise ValueError(
                        "`train` must return the same for all Python values, but "
                        f"{name} is {ours} with {first.python} and {theirs} with "
                        f"{combination.python}"
                    )
            self._traced[number] = new
            self._check(number)
        return self._traced[number]

    def _all_traced(self) -> list[_training.Traced]:
        return [self.traced(i) for i in range(len(self._groups))]

    def _check(self, number: int) -> None:
        """Check a program against the store's, or add it there."""
        if self._checked is None:
            return
        now = _training.fingerprint(self._traced[number])
        name = self._groups[number].name
        if name not in self._checked:
            self._checked[name] = now
            self.results.add_to_header(programs={name: now})
        check_program(self.results.at, self._checked, name, now)

    def _batch_size(self) -> int:
        """The given batch size, or the programs' default."""
        if self.batch_size != "auto":
            return self.batch_size
        traced, device = self._all_traced(), self._mesh.local_mesh.devices.flat[0]
        if any(each.calls_back for each in traced):
            return 1  # only members may call back, no padding
        return _batch.auto_batch_size(
            traced,
            device.platform,
            int(_batch.broadcast_from_process_0(float(_batch.device_bytes(device)))),
            lambda which, size: self.programs.get(which, size, size),
        )

    def run(self, some: np.ndarray, end: int) -> None:
        """Run these members up to a step; rerun those that are damaged or given up.

        Raises:
          KeyboardInterrupt: interrupted before anything ran.
        """
        damaged = None
        for _ in range(4):
            try:
                if self._run(some, end) and not self.shown.stopped:
                    continue  # check whether more remains to be run
                if self.shown.stopped and not self.results.steps.any():
                    raise KeyboardInterrupt
                self._rows = self.results.to_dataset(free_memory() // 4)
                return
            except _store.Damaged as error:
                damaged = error
                self.results.give_up(damaged.rows)
        raise OSError(
            f"`store` {self.results.at.name} was damaged again after each repair"
        ) from damaged

    def _run(self, some: np.ndarray, end: int) -> bool:
        """Run what these members lack; return whether they lacked anything."""
        results, tasks = self.results, list[_run.Task]()
        for i, group in enumerate(self._groups):
            own = np.intersect1d(group.members, some)
            tasks += _run.plan(results, i, own, end, self.size)
        needed, heard = bool(tasks), self._heard if self.on_step else None
        of_all = results, self._members.numbers, self._shapes, self.programs, self.shown
        arguments = *of_all, self.size, self.save_every, heard
        if tasks and self.client is None:
            _run.Runner(*arguments).run(tasks)
        elif tasks:
            versions = _batch.versions_of(self._mesh.devices.flat[0])
            runner = _cluster.ClusterRunner(
                *arguments, self.client, self.wait, self._all_traced(), versions
            )
            runner.run(tasks)
            self._device_count = len(runner.devices)
        if self._checked is not None and not self.shown.stopped:
            self._all_traced()  # check programs that did not run against the store
        return needed

    @property
    def outputs(self) -> list[str]:
        """The names of what the training returns."""
        return self._shapes.names

    def points_of_members(self, over: str) -> np.ndarray:
        """Number the members' points; members that differ in `over` alone share one."""
        import pandas as pd

        others = [x for name, x in self._members.columns.items() if name != over]
        if not others:
            return np.zeros(len(self.every), int)
        return pd.MultiIndex.from_arrays(others).factorize()[0]

    def last(self, output: str, step: int) -> np.ndarray:
        """The value of an output at a step, for each member; NaN if it ended by then.

        Raises:
          ValueError: the output has more than one number a step.
        """
        values = self._rows[output]
        if values.ndim > 2:
            raise ValueError(f"`by` must be one number a step, but {output} is more")
        if values.dtype.kind == "c":
            raise ValueError(f"`by` must be real, but {output} is {values.dtype}")
        ended = self._shapes.ended(self._rows["diverged_at"], step)
        there = np.asarray((self._rows["steps"] >= step) & ~ended)
        found = np.asarray(values[:, step - 1], float)
        return np.where(there & np.isfinite(found), found, np.nan)

    def _heard(self, task: _run.Task) -> None:
        """Call `on_step` with the steps of a batch."""
        import xarray as xr

        dims, count = self._shapes.dimensions(), task.heard
        coords: Any = {
            name: ("member", column[task.members])
            for name, column in self._members.columns.items()
        }
        rows = {name: x[:, :count] for name, x in task.history.items()}
        if self._stepped:
            coords["step"] = task.step - count + np.arange(count)
        else:
            rows = {name: x[:, 0] for name, x in rows.items()}
        self.on_step(xr.Dataset({n: (dims[n], x) for n, x in rows.items()}, coords))

    def curves(self, some: np.ndarray, rung: np.ndarray | None = None) -> xr.Dataset:
        """The results along the axes; warn if some of `some` are not finished."""
        curves = _to_grid(self._rows, self.number, self.points, self._shapes)
        if rung is not None:
            found = rung[self.number].reshape(self.points.shape)
            curves["rung"] = (self.points.dims, found)
        lacking = int((~_finished(self._rows, self._shapes).values[some]).sum())
        if lacking:
            again = "" if self._at is None else "; repeat the call to compute them"
            warnings.warn(
                f"interrupted: {len(some) - lacking} of {len(some)} members are "
                f"finished; those where `finished` is False are missing{again}",
                stacklevel=3,
            )
        return curves.assign_attrs(
            computed=len(self.shown.ran),
            batch_size=self.size,
            devices=self._device_count,
            compile_seconds=round(self.shown.compile_seconds, 3),
            run_seconds=round(self.shown.run_seconds, 3),
        )


@contextlib.contextmanager
def _without_switches() -> Generator[None]:
    """Suspend JAX's switches, and a mesh around the call.

    A sweep runs compiled programs, and a diverged member is a result: they are meant
    for a single training.
    """
    with (
        jax.disable_jit(False),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.transfer_guard("allow"),
        jax.set_mesh(Mesh(np.empty((), object), ())),
    ):
        yield


def _check_seconds(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float | np.number)
    if isinstance(value, bool) or not is_number or not value >= 0:
        raise ValueError(expected(name, "a number of seconds >= 0", value))


def free_memory() -> int:
    """The bytes of free memory of this machine."""
    import psutil

    return psutil.virtual_memory().available


def load_sweep(store: StoreLike) -> xr.Dataset:
    """Load a sweep from its store, finished or not, without the training.

    Args:
      store: as given to `sweep`.

    Returns:
      The Dataset that `sweep` would return for all values in the store, sorted along
      each axis, without the attributes of a call; `finished` is False for combinations
      that have not been computed. If any points were zipped, or most combinations are
      missing, the dimension is "member", sorted by the axes.

    Raises:
      ValueError: the store holds something else, or no finished members.
      OSError: it cannot be read, or is damaged.

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
    require_extra("sweep", *_OF_STORES)
    import pandas as pd

    at = _location.locate(store)
    header = _store.open_header(at)
    names, shapes = list(header["axes"]), _shapes_of(at, header)
    table = pd.DataFrame(_store.read_columns(at, names)).sort_values(names)
    if table.empty:
        raise ValueError(f"`store` {at.name} has no finished members")
    columns = {name: np.array(table[name].tolist()) for name in names}
    values = {name: np.unique(column) for name, column in columns.items()}
    # If most combinations are missing, the table stays a table.
    size = np.prod([len(x) for x in values.values()], dtype=float)
    zipped = bool(header["zipped"]) or size > 4 * len(table)
    axes = {
        name: _members.Axis(labels, header["axes"][name])
        for name, labels in (columns if zipped else values).items()
    }
    grid = _members.Grid(axes, zipped)
    members, number = grid.members()
    with _explain_damage(at):
        rows = _store.ZarrStore(at, members, shapes).to_dataset(free_memory() // 4)
    return _to_grid(rows, number, grid, shapes)


def load_carry(training: Any, store: StoreLike, point: Any) -> Any:
    """Load the carry of one member of a `Training`, to evaluate or continue it by hand.

    Args:
      training: the `Training` given to `sweep`.
      store: as given to `sweep`.
      point: a mapping from each axis to the member's value.

    Returns:
      The carry after the member's last step in the store.

    Raises:
      TypeError: a value of the point is not of its axis' kind.
      ValueError: the store holds another training; there is no such member, it has
        diverged, or its carry has been dropped.

    Example:
      >>> import tempfile
      >>> from jax_rmsprop import Training, load_carry, sweep
      >>> training = Training(
      ...     lambda rate: {"x": 0 * rate},
      ...     lambda carry, rate: ({"x": carry["x"] + rate}, {"loss": carry["x"]}),
      ... )
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     store = f"{folder}/a.zarr"
      ...     _ = sweep(training, {"rate": [0.5]}, steps=4, store=store, progress=False)
      ...     print(load_carry(training, store, {"rate": 0.5})["x"])
      2.0
    """
    require_extra("sweep", *_OF_STORES)
    if not isinstance(training, Training):
        raise TypeError(expected("training", "a Training", training))
    at = _location.locate(store)
    header = _store.open_header(at)
    if isinstance(point, Mapping):
        point = {_members.as_argument(name): value for name, value in point.items()}
    if not isinstance(point, Mapping) or set(point) != set(header["axes"]):
        raise ValueError(
            f"`point` must have a value for each of {', '.join(header['axes'])}, got "
            f"{short_repr(point)}"
        )
    absent = ValueError(
        f"`store` {at.name} has no carry of {short_repr(dict(point))}: it has not run, "
        "it has diverged, or its carry was dropped"
    )
    axes = dict[str, _members.Axis]()
    for name, kind in header["axes"].items():
        value = np.empty(1, object)
        value[0] = point[name]
        if kind in _members.PYTHON_KINDS:
            axis = _members.parse_grid({name: value}, False).axes[name]
            axes[name], _ = axis.named_by(header["values"].get(name, {}))
            continue
        number = np.asarray(point[name])
        if number.shape or number.dtype.kind not in "iuf":
            got = short_repr(point[name])
            raise TypeError(f"`point` must have a number for {name}, got {got}")
        labels = number[None].astype(_members.column_dtype(kind))
        if labels[0] != number:
            raise absent
        _members.check_numbers(name, labels, np.dtype(kind))
        axes[name] = _members.Axis(labels, kind)
    grid = _members.Grid(axes, False)
    members, _ = grid.members()
    (combination,) = grid.combinations(members)
    with _without_switches():
        traced = trace(training, combination, members)
        # The text of the same program differs between versions and platforms.
        if header["versions"] == _batch.versions_of(jax.devices()[0]):
            now = _training.fingerprint(traced)
            check_program(at, header["programs"], combination.name, now)
    with _explain_damage(at):
        found = _store.ZarrStore(at, members, _shapes_of(at, header))
        packed = found.carry_of(np.zeros(1, int), int(found.steps[0]))
    if packed is None:
        raise absent
    leaves = _batch.unpack(packed, traced.carry_specs)
    return traced.tree([jnp.asarray(x)[0] for x in leaves])


def drop_carries(store: StoreLike) -> None:
    """Delete the carries of a store to free their space, and keep the curves.

    Args:
      store: as given to `sweep`, which then can no longer run its members for more
        steps.

    Returns:
      None.

    Raises:
      ValueError: the store holds something else.

    Example:
      >>> import tempfile
      >>> from jax_rmsprop import Training, drop_carries, sweep
      >>> training = Training(lambda x: x, lambda carry, x: (carry, {"loss": carry}))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     store = f"{folder}/a.zarr"
      ...     _ = sweep(training, {"x": [0.5]}, steps=4, store=store, progress=False)
      ...     drop_carries(store)
    """
    require_extra("sweep", *_OF_STORES)
    at = _location.locate(store)
    _store.open_header(at)
    with _location.locked(at):
        _store.delete_carries(at)


@contextlib.contextmanager
def _explain_damage(at: _location.Location) -> Generator[None]:
    try:
        yield
    except _store.Damaged as damaged:
        raise OSError(
            f"`store` {at.name} is damaged: {len(damaged.rows)} members cannot be "
            "read; repeat the call of `sweep` to compute them again"
        ) from damaged


def _shapes_of(at: _location.Location, header: Mapping[str, Any]) -> _results.Shapes:
    """The shapes of a store's results."""
    group: Any = _store.open_group(at)
    stepped, arrays = bool(header["stepped"]), {n: group[n] for n in header["outputs"]}
    outputs = {
        name: jax.ShapeDtypeStruct(x.shape[2 if stepped else 1 :], x.dtype)
        for name, x in arrays.items()
    }
    steps = next(iter(arrays.values())).shape[1] if stepped else 1
    return _results.Shapes(outputs, stepped, steps)


def check_program(
    at: _location.Location, programs: Mapping[str, str], name: str, now: str
) -> None:
    """Raise an error if a store's program of this name is another one.

    Raises:
      ValueError: naming the Python values of the program.
    """
    if programs.get(name, now) != now:
        where = f" for {name}" if name else ""
        raise ValueError(
            f"`store` {at.name} holds another sweep: its `train` is another "
            f"function{where}, or closes over other data"
        )


def check_same_sweep(
    at: _location.Location, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> None:
    """Raise an error if a store is of another training.

    Raises:
      ValueError: naming the first difference.
    """
    facts = [
        {"`train`": "a Training" if header["stepped"] else "a function"}
        | {f"axis {name}": kind for name, kind in header["axes"].items()}
        | header["versions"]
        | {f"output {name}": spec for name, spec in header["outputs"].items()}
        | {"`batch_size`": header["batch_size"]}
        for header in (theirs, ours)
    ]
    for what in facts[0] | facts[1]:
        then, now = (each.get(what, "missing") for each in facts)
        bits = ", so the bits may differ; `load_sweep` reads it"
        if then != now:
            raise ValueError(
                f"`store` {at.name} holds another sweep: its {what} is {then}, this "
                f"one's is {now}{bits if what in ours['versions'] else ''}"
            )


def trace(
    train: Any, combination: _members.Combination, members: _members.Members
) -> _training.Traced:
    """Trace a training with the Python values of a combination."""
    kinds = {name: x.dtype for name, x in members.numbers.items()}
    return _training.trace(train, combination.python, kinds)


def _finished(rows: xr.Dataset, shapes: _results.Shapes) -> xr.DataArray:
    """Which members have run all steps or ended early."""
    ended = (rows["steps"] > 0) & shapes.ended(rows["diverged_at"])
    return (rows["steps"] >= shapes.steps) | ended


def _to_grid(
    rows: xr.Dataset, number: np.ndarray, points: _members.Grid, shapes: _results.Shapes
) -> xr.Dataset:
    """Arrange the results of the members along the axes of the grid."""
    import xarray as xr

    if not np.array_equal(number, np.arange(rows.sizes["member"])):
        rows = rows.isel(member=number)
    diverged = (rows["diverged_at"] >= 0).any("output")
    rows = rows.assign(diverged=diverged, finished=_finished(rows, shapes))
    names = [*shapes.names, "diverged", "diverged_at", "finished"]
    names += ["steps"] if shapes.stepped else []
    return xr.Dataset(
        {
            name: (
                (*points.dims, *rows[name].dims[1:]),
                rows[name].data.reshape(*points.shape, *rows[name].shape[1:]),
            )
            for name in names
        },
        coords=points.coordinates | shapes.coordinates(),
    )


def _format_spec(spec: jax.ShapeDtypeStruct) -> str:
    """Write a spec as "float32[50]"."""
    return f"{_batch.file_dtype(spec.dtype)}[{','.join(map(str, spec.shape))}]"
