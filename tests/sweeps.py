"""A small training to sweep, and processes that sweep it and may be killed.

They are forked from one process that has done its imports (`forks`), before any of them
uses JAX.
"""

import contextlib
import functools
import hashlib
import itertools
import multiprocessing
import os
import resource
import runpy
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import xarray as xr
from jax.ad_checkpoint import checkpoint_name

from jax_rmsprop import Training, log_one_minus, rmsprop, sweep
from jax_rmsprop.sweeps import _batch, _run
from tests import cache

DATA = np.random.default_rng(0).standard_normal((20, 5)).astype("float32")
GRID = {
    "gamma": log_one_minus(0.5, 0.999, 5),
    "learning_rate": [0.01, 0.001, 1e30],
    "seed": range(4),
}


quiet = functools.partial(sweep, progress=False)


def spoil(chunk):
    """Change the last byte of a file of a store, of its checksum."""
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")


def square(x):
    """A training of one multiplication."""
    return {"loss": x * x}


def network(gamma, learning_rate, seed, centered=False, steps=15):
    """A network of one hidden layer; at the last learning rate it diverges."""
    optimizer = rmsprop(learning_rate, gamma, centered=centered)
    first, second = jax.random.split(jax.random.key(seed))
    params = {
        # Drawn flat, since XLA takes four times as long for random matrices.
        "w": jax.random.normal(first, (40,)).reshape(5, 8),
        "v": jax.random.normal(second, (8,)),
    }

    def loss(p):
        return ((jnp.tanh(DATA @ p["w"]) @ p["v"] - DATA[:, 0]) ** 2).mean()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(
        step, (params, optimizer.init(params)), length=steps
    )
    return {"loss": losses, "end": {"v": params["v"], "seed": jnp.asarray(seed)}}


def named_residuals(gamma, learning_rate, seed):
    """A training whose jaxpr prints a set in the order of the process' hashes."""
    policy = jax.checkpoint_policies.save_only_these_names("a", "bc", "def", "ghij")

    def loss(x):
        return jnp.sin(checkpoint_name(jnp.sin(x), "bc")).sum()

    x = gamma * learning_rate * jnp.ones(3) + seed
    return {"loss": jax.grad(jax.checkpoint(loss, policy=policy))(x)}


def called_back(gamma, learning_rate, seed):
    """A training that calls back to Python, at an address of its process."""
    jax.debug.print("{x}", x=gamma)
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return {"loss": jax.pure_callback(lambda x: x, shape, gamma * learning_rate) + seed}


def _begin(rate, seed):
    x = jax.random.normal(jax.random.key(seed), (3,))
    return {"x": x, "key": jax.random.key(seed + 1), "count": jnp.zeros([], int)}


def _go_on(carry, rate, seed):
    key, now = jax.random.split(carry["key"])
    noise = jax.random.normal(now, (2,))
    x = carry["x"] - rate * (2 * carry["x"] ** 3 + 0.01 * noise.sum())
    new = {"x": x, "key": key, "count": carry["count"] + 1}
    return new, {"loss": (x**2).sum(), "noise": noise}


# A training of many steps; at a huge rate it diverges.
long_training = Training(_begin, _go_on)


def run_long(
    answer, store, axes, steps, die, *, devices=1, processes=1, process=0, port=0
):
    """Run a training in this process, maybe killed during a write; send the bits."""
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    if die:
        cache.only_read()
        die_at(die)
    curves = quiet(
        long_training, axes, steps=steps, store=store, batch_size=4, save_every=0
    )
    answer.send(bits(curves[["loss", "noise", "steps"]]))
    if processes > 1:
        jax.distributed.shutdown()


