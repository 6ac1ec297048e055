"""Results of a running sweep: their shapes, the interface, and one in memory."""

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
      end: the number of steps of the members that have not ended.
      steps: the number of steps of each member; fewer than `end` if its judged output
        has become infinite or NaN.
      rows: `diverged_at` and each output, [members, steps here, ...], missing after a
        member's end; a plain training's have no dimension of steps.
      carry: their packed carries, [members, bytes]; None if they cannot resume.
    """

    members: np.ndarray
    begin: int
    end: int
    steps: np.ndarray
    rows: Rows
    carry: np.ndarray | None = None

    def take(self, some: np.ndarray) -> Block:
        """Select some of the members."""
        carry = None if self.carry is None else self.carry[some]
        rows = {name: x[some] for name, x in self.rows.items()}
        members, steps = self.members[some], self.steps[some]
        return Block(members, self.begin, self.end, steps, rows, carry)


class Shapes(NamedTuple):
    """The shapes of a member's results.

    Attributes:
      outputs: the outputs of a step, by name.
      stepped: whether outputs have a dimension of steps; those of a plain training,
        which has one step, do not.
      steps: the number of steps to run.
    """

    outputs: OutputSpecs
    stepped: bool
    steps: int

    @property
    def names(self) -> list[str]:
        """The names of the outputs."""
        return list(self.outputs)

    @property
    def judged(self) -> str:
        """The output that ends a member when it is not finite."""
        return "loss" if "loss" in self.outputs else self.names[0]

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """The shape per member and dtype of each array, including `diverged_at`."""
        step = (self.steps,) if self.stepped else ()
        outputs = self.outputs.items()
        own = {n: ((*step, *x.shape), file_dtype(x.dtype)) for n, x in outputs}
        return own | {"diverged_at": ((len(own),), np.dtype("int32"))}

    def part(self, block: Block) -> tuple[slice, ...]:
        """The index of a block's steps in an output of one member."""
        return (slice(block.begin, block.end),) if self.stepped else ()

    def dimensions(self) -> dict[str, tuple[str, ...]]:
        """The dimensions of each array: member, step, the output's own by number."""
        step = ("step",) if self.stepped else ()
        own = {
            name: ("member", *step, *(f"{name}_dim_{i}" for i in range(len(x.shape))))
            for name, x in self.outputs.items()
        }
        return own | {"diverged_at": ("member", "output"), "steps": ("member",)}

    def coordinates(self) -> dict[str, tuple[str, Any]]:
        """The labels of the outputs and of the steps, from 0."""
        step = {"step": ("step", np.arange(self.steps))} if self.stepped else {}
        return {"output": ("output", self.names), **step}

    def ended(self, diverged_at: Any, step: int = 2**31) -> Any:
        """Which members ended by a step, since their judged output is not finite."""
        first = diverged_at[:, self.names.index(self.judged)]
        return (first >= 0) & (first < step)


class Results(Protocol):
    """The results of the members of a sweep.

    Attributes:
      steps: the number of steps of each member.
      keeps_carries: whether members can resume.
    """

    steps: np.ndarray
    keeps_carries: bool

    def append(self, block: Block | None) -> None:
        """Store the members of a block that have more steps than stored."""
        ...

    def ended(self, members: np.ndarray) -> np.ndarray:
        """Which of these members, all of them begun, have ended."""
        ...

    def carry(self, members: np.ndarray, steps: int) -> np.ndarray | None:
        """The packed carries at this step; None if members are at another by now."""
        ...

    def to_dataset(self, memory: int) -> xr.Dataset:
        """All members, in their order."""
        ...


class InMemory:
    """Results in memory, the same in every process."""

    def __init__(self, members: int, shapes: Shapes, keeps_carries: bool = False):
        """Allocate arrays for all members."""
        self.steps = np.zeros(members, "int32")
        self.keeps_carries = keeps_carries
        self._shapes, self._carry = shapes, dict[int, np.ndarray]()
        self._rows = {
            name: np.full((members, *shape), missing(name, dtype), dtype)
            for name, (shape, dtype) in shapes.arrays().items()
        }

    def append(self, block: Block | None) -> None:
        """Store a block."""
        if block is None:
            return
        self.steps[block.members] = block.steps
        for name in self._shapes.names:
            at = block.members, *self._shapes.part(block)
            self._rows[name][at] = block.rows[name]
        first = self._rows["diverged_at"]
        first[block.members] = earlier(first[block.members], block)
        if self.keeps_carries and block.carry is not None:
            self._carry |= zip(block.members.tolist(), block.carry, strict=True)

    def ended(self, members: np.ndarray) -> np.ndarray:
        """Which of these members have ended."""
        return self._shapes.ended(self._rows["diverged_at"][members])

    def carry(self, members: np.ndarray, steps: int) -> np.ndarray | None:
        """The packed carries."""
        del steps
        return np.stack([self._carry[i] for i in members.tolist()])

    def to_dataset(self, memory: int) -> xr.Dataset:
        """All members."""
        del memory
        import xarray as xr

        dims, rows = self._shapes.dimensions(), self._rows | {"steps": self.steps}
        return xr.Dataset({name: (dims[name], x) for name, x in rows.items()})


def missing(name: str, dtype: np.dtype) -> Any:
    """The value of steps that did not run."""
    number = -1 if name == "diverged_at" else np.nan if dtype.kind in "fc" else 0
    return dtype.type(number)


def earlier(old: np.ndarray, block: Block) -> np.ndarray:
    """The first divergence of each output, before a block or in it."""
    new = block.rows["diverged_at"]
    return np.where(old >= 0, old, new) if block.begin else new
