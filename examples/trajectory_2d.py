"""RMSProp's path on the textbook's quadratic, beside AdaGrad's.

f(x) = 0.1 x1^2 + 2 x2^2 from (-5, -2), 20 steps, learning rate 0.4, gamma 0.9.
"""

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import arguments, save
from jax import numpy as jnp

from jax_rmsprop import rmsprop


def f(x):
    """The textbook's function: flat along x1, steep along x2."""
    return 0.1 * x[0] ** 2 + 2 * x[1] ** 2


def path(optimizer, f=f, steps=20):
    """The points visited from (-5, -2), an array of shape [steps + 1, 2]."""

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(f)(x), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    start = jnp.array([-5.0, -2.0])
    _, points = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
    return np.vstack([start, points])


def draw(axes, paths, f=f):
    """Contours of f and the paths across them."""
    lowest = min(points[:, 1].min() for points in paths.values()) - 0.5
    x1, x2 = np.meshgrid(np.linspace(-5.5, 1.5, 141), np.linspace(lowest, 1.5, 121))
    levels = np.geomspace(0.02, 16, 12)
    axes.contour(x1, x2, f((x1, x2)), levels=levels, colors="0.75", linewidths=0.8)
    for (label, points), marker in zip(paths.items(), "os^", strict=False):
        axes.plot(*points.T, marker=marker, markersize=4, label=label)
    axes.plot(0, 0, "k*", markersize=11, label="minimum")
    axes.set(xlabel="x1", ylabel="x2", xlim=(-5.5, 1.5), ylim=(lowest, 1.5))
    axes.legend()


def main():
    """Print where both end, and draw how they got there."""
    options = arguments(__doc__, "trajectory_2d.png").parse_args()
    paths = {
        "RMSProp": path(rmsprop(learning_rate=0.4, gamma=0.9)),
        "AdaGrad": path(optax.adagrad(0.4, initial_accumulator_value=0.0, eps=1e-6)),
    }
    x1, x2 = paths["RMSProp"][-1]
    print(f"epoch 20, x1 {x1:.6f}, x2 {x2:.6f}")
    x1, x2 = paths["AdaGrad"][-1]
    print(f"AdaGrad with the same learning rate: x1 {x1:.6f}, x2 {x2:.6f}")

    figure, axes = plt.subplots(figsize=(6, 4))
    draw(axes, paths)
    axes.set_title("20 steps on 0.1 x1² + 2 x2², learning rate 0.4")
    save(figure, options.output)


if __name__ == "__main__":
    main()