def run_images(answer, store, axes, steps, die):
    """Train convolutional networks on images of digits, killed as above."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, "float32")
    labels = jnp.asarray(labels)

    def loss(params, which):
        x = images[which]
        for name in ("first", "second"):
            dims = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, params[name], (2, 2), "SAME", dimension_numbers=dims
            )
            x = jax.nn.relu(x)
        outputs = x.reshape(len(x), -1) @ params["w"]
        return optax.softmax_cross_entropy_with_integer_labels(
            outputs, labels[which]
        ).mean()

    def init(gamma, seed):
        first, second, third, key = jax.random.split(jax.random.key(seed), 4)
        params = {
            "first": 0.3 * jax.random.normal(first, (3, 3, 1, 8)),
            "second": 0.2 * jax.random.normal(second, (3, 3, 8, 16)),
            "w": 0.1 * jax.random.normal(third, (64, 10)),
        }
        return key, params, rmsprop(1e-3, gamma).init(params)

    def step(carry, gamma, seed):
        key, params, state = carry
        key, shuffle = jax.random.split(key)
        order = jax.random.permutation(shuffle, len(images))[:1760].reshape(-1, 32)

        def batch(carry, which):
            params, state = carry
            value, gradient = jax.value_and_grad(loss)(params, which)
            updates, state = rmsprop(1e-3, gamma).update(gradient, state)
            return (optax.apply_updates(params, updates), state), value

        (params, state), losses = jax.lax.scan(batch, (params, state), order)
        return (key, params, state), {"loss": losses.mean()}

    if die:
        cache.only_read()
        die_at(die)
    training = Training(init, step)
    curves = quiet(training, axes, steps=steps, store=store, batch_size=4, save_every=0)
    answer.send(bits(curves[["loss", "steps"]]))


def bits(curves):
    """All bits of the results, to compare them exactly."""
    digest = hashlib.sha256()
    for name in sorted(curves.variables):
        values = np.ascontiguousarray(curves[name].values)
        digest.update(f"{name} {curves[name].dims} {values.dtype}".encode())
        digest.update(str(values).encode() if values.dtype.kind == "U" else values)
    return digest.hexdigest()


def run(
    answer,
    store,
    *,
    devices=1,
    processes=1,
    process=0,
    port=0,
    size=4,
    die=0,
    grid=GRID,
):
    """Sweep in this process, which may be one of several, and send the results' bits.

    `die` is the number of the file opening or renaming at which it is killed.
    """
    jax.config.update("jax_num_cpu_devices", devices)
    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    _run.SECONDS_BETWEEN_APPENDS = 0
    if die:
        cache.only_read()
        die_at(die)
    curves = sweep(network, grid, store=store, batch_size=size, progress=False)
    answer.send((bits(curves), int(curves.finished.sum())))
    if processes > 1:
        jax.distributed.shutdown()  # all together; forks skip exit handlers


def run_with_limit(answer, store, limit):
    """Sweep with a limit on file sizes; send the counts or the error."""
    cache.only_read()  # a larger entry would be truncated
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))

    def train(x):
        noise = jnp.sin((x + 1e3) * jnp.arange(5000.0))
        return {"loss": jnp.where(x < 8, 0.0, noise)}

    try:
        curves = quiet(train, {"x": range(16)}, batch_size=4, store=store)
        answer.send((int(curves.finished.sum()), curves.computed))
    except OSError as error:
        answer.send(error.strerror)


def run_together(answer, barrier, calls):
    """Sweep repeatedly, each time together with another process; send all bits."""
    _run.SECONDS_BETWEEN_APPENDS = 0
    found = []
    for store, x in calls:
        barrier.wait()
        curves = quiet(square, {"x": x}, batch_size=4, store=store)
        found.append((bits(curves), int(curves.finished.sum())))
    answer.send(found)


def die_at(number):
    """Kill this process at the number-th event of writing a file."""
    count = itertools.count(1)

    def heard(event, arguments):
        written = event == "os.rename" or (
            event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if written and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(heard)


def script(path, words, printed):
    """Run a script as from the command line, with its output in a file."""
    sys.argv = [str(path), *words]
    sys.path.insert(0, str(Path(path).parent))
    with open(printed, "w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(path), run_name="__main__")
    if jax.process_count() > 1:
        jax.distributed.shutdown()


@functools.cache
def forks():
    """A multiprocessing context that forks from a warm process."""
    context = multiprocessing.get_context("forkserver")
    # Imported once for all forks; none of them starts JAX.
    context.set_forkserver_preload(
        ["tests.sweeps", "dask.array", "matplotlib.pyplot", "sklearn.datasets"]
        + ["xarray", "zarr.storage"]
    )
    return context


def raises(error, message, *args, **kwargs):
    with pytest.raises(error) as caught:
        quiet(*args, **kwargs)
    assert str(caught.value) == message


def result(process, answer):
    assert answer.poll(240)
    found = answer.recv()
    process.join(60)
    assert process.exitcode == 0
    return found


def kept(store):
    """The number of members in a store."""
    return int((xr.open_zarr(store).steps > 0).sum()) if store.exists() else 0


def interrupt_after(monkeypatch, batches):
    """Press Ctrl-C while a batch runs."""
    step = _batch.CompiledBatch.step
    count = []

    def interrupted(self, *arguments):
        count.append(None)
        if len(count) == batches:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(_batch.CompiledBatch, "step", interrupted)
