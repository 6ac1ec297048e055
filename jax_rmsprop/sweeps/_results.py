"""Where the results of a sweep are kept while it runs: what a store, too, can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from jax_rmsprop.sweeps._batch import Rows, file_dtype
from jax_rmsprop.sweeps._training import OutputSpecs

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass
class Block:
    """Some steps of the members that one device runs at once.

    Attributes:
      members: their numbers, at most a batch.
      begin: the number of the first step here.
      steps: for each member how many steps it has now: fewer than the others, if its
        judged output is not finite any more.
      rows: for each output [members, steps here, ...], and `diverged_at`.
      carry: where they go on from, [members, bytes]; None if nobody will.
      slot: where a store has them; None if it has not.
      lanes: the place of each in that slot.
    """

    members: np.ndarray
    begin: int
    steps: np.ndarray
    rows: Rows
    carry: np.ndarray | None = None
    slot: int | None = None
    lanes: np.ndarray | None = None


class Begun(NamedTuple):
    """Members that have run for some steps, and go on together.

    Attributes:
      members: their numbers.
      steps: how many steps they have.
      slot: that of a store which has them, and no others that go on.
      lanes: their places in it.
    """

    members: np.ndarray
    steps: int
    slot: int | None = None
    lanes: np.ndarray | None = None


class Shapes(NamedTuple):
    """What a member's results are.

    Attributes:
      outputs: of a step, by name.
      stepped: whether an output has a dimension of steps; of a plain training, which
        has one, it has not.
      steps: how many there are to be.
    """

    outputs: OutputSpecs
    stepped: bool
    steps: int

    @property
    def judged(self) -> str:
        """The output that says whether a member needs to go on."""
        return "loss" if "loss" in self.outputs else self.names[0]

    @property
    def names(self) -> list[str]:
        """The outputs."""
        return list(self.outputs)

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape of a member and the dtype of each array, `diverged_at` too."""
        step = (self.steps,) if self.stepped else ()
        own = {
            name: ((*step, *x.shape), file_dtype(x.dtype))
            for name, x in self.outputs.items()
        }
        return own | {"diverged_at": ((len(own),), np.dtype("int32"))}

    def finished(self, rows: xr.Dataset) -> xr.DataArray:
        """Which members have all steps, or have ended before."""
        steps = rows["steps"]
        if not self.stepped:
            return steps > 0
        ended = rows["diverged_at"].isel(output=self.names.index(self.judged)) >= 0
        return (steps >= self.steps) | ((steps > 0) & ended)

    def dimensions(self) -> dict[str, tuple[str, ...]]:
        """The dimensions of each: the member, the step, the output's own by number."""
        step = ("step",) if self.stepped else ()
        own = {
            name: ("member", *step, *(f"{name}_dim_{i}" for i in range(len(x.shape))))
            for name, x in self.outputs.items()
        }
        return own | {"diverged_at": ("member", "output"), "steps": ("member",)}


class Results(Protocol):
    """The results of the members of a sweep.

    Attributes:
      steps: for each member how many steps it has.
      keeps_carries: whether members can go on.
    """

    steps: np.ndarray
    keeps_carries: bool

    def append(self, blocks: Sequence[Block]) -> None:
        """Keep what has been computed, where it is more than there is."""
        ...

    def begun(self, members: np.ndarray, steps: int) -> list[Begun]:
        """Of the members those that have begun and need to go on to these steps."""
        ...

    def carry(self, begun: Begun) -> np.ndarray | None:
        """Where they go on from; None if they are somewhere else by now."""
        ...

    def to_dataset(self, steps: int, memory: int) -> xr.Dataset:
        """All members, in their order, for at most these steps."""
        ...


class InMemory:
    """Results in memory, in every process."""

    def __init__(self, members: int, shapes: Shapes, keeps_carries: bool = False):
        """Make room for all members."""
        self.steps = np.zeros(members, "int32")
        self.keeps_carries = keeps_carries
        self._shapes, self._carry = shapes, np.zeros((0, 0), "uint8")
        self._rows = {
            name: np.full((members, *shape), missing(dtype), dtype)
            for name, (shape, dtype) in shapes.arrays().items()
        }
        self._rows["diverged_at"][:] = -1

    def append(self, blocks: Sequence[Block]) -> None:
        """Keep what has been computed."""
        for block in blocks:
            self.steps[block.members] = block.steps
            for name, rows in block.rows.items():
                into = self._rows[name]
                if name == "diverged_at":
                    into[block.members] = earlier(into[block.members], rows)
                elif self._shapes.stepped:
                    steps = slice(block.begin, block.begin + rows.shape[1])
                    into[block.members, steps] = cut(rows, block)
                else:
                    into[block.members] = rows[:, 0]
            if self.keeps_carries and block.carry is not None:
                if not self._carry.size:
                    shape = len(self.steps), block.carry.shape[1]
                    self._carry = np.zeros(shape, "uint8")
                self._carry[block.members] = block.carry

    def begun(self, members: np.ndarray, steps: int) -> list[Begun]:
        """Of the members those that have begun and need to go on to these steps."""
        have = self.steps[members]
        judged = self._shapes.names.index(self._shapes.judged)
        alive = self._rows["diverged_at"][members, judged] < 0
        some = members[(have > 0) & (have < steps) & alive]
        return [
            Begun(some[self.steps[some] == k], k) for k in np.unique(self.steps[some])
        ]

    def carry(self, begun: Begun) -> np.ndarray | None:
        """Where they go on from."""
        return self._carry[begun.members]

    def to_dataset(self, steps: int, memory: int) -> xr.Dataset:
        """All members, in memory as they are."""
        del memory
        import xarray as xr

        dims = self._shapes.dimensions()
        rows = self._rows | {"steps": self.steps}
        found = xr.Dataset({name: (dims[name], x) for name, x in rows.items()})
        return found.isel(step=slice(steps)) if self._shapes.stepped else found


def missing(dtype: np.dtype) -> Any:
    """What stands where a step was not run."""
    return np.nan if dtype.kind in "fc" else dtype.type(0)


def earlier(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Where outputs diverged, of what was there and of steps that came after."""
    return np.where(old >= 0, old, new)


def cut(rows: np.ndarray, block: Block) -> np.ndarray:
    """The rows of a block without the steps of members that have ended before."""
    step = block.begin + np.arange(rows.shape[1])
    run = step < block.steps[:, None]
    run = run.reshape(*run.shape, *(1,) * (rows.ndim - 2))
    return rows if run.all() else np.where(run, rows, missing(rows.dtype))
