"""The default batch size of a program."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_rmsprop.sweeps import _batch, _training
from tests.sweeps import quiet, square

PLENTY = 10**12


def trace(train, **kinds):
    kinds = {name: np.dtype(kind) for name, kind in (kinds or {"x": "float32"}).items()}
    return _training.trace(train, {}, kinds)


def chosen(*trainings, platform="cpu", memory=PLENTY, compiled=None):
    traced = [trace(train) for train in trainings]
    compiled = compiled or (lambda *_: Compiled(0, 1024 * 2**18))
    return _batch.auto_batch_size(traced, platform, memory, compiled)


class Compiled(NamedTuple):
    """A compiler's figures."""

    memory_bytes: int
    temporary_bytes: int = 0


def stepping(length, steps=3):
    """A loop over arrays of `length` float32, and a large array outside the loop."""

    def train(x):
        large = x * jnp.arange(1_000_000.0)
        y = jax.lax.fori_loop(0, steps, lambda i, y: y + large[i], jnp.full(length, x))
        return {"loss": y.sum()}

    return train


@pytest.mark.parametrize(
    ("length", "size"), [(10, 128), (7_000, 128), (8_000, 64), (100_000, 8), (10**6, 1)]
)
def test_what_a_step_touches_fits_the_cache(length, size):
    assert chosen(stepping(length)) == size
    assert chosen(stepping(length), platform="gpu") == 4096


def test_without_a_loop_any_array_counts():
    assert chosen(lambda x: {"loss": jnp.full(100_000, x).cumsum()}) == 8


def test_the_most_demanding_program_decides():
    assert chosen(stepping(10), stepping(100_000)) == 8


def test_only_what_a_member_has_of_its_own_counts():
    data = jnp.ones((1000, 1000))

    def shared(x):
        shuffled = jax.random.permutation(jax.random.key(0), data)
        return jax.lax.fori_loop(0, 3, lambda i, y: y + (shuffled[i] * y).sum(), x)

    def own(x):
        key = jax.random.key(x.astype("int32"))
        return jax.random.permutation(key, data).sum()

    assert _batch.member_needs(trace(shared)).step_bytes == 4000
    assert _batch.member_needs(trace(own)).step_bytes == 4_000_000


@pytest.mark.parametrize("own", [True, False])
def test_convolutions_with_kernels_of_their_own(own):
    """A CPU runs them kernel by kernel, so large batches are slower."""

    def train(x):
        kernel = jnp.ones((3, 3, 1, 2)) * (x if own else 1)
        images = jnp.ones((2, 8, 8, 1)) * x
        dims = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            images, kernel, (1, 1), "SAME", dimension_numbers=dims
        )
        return {"loss": y.sum()}

    assert chosen(train) == (4 if own else 128)
    assert chosen(train, platform="gpu") == 4096


def test_a_smaller_batch_where_the_compiler_wants_more_memory_than_there_is():
    asked = []

    def compiled(which, size):
        asked.append((which, size))
        return Compiled(1000 * size)

    assert chosen(stepping(10), memory=20_000, compiled=compiled) == 16
    assert asked == [(0, 128), (0, 64), (0, 32), (0, 16)]
    # If all arrays together fit, the compiler is not asked.
    assert chosen(square, memory=20_000) == 128


def test_a_program_without_numbers_has_one_member():
    traced = [_training.trace(lambda n: {"loss": jnp.ones(n)}, {"n": 3}, {})]
    assert _batch.auto_batch_size(traced, "gpu", PLENTY, None) == 1


def test_a_program_of_which_there_is_no_batch():
    def train(x):
        shape = jax.ShapeDtypeStruct((), jnp.float32)
        return {"loss": jax.pure_callback(np.square, shape, x)}

    curves = quiet(train, {"x": [1.0, 2.0]})
    assert curves.batch_size == 1
    np.testing.assert_array_equal(curves.loss, [1, 4])
    with pytest.raises(TypeError, match="^`train` cannot run in a batch: .*") as no:
        quiet(train, {"x": [1.0, 2.0]}, batch_size=2)
    assert "\n" not in str(no.value)


def test_the_memory_is_that_of_the_kind_of_device(monkeypatch, compiled):
    monkeypatch.setattr(_batch, "device_bytes", lambda _: 2_500_000)

    def train(x):
        return {"loss": jnp.full(100_000, x).cumsum()}

    curves = quiet(train, {"x": range(16)}, devices=jax.devices("cpu")[:1])
    assert curves.batch_size == 2
    assert compiled == [8, 4, 2]  # each compiled for its memory, and the last one used
    monkeypatch.undo()
    assert _batch.device_bytes(jax.devices()[0]) > 1e8


def test_it_is_the_same_for_any_devices_and_members():
    every = jax.devices("cpu")  # another kind takes more
    sizes = {
        quiet(square, {"x": np.arange(1.0, n)}, devices=devices).batch_size
        for n in (2, 300)
        for devices in (every[:1], every[:2], every)
    }
    assert sizes == {128}
