"""Convert the states of PyTorch's optimizer and of those with its interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optax

from jax_rmsprop import conventions
from jax_rmsprop.migrate._elements import Layout, LayoutIndex
from jax_rmsprop.migrate._state import (
    FIELDS,
    build_state,
    check_all_used,
    extract_arrays,
    pop_array,
    to_numpy,
)

Names = Sequence[str] | None
_ENTRIES = {"nu": "square_avg", "mu": "grad_avg", "momentum": "momentum_buffer"}


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """How an optimizer with PyTorch's interface writes its state.

    Attributes:
      convention: the function of `conventions` that takes its steps.
      settings: that function's arguments, in its groups, that decide a state's fields.
      others: arguments that may differ between groups.
      entries: its names of our fields.
      counts_in_floats: whether its step is a float.
      options: for each field but nu, the setting that is true if it has that field.
    """

    convention: Callable[..., optax.GradientTransformation]
    settings: tuple[str, ...]
    others: tuple[str, ...]
    entries: Mapping[str, str]
    counts_in_floats: bool
    options: Mapping[str, str]


_PYTORCH = _Checkpoint(
    conventions.pytorch,
    ("momentum", "centered"),
    ("maximize",),
    _ENTRIES,
    counts_in_floats=True,
    options={"mu": "centered", "momentum": "momentum"},
)
_TIMM = dataclasses.replace(
    _PYTORCH,
    convention=conventions.timm,
    settings=("momentum", "centered", "caution"),
    others=("weight_decay", "decoupled_decay"),
)
_BITSANDBYTES = _Checkpoint(
    conventions.bitsandbytes,
    (),
    (),
    _ENTRIES | {"nu": "state1"},
    counts_in_floats=False,
    options={},
)
# The key of bitsandbytes's arrays in a state dict.
_NESTED = "__bnb_optimizer_quant_state__"


def from_torch(
    optimizer_state_dict: Mapping[str, Any],
    params: Any,
    *,
    layout: Layout,
    optimizer: optax.GradientTransformation | None = None,
    names: Names = None,
) -> Any:
    """Convert the state of `torch.optim.RMSprop` to that of `conventions.pytorch`.

    Args:
      optimizer_state_dict: `state_dict()` of the PyTorch optimizer, or the same form
        with names instead of numbers (torch.distributed.checkpoint, FSDP). The state of
        a parameter without an entry, which has had no gradient yet, is initialized.
      params: our parameters, which give the state its tree, shapes and placement.
      layout: as the module describes.
      optimizer: the optimizer of the result; None for `conventions.pytorch` with the
        settings of the checkpoint. Required if its parameter groups differ in momentum
        or centering (as `optax.partition`), or if there is more than the convention.
      names: the PyTorch optimizer's parameter names in its order, usually `[name for
        name, _ in model.named_parameters()]`; for a checkpoint that numbers parameters.
        Without them `layout` must return the names in that order, and only shapes are
        checked: arrays of the same shape could be swapped.

    Returns:
      The state, at the checkpoint's step.

    Raises:
      TypeError: the checkpoint contains more than the optimizer.
      ValueError: an entry is missing, unknown, unexpected or of another shape; `names`
        are not the layout's.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from jax_rmsprop import conventions, migrate
      >>> params = {"kernel": jnp.zeros((2, 3))}
      >>> checkpoint = {
      ...     "state": {0: {"step": 7.0, "square_avg": np.full((3, 2), 0.25)}},
      ...     "param_groups": [{"params": [0], "momentum": 0, "centered": False}],
      ... }
      >>> layout = lambda tree: {"weight": tree["kernel"].T}
      >>> state = migrate.from_torch(checkpoint, params, layout=layout)
      >>> g = {"kernel": jnp.ones((2, 3))}
      >>> updates, state = conventions.pytorch(0.1).update(g, state, params)
      >>> int(optax.tree_utils.tree_get(state, "count"))
      8

    References:
      https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/rmsprop.py
    """
    return _from(_PYTORCH, optimizer_state_dict, params, layout, optimizer, names)


def to_torch(
    state: Any, params: Any, optimizer: Any, *, layout: Layout, names: Names = None
) -> Any:
    """Convert our state to a state dict of `torch.optim.RMSprop`.

    Args:
      state: the state of `conventions.pytorch`, or of an optimizer with its parts.
      params: our parameters.
      optimizer: the PyTorch optimizer that is to resume, with the same settings; it is
        not changed.
      layout: as in `from_torch`.
      names: as in `from_torch`.

    Returns:
      The argument of `optimizer.load_state_dict`: its own settings, and our state in
      tensors of its parameters' dtype and device.

    Raises:
      ValueError: the state lacks what `optimizer` needs, or the other way round.

    References:
      https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/rmsprop.py
    """
    return _to(_PYTORCH, state, params, optimizer, layout, names)


def from_timm(
    optimizer_state_dict: Mapping[str, Any],
    params: Any,
    *,
    layout: Layout,
    optimizer: optax.GradientTransformation | None = None,
    names: Names = None,
) -> Any:
    """Convert the state of timm's `RMSpropTF` to that of `conventions.timm`.

    Like `from_torch`. With a schedule and `corrected_weight_decay` pass `optimizer`,
    since its decay has its own step count.

    References:
      https://github.com/huggingface/pytorch-image-models/blob/v1.0.31/timm/optim/rmsprop_tf.py
    """
    return _from(_TIMM, optimizer_state_dict, params, layout, optimizer, names)


def to_timm(
    state: Any, params: Any, optimizer: Any, *, layout: Layout, names: Names = None
) -> Any:
    """Convert our state to a state dict of timm's `RMSpropTF`; like `to_torch`."""
    return _to(_TIMM, state, params, optimizer, layout, names)


def from_bitsandbytes(
    optimizer_state_dict: Mapping[str, Any],
    params: Any,
    *,
    layout: Layout,
    optimizer: optax.GradientTransformation | None = None,
    names: Names = None,
) -> Any:
    """Convert a 32-bit `bnb.optim.RMSprop`'s state to `conventions.bitsandbytes`'s.

    Like `from_torch`. An 8-bit state raises an error that names its quantization map.

    References:
      https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.2/bitsandbytes/optim/optimizer.py
    """
    return _from(_BITSANDBYTES, optimizer_state_dict, params, layout, optimizer, names)


def to_bitsandbytes(
    state: Any, params: Any, optimizer: Any, *, layout: Layout, names: Names = None
) -> Any:
    """Convert our state to one of `bnb.optim.RMSprop`, in 32 bits; like `to_torch`."""
    return _to(_BITSANDBYTES, state, params, optimizer, layout, names)


def _from(
    kind: _Checkpoint,
    checkpoint: Mapping[str, Any],
    params: Any,
    layout: Layout,
    optimizer: optax.GradientTransformation | None,
    names: Names,
) -> Any:
    _check_optimizers_alone(checkpoint)
    index = LayoutIndex(layout, params)
    groups = checkpoint["param_groups"]
    fields = {kind.entries[field]: field for field in FIELDS}
    theirs: dict[str, dict[str, Any]] = {field: {} for field in FIELDS}
    count, absent = 0, list[str]()
    for number, name in _names(groups, index, names).items():
        entries = dict(checkpoint["state"].get(number, {}))
        entries |= entries.pop(_NESTED, {})
        if not entries:
            absent.append(name)
        count = max(count, int(entries.pop("step", 0)))
        for entry, value in entries.items():
            if entry not in fields:
                raise ValueError(f"the checkpoint has an unknown {entry} for {name!r}")
            theirs[fields[entry]][name] = to_numpy(value)
    if optimizer is None:
        others = {
            name: max(group[name] for group in groups)
            for name in kind.others
            if all(name in group for group in groups)
        }
        shared = shared_settings(groups, kind.settings, _PARTITION)
        optimizer = kind.convention(**shared, **others)
    try:
        return build_state(
            optimizer, params, index, theirs, kind.entries, count, absent=absent
        )
    except ValueError as error:
        if " has shape " not in str(error) or names is not None:
            raise
        raise ValueError(
            f"{error}; if the optimizer's parameters come in another order, pass "
            "`names`, usually [name for name, _ in model.named_parameters()]"
        ) from None


def _check_optimizers_alone(checkpoint: Any) -> None:
    """Check that a checkpoint is of an optimizer alone.

    Raises:
      TypeError: naming what else it contains.
    """
    if isinstance(checkpoint, Mapping) and {"state", "param_groups"} <= {*checkpoint}:
        return
    got = type(checkpoint).__name__
    if isinstance(checkpoint, Mapping):
        keys = ", ".join(map(repr, list(checkpoint)[:5])) or "nothing"
        got = f"one with {keys}"
    raise TypeError(
        "`optimizer_state_dict` must have 'state' and 'param_groups', as the "
        f"optimizer's `state_dict()` has them, got {got}; pass that part of a whole "
        "checkpoint, such as checkpoint['optimizer'] or ['optimizer_states'][0]"
    )


_PARTITION = "pass `optimizer`, with a transformation for each in optax.partition"


def settings(optimizer_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Read the hyperparameters of a checkpoint of `torch.optim.RMSprop`.

    Args:
      optimizer_state_dict: as in `from_torch`.

    Returns:
      Arguments of `conventions.pytorch`; with a schedule, `lr` is its current value.

    Raises:
      TypeError: the checkpoint contains more than the optimizer.
      ValueError: parameter groups differ.

    Example:
      >>> from jax_rmsprop import conventions, migrate
      >>> group = {"params": [0], "lr": 0.01, "alpha": 0.9, "eps": 1e-8, "momentum": 0}
      >>> checkpoint = {"state": {}, "param_groups": [group]}
      >>> migrate.settings(checkpoint)
      {'lr': 0.01, 'alpha': 0.9, 'eps': 1e-08, 'momentum': 0}
      >>> optimizer = conventions.pytorch(**migrate.settings(checkpoint))
    """
    _check_optimizers_alone(optimizer_state_dict)
    names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered", "maximize")
    advice = "make a transformation of each for optax.partition"
    groups = optimizer_state_dict["param_groups"]
    shared = shared_settings(groups, names, advice)
    if "lr" in shared:  # may be a tensor
        shared["lr"] = float(shared["lr"])
    return shared


def shared_settings(
    groups: Any, settings: Sequence[str], advice: str
) -> dict[str, Any]:
    """Collect the settings that the groups of a checkpoint share.

    Raises:
      ValueError: naming one in which they differ.
    """
    shared: dict[str, Any] = {}
    for setting in settings:
        values = [group[setting] for group in groups if setting in group]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"the checkpoint's groups differ in {setting}, {values}: {advice}"
            )
        if values:
            shared[setting] = values[0]
    return shared


def _to(
    kind: _Checkpoint,
    state: Any,
    params: Any,
    optimizer: Any,
    layout: Layout,
    order: Names,
) -> Any:
    index = LayoutIndex(layout, params)
    theirs, count = extract_arrays(state, index)
    checkpoint = optimizer.state_dict()
    groups = checkpoint["param_groups"]
    names = _names(groups, index, order)
    entries: dict[Any, Any] = {}
    for group, tensors in zip(groups, optimizer.param_groups, strict=True):
        fields = ["nu", *(f for f, setting in kind.options.items() if group[setting])]
        for number, tensor in zip(group["params"], tensors["params"], strict=True):
            arrays = {
                f: pop_array(theirs, f, names[number], kind.entries) for f in fields
            }
            step = float(count) if kind.counts_in_floats else count
            entries[number] = {"step": step}
            for field, array in arrays.items():
                if hasattr(tensor, "full_tensor"):
                    raise ValueError(
                        f"{names[number]!r} is sharded over processes (a DTensor): "
                        "load the state before the optimizer is sharded, or with "
                        "torch.distributed.checkpoint.state_dict"
                    )
                if array.shape != tuple(tensor.shape):
                    raise ValueError(
                        f"{names[number]!r} has shape {array.shape} in `layout`, but "
                        f"{tuple(tensor.shape)} in the target optimizer"
                    )
                entries[number][kind.entries[field]] = tensor.new_tensor(array)
    check_all_used(theirs, kind.entries)
    return {"state": entries, "param_groups": groups}


def _names(groups: Any, index: LayoutIndex, order: Names) -> dict[Any, str]:
    """The names of PyTorch's parameters.

    They are the checkpoint's, if it has names instead of numbers or beside them; else
    those of `order`, else the layout's in its order.
    """
    numbers = [number for group in groups for number in group["params"]]
    own = [name for group in groups for name in group.get("param_names", [])]
    if all(isinstance(number, str) for number in numbers):
        own = numbers
    if len(own) != len(numbers):
        own = index.names if order is None else list(order)
    if len(own) != len(numbers) and order is not None:
        raise ValueError(
            f"`names` must name the optimizer's {len(numbers)} parameters, got "
            f"{len(own)} names"
        )
    names = [index.known(name) for name in own]
    if len(numbers) != len(index.names):
        raise ValueError(
            f"the optimizer has {len(numbers)} parameters, `layout` names "
            f"{len(index.names)}: {', '.join(index.names)}; pass `params` and a "
            "`layout` of those that it trains"
        )
    for name in names:
        if name not in index.names:
            raise ValueError(
                f"`layout` has no {name!r}, but the optimizer has; it has "
                f"{', '.join(index.names)}"
            )
    return dict(zip(numbers, names, strict=True))
