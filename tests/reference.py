"""RMSProp in float64 NumPy: the slow, obvious reference of the tests.

It follows the textbook's formulas, not the package: gamma * nu + (1 - gamma) * g^2 as
printed there, the centered variance as the difference of two moments, one array, one
step at a time.
"""

import numpy as np


class RMSProp:
    """The optimizer of one array; every argument may change between steps."""

    def __init__(
        self,
        x,
        *,
        eps_in_sqrt=True,
        initial_scale=0.0,
        centered=False,
        bias_correction=False,
        momentum=None,
        nesterov=False,
        lr_in_momentum=True,
        decoupled_weight_decay=True,
    ):
        """Start at x with every average at its initial value."""
        self.x = np.array(x, np.complex128 if np.iscomplexobj(x) else np.float64)
        self.nu = np.full(self.x.shape, float(initial_scale))
        self.mu = np.zeros_like(self.x)
        self.b = np.zeros_like(self.x)
        self.not_collected = 0.0 if initial_scale else 1.0
        self.eps_in_sqrt = eps_in_sqrt
        self.centered = centered
        self.bias_correction = bias_correction
        self.momentum = momentum
        self.nesterov = nesterov
        self.lr_in_momentum = lr_in_momentum
        self.decoupled = decoupled_weight_decay

    def scaled(self, g, gamma, eps):
        """The gradient divided by the root of its average square."""
        g = np.asarray(g, self.x.dtype)
        self.nu = gamma * self.nu + (1 - gamma) * np.abs(g) ** 2
        self.mu = gamma * self.mu + (1 - gamma) * g
        self.not_collected *= gamma
        v = self.nu - np.abs(self.mu) ** 2 if self.centered else self.nu
        if self.bias_correction:
            v = v / (1 - self.not_collected)
        return g / np.sqrt(v + eps) if self.eps_in_sqrt else g / (np.sqrt(v) + eps)

    def step(self, g, *, learning_rate, gamma=0.9, eps=1e-6, weight_decay=0.0):
        """Move x by one step."""
        g = np.asarray(g, self.x.dtype)
        before = self.x
        if not self.decoupled:
            g = g + weight_decay * before
        u = self.scaled(g, gamma, eps)
        if self.lr_in_momentum:
            u = learning_rate * u
        if self.momentum is not None:
            self.b = self.momentum * self.b + u
            u = self.momentum * self.b + u if self.nesterov else self.b
        if not self.lr_in_momentum:
            u = learning_rate * u
        self.x = before - u
        if self.decoupled:
            self.x = self.x - learning_rate * weight_decay * before
        return self.x


def variance(gradients, gamma, initial_scale=0.0):
    """The centered average's variance from all gradients in one sum.

    It is the weighted spread about the weighted mean, accurate where a difference of
    moments is not. The initial value is an observation with mean 0 and mean square
    `initial_scale`.
    """
    g = np.asarray(gradients, np.float64)
    n = len(g)
    weights = (1 - gamma) * gamma ** np.arange(n - 1, -1, -1.0)
    weights = weights.reshape((n,) + (1,) * (g.ndim - 1))
    start = gamma**n
    mean = (weights * g).sum(0)
    return (weights * (g - mean) ** 2).sum(0) + start * (mean**2 + initial_scale)
