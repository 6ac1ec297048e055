"""Where the results of a sweep are kept while it runs: what a store, too, can do."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from jax_rmsprop.sweeps._batch import Rows, file_dtype
from jax_rmsprop.sweeps._training import OutputSpecs

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass
class Block:
    """Some steps of some members.

    Attributes:
      members: their numbers.
      begin: the number of the first step here.
      steps: for each member how many steps it has now: fewer than the others, if its
        judged output is not finite any more.
      rows: for each output [members, steps here, ...], and `diverged_at`.
      carry: where they go on from, [members, bytes]; None if nobody will.
    """

    members: np.ndarray
    begin: int
    steps: np.ndarray
    rows: Rows
    carry: np.ndarray | None = None

    @property
    def end(self) -> int:
        """How many steps those have that have not ended."""
        outputs = (x for name, x in self.rows.items() if name != "diverged_at")
        return self.begin + next(outputs).shape[1]

    def take(self, some: np.ndarray) -> Block:
        """Some of the members."""
        carry = None if self.carry is None else self.carry[some]
        rows = {name: x[some] for name, x in self.rows.items()}
        return Block(self.members[some], self.begin, self.steps[some], rows, carry)


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
    def names(self) -> list[str]:
        """The outputs."""
        return list(self.outputs)

    @property
    def judged(self) -> str:
        """The output that says whether a member needs to go on."""
        return "loss" if "loss" in self.outputs else self.names[0]

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape of a member and the dtype of each array, `diverged_at` too."""
        step = (self.steps,) if self.stepped else ()
        own = {
            name: ((*step, *x.shape), file_dtype(x.dtype))
            for name, x in self.outputs.items()
        }
        return own | {"diverged_at": ((len(own),), np.dtype("int32"))}

    def dimensions(self) -> dict[str, tuple[str, ...]]:
        """The dimensions of each: the member, the step, the output's own by number."""
        step = ("step",) if self.stepped else ()
        own = {
            name: ("member", *step, *(f"{name}_dim_{i}" for i in range(len(x.shape))))
            for name, x in self.outputs.items()
        }
        return own | {"diverged_at": ("member", "output"), "steps": ("member",)}

    def ended(self, diverged_at: Any) -> Any:
        """Whose judged output is not finite any more, so that they need not go on."""
        return diverged_at[:, self.names.index(self.judged)] >= 0


class Results(Protocol):
    """The results of the members of a sweep.

    Attributes:
      steps: for each member how many steps it has.
      keeps_carries: whether members can go on.
    """

    steps: np.ndarray
    keeps_carries: bool

    def append(self, block: Block | None) -> None:
        """Keep what has been computed, where it is more than there is."""
        ...

    def ended(self, members: np.ndarray) -> np.ndarray:
        """Which of these members, which have begun, need not go on."""
        ...

    def carry(self, members: np.ndarray, steps: int) -> np.ndarray | None:
        """Where they go on from; None if they have other steps by now."""
        ...

    def to_dataset(self, memory: int) -> xr.Dataset:
        """All members, in their order."""
        ...


class InMemory:
    """Results in memory, in every process."""

    def __init__(self, members: int, shapes: Shapes, keeps_carries: bool = False):
        """Make room for all members."""
        self.steps = np.zeros(members, "int32")
        self.keeps_carries = keeps_carries
        self._shapes, self._carry = shapes, dict[int, np.ndarray]()
        self._rows = {
            name: np.full((members, *shape), missing(name, dtype), dtype)
            for name, (shape, dtype) in shapes.arrays().items()
        }

    def append(self, block: Block | None) -> None:
        """Keep what has been computed."""
        if block is None:
            return
        self.steps[block.members] = block.steps
        for name in self._shapes.names:
            at: Any = block.members
            if self._shapes.stepped:
                at = at, slice(block.begin, block.end)
            self._rows[name][at] = outputs_of(block, name, self._shapes.stepped)
        into = self._rows["diverged_at"]
        into[block.members] = earlier(into[block.members], block)
        if self.keeps_carries and block.carry is not None:
            pairs = zip(block.members.tolist(), block.carry, strict=True)
            self._carry.update(pairs)

    def ended(self, members: np.ndarray) -> np.ndarray:
        """Which of these members need not go on."""
        return self._shapes.ended(self._rows["diverged_at"][members])

    def carry(self, members: np.ndarray, steps: int) -> np.ndarray | None:
        """Where they go on from."""
        del steps
        return np.stack([self._carry[i] for i in members.tolist()])

    def to_dataset(self, memory: int) -> xr.Dataset:
        """All members, in memory as they are."""
        del memory
        import xarray as xr

        dims, rows = self._shapes.dimensions(), self._rows | {"steps": self.steps}
        return xr.Dataset({name: (dims[name], x) for name, x in rows.items()})


def missing(name: str, dtype: np.dtype) -> Any:
    """What stands where a step was not run."""
    if name == "diverged_at":
        return -1
    return np.nan if dtype.kind in "fc" else dtype.type(0)


def earlier(old: np.ndarray, block: Block) -> np.ndarray:
    """Where outputs diverged, of what was there before a block, and of the block."""
    new = block.rows["diverged_at"]
    return np.where(old >= 0, old, new) if block.begin else new


def outputs_of(block: Block, name: str, stepped: bool) -> np.ndarray:
    """An output without the steps of members that have ended before."""
    rows = block.rows[name]
    if not stepped:
        return rows[:, 0]
    run = block.begin + np.arange(rows.shape[1]) < block.steps[:, None]
    run = run.reshape(*run.shape, *(1,) * (rows.ndim - 2))
    return rows if run.all() else np.where(run, rows, missing(name, rows.dtype))
