"""The textbook's four exercises, each with its answer in words beside the numbers."""

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import (
    arguments,
    batches,
    cross_entropy,
    digits,
    fashion_mnist,
    logits,
    network,
    save,
    train_step,
)
from trajectory_2d import draw, path

from jax_rmsprop import rmsprop


def rotated(x):
    """The textbook's function turned by 45 degrees: its valley runs along x1 = x2."""
    return 0.1 * (x[0] + x[1]) ** 2 + 2 * (x[0] - x[1]) ** 2


def gamma_one(axes):
    """Exercise 1: what happens if gamma is 1, and why?"""
    print("1. gamma = 1")
    distance = {}
    for gamma, rate in ((0.9, 0.4), (1.0, 0.4), (1.0, 4e-4)):
        points = path(rmsprop(rate, gamma))
        distance[gamma, rate] = np.linalg.norm(points.astype(float), axis=1)
        print(
            f"   gamma {gamma:g}, learning rate {rate:g}: distance from the minimum "
            f"after 1 step {distance[gamma, rate][1]:.4g}, after 20 "
            f"{distance[gamma, rate][-1]:.4g}"
        )
    print(
        "   The average never leaves its initial 0, so every gradient is divided by\n"
        "   sqrt(eps) = 0.001: plain gradient descent with a learning rate 1000 times\n"
        "   as large, which diverges. Divide the learning rate by 1000 and it is the\n"
        "   gradient descent that one would expect, no coordinate adapted."
    )
    for (gamma, rate), d in distance.items():
        axes.plot(
            np.where(d < 1e12, d, np.nan), label=f"gamma {gamma:g}, rate {rate:g}"
        )
    axes.set(
        yscale="log",
        xlabel="step",
        ylabel="distance from the minimum",
        title="1. gamma = 1",
        ylim=(1e-3, 1e12),
        xticks=range(0, 21, 5),
    )
    axes.legend()


def rotation(axes):
    """Exercise 2: what does a rotation of the problem do to the convergence?"""
    print("2. the rotated problem 0.1 (x1 + x2)^2 + 2 (x1 - x2)^2")
    straight = path(rmsprop(0.4))
    turned = path(rmsprop(0.4), rotated)
    for name, points, f in (
        ("straight", straight, lambda x: 0.1 * x[0] ** 2 + 2 * x[1] ** 2),
        ("rotated", turned, rotated),
    ):
        values = [float(f(x)) for x in points]
        print(f"   {name}: f after 5 steps {values[5]:.2e}, 20 steps {values[20]:.2e}")
    print(
        "   RMSProp rescales the coordinates one by one. The rotated valley lies\n"
        "   along neither: x1 and x2 get nearly the same step, so the path turns into\n"
        "   the valley, but no scaling of the axes can stretch it along the diagonal."
    )
    draw(axes, {"RMSProp": turned}, rotated)
    axes.set_title("2. rotated: 0.1 (x1+x2)² + 2 (x1-x2)²")


def train(rate, gamma, train, epochs, seed=0, batch=50):
    """Train a network; the mean loss of each epoch, and the parameters."""
    start, shuffle = jax.random.split(jax.random.key(seed))
    params = network(start, train.x.shape[1])
    optimizer = rmsprop(rate, gamma)

    def epoch(carry, key):
        step = train_step(cross_entropy, optimizer)
        carry, losses = jax.lax.scan(step, carry, batches(key, train, batch))
        return carry, losses.mean()

    carry = params, optimizer.init(params)
    (params, _), losses = jax.lax.scan(epoch, carry, jax.random.split(shuffle, epochs))
    return losses, params


def accuracy(params, test):
    """The share of test examples that the network gets right."""
    return (logits(params, test.x).argmax(-1) == test.y).mean()


