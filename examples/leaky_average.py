"""How much a gradient of some steps ago weighs in the average: (1 - gamma) gamma^t."""

import matplotlib.pyplot as plt
import numpy as np
from common import arguments, save

GAMMAS = 0.95, 0.9, 0.8, 0.7


def weights(gamma, steps=40):
    """The weight of the gradient t steps ago, for t = 0 ... steps - 1."""
    return (1 - gamma) * gamma ** np.arange(steps)


def main():
    """Print how far each average looks back, and draw its weights."""
    options = arguments(__doc__, "leaky_average.png").parse_args()
    figure, axes = plt.subplots(figsize=(6, 4))
    print("gamma  1/(1-gamma)  weight of the last 40 steps")
    for gamma, style in zip(GAMMAS, ["-", "--", "-.", ":"], strict=True):
        w = weights(gamma)
        print(f"{gamma:5.2f}  {1 / (1 - gamma):11.1f}  {w.sum():27.4f}")
        axes.plot(w, style, linewidth=2, label=f"gamma = {gamma:.2f}")
    axes.set(
        xlabel="steps ago",
        ylabel="weight (1 - gamma) gamma^t",
        title="What the average remembers",
    )
    axes.legend()
    save(figure, options.output)


if __name__ == "__main__":
    main()
