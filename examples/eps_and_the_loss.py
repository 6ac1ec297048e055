"""
Does eps fit the loss?
======================

The same recipe on a loss that is summed, and on one that is averaged.

DQN's eps of 0.01 inside the root belongs to the gradient of a sum over 32 examples. Of
their mean a gradient is 32 times smaller and its square 1,024 times: with the same eps
it is no longer the average that decides a step.
"""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from common import arguments, batches, cross_entropy, digits, network, save

from jax_rmsprop import conventions, diagnose, plotting

BATCH, EPOCHS, RATE = 32, 10, 1e-3
# The loss's name, what a batch's mean is multiplied by, the recipe and its eps.
CASES = (
    ("sum, eps 0.01", BATCH, conventions.nature_dqn, 0.01),
    ("mean, eps 0.01", 1, conventions.nature_dqn, 0.01),
    ("mean, eps 0.01/32²", 1, conventions.dqn_zoo, 0.01 / BATCH**2),
)


def training(scale, recipe, eps, seed=0):
    """The loss of each step and its diagnosis, and the accuracy at the end."""
    train, test = digits()
    optimizer = recipe(RATE)
    params = network(jax.random.key(seed), train.x.shape[1])

    def step(carry, batch):
        params, state = carry
        loss, g = jax.value_and_grad(lambda p: scale * cross_entropy(p, batch))(params)
        updates, state = optimizer.update(g, state, params)
        found = diagnose(optimizer, state, g)
        return (optax.apply_updates(params, updates), state), (loss / scale, found)

    def epoch(carry, key):
        return jax.lax.scan(step, carry, batches(key, train, BATCH))

    keys = jax.random.split(jax.random.key(seed + 1), EPOCHS)
    carry = params, optimizer.init(params)
    (params, _), found = jax.lax.scan(epoch, carry, keys)
    losses, found = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
    x = jax.nn.relu(test.x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    return losses, found, jnp.mean(x.argmax(-1) == test.y)


def main():
    """Train with each, print where they end, and draw what decided their steps."""
    options = arguments(__doc__, "eps_and_the_loss.png").parse_args()
    figure, axes = plt.subplots(
        3, len(CASES), figsize=(11, 6.4), sharex=True, sharey="row"
    )
    print("loss of a batch, eps   loss at the end   accuracy   eps decides")
    for i, (name, scale, recipe, eps) in enumerate(CASES):
        losses, found, accuracy = jax.jit(training, static_argnums=(0, 1, 2))(
            scale, recipe, eps
        )
        share = 100 * found.eps_share[-100:].mean()
        end = losses[-100:].mean()
        print(f"{name:21}  {end:15.4f}  {100 * accuracy:8.1f}%  {share:10.0f}%")
        plotting.diagnosis(found, axes[:, i])
        axes[0, i].set_title(f"{name}: {100 * accuracy:.1f}% right", fontsize=11)
        for ax in axes[:, i] if i else ():
            ax.set_ylabel("")
            if ax.get_legend():
                ax.get_legend().remove()
    save(figure, options.output)


if __name__ == "__main__":
    main()