def real_problem(axes, name, data, test, epochs):
    """Exercise 3: what does RMSProp do on a real problem, at several learning rates?"""
    print(f"3. {name}, one hidden layer, gamma 0.9, {epochs} epochs")
    rates = 10.0 ** np.arange(-5, 1)

    @jax.jit
    @jax.vmap
    def run(rate):
        losses, params = train(rate, 0.9, data, epochs)
        return losses, accuracy(params, test)

    losses, right = map(np.asarray, run(jnp.asarray(rates)))
    for rate, curve, share in zip(rates, losses, right, strict=True):
        print(
            f"   rate {rate:7.0e}: training loss {curve[-1]:8.4f}, accuracy {share:.3f}"
        )
        axes.plot(np.arange(1, epochs + 1), curve, label=f"{rate:.0e}")
    best = rates[right.argmax()]
    print(
        f"   Every parameter moves by about the rate at each step, so the rate is a\n"
        f"   length: {rates[0]:.0e} crawls, {rates[-1]:.0e} throws the weights about,\n"
        f"   and ten times more or less than the best here, {best:.0e}, is well enough."
    )
    axes.set(
        yscale="log",
        xlabel="epoch",
        ylabel="training loss",
        title=f"3. learning rates, {name}",
    )
    axes.legend(title="learning rate", ncols=2, fontsize=9)


def changing_gamma(axes, data, test, epochs=10):
    """Exercise 4: should gamma change as the training goes on?"""
    print("4. gamma over time, digits, learning rate 0.01, mean of 5 seeds")
    steps = epochs * (len(data.x) // 50)
    fixed = ["0.5", "0.9", "0.99", "0.999"]
    scheduled = {
        "0.5 to 0.999": optax.linear_schedule(0.5, 0.999, steps),
        "1 - 1/step": lambda t: 1 - 1 / (t.astype("float32") + 1),
    }

    def seeds(gamma):
        def run(seed):
            losses, params = train(0.01, gamma, data, epochs, seed)
            return losses, accuracy(params, test)

        return jax.vmap(run)(jnp.arange(5))

    # The numbers share one program; each schedule has its own.
    many = jax.jit(jax.vmap(seeds))(jnp.array([float(gamma) for gamma in fixed]))
    results = dict(zip(fixed, zip(*many, strict=True), strict=True))
    for name, gamma in scheduled.items():
        results[name] = jax.jit(functools.partial(seeds, gamma))()
    for name, (losses, right) in results.items():
        curve = losses.mean(0)
        print(
            f"   gamma {name:>12}: training loss {curve[-1]:.4f}, accuracy "
            f"{right.mean():.3f}"
        )
        style = "-" if name in fixed else "--"
        axes.plot(np.arange(1, epochs + 1), curve, style, label=name)
    print(
        "   From 0.5 to 0.99 it hardly matters. 0.999 looks back further than the\n"
        "   average has collected and starts with steps that are far too long. A\n"
        "   gamma that grows avoids that: 1 - 1/step, the plain mean of all squares\n"
        "   so far, is AdaGrad with a learning rate that grows as the root of the step."
    )
    axes.set(
        yscale="log",
        xlabel="epoch",
        ylabel="training loss",
        title="4. gamma fixed and scheduled, digits",
    )
    axes.legend(title="gamma", ncols=2, fontsize=9)


def main():
    """Answer all four and draw one picture of them."""
    parser = arguments(__doc__, "exercises.png")
    parser.add_argument(
        "--data",
        choices=["digits", "fashion-mnist"],
        default="digits",
        help="exercise 3's problem; Fashion-MNIST is downloaded (31 MB)",
    )
    options = parser.parse_args()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    gamma_one(axes[0, 0])
    rotation(axes[0, 1])
    if options.data == "digits":
        real_problem(axes[1, 0], "digits", *digits(), epochs=20)
    else:
        real_problem(axes[1, 0], "Fashion-MNIST", *fashion_mnist(), epochs=3)
    changing_gamma(axes[1, 1], *digits())
    for panel in axes[1]:
        panel.xaxis.get_major_locator().set_params(integer=True)
    save(figure, options.output)


if __name__ == "__main__":
    main()
