"""
DQN: which RMSProp learns to balance a pole?
============================================

Dopamine's recipe, ``dopamine_dqn``, at a rate of 1e-3. Nature's own, on the loss that
most code has, a mean over the batch, hardly learns.

The papers and codes of deep Q-learning all say "RMSProp" and mean different optimizers.
Each of them trains the same agent here, at three learning rates and with five seeds:
135 trainings in one ``sweep``.
"""

# %%
# What is compared
# ----------------
#
# A recipe comes with the loss it was made for. Nature's is the sum over a batch of 32,
# whose gradient is 32 times the mean's, and its eps belongs to that: on a mean the same
# eps is 32² times too large. Here is each recipe with what it multiplies the mean by.
# Four variants have the same eps inside and outside the root, around a mean's own size.

from typing import NamedTuple

import gymnax  # pip install gymnax six
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jax_rmsprop import Training, conventions, rmsprop, sweep

BATCH = 32
RECIPES = {
    "nature_dqn": (conventions.nature_dqn, BATCH),
    "nature_dqn on a mean": (conventions.nature_dqn, 1),
    "dqn_zoo": (conventions.dqn_zoo, 1),
    "dopamine_dqn": (conventions.dopamine_dqn, 1),
    "pytorch": (conventions.pytorch, 1),
}
VARIANTS = {
    f"{'centered' if centered else 'plain'}, eps {'in' if inside else 'out'}side": (
        lambda rate, inside=inside, centered=centered: rmsprop(
            rate, 0.95, eps=1e-3, eps_in_sqrt=inside, centered=centered
        ),
        1,
    )
    for centered in (True, False)
    for inside in (True, False)
}

# %%
# The environment and the agent
# -----------------------------
#
# The environment is CartPole-v1 of gymnax, where an episode lasts at most 500 steps.
# The agent gets nothing while the pole stands and -1 when it falls, as in `the paper
# that introduced it <https://doi.org/10.1109/TSMC.1983.6313077>`__ (Barto, Sutton and
# Anderson, 1983). With a reward of 1 a step, values would grow to 1/(1 - 0.99) = 100,
# and DQN's clipped error, which is meant for Atari's clipped rewards, would nearly
# always be clipped.
#
# The agent is a network with one hidden layer, a copy of it from some time ago, whose
# values are the targets, a memory of 10,000 transitions and the environment itself. All
# of it is the carry of the training, so an interrupted sweep resumes with the same
# memory and the pole at the same angle.

MEMORY, DISCOUNT = 10_000, 0.99
env, env_params = gymnax.make("CartPole-v1")


class Transition(NamedTuple):
    """What the agent saw, did and got, and whether the pole fell."""

    observation: jax.Array
    action: jax.Array
    reward: jax.Array
    following: jax.Array
    fell: jax.Array


class Agent(NamedTuple):
    """All that changes while it learns."""

    params: optax.Params
    target: optax.Params
    state: optax.OptState
    memory: Transition
    observation: jax.Array
    env_state: object
    t: jax.Array  # the number of steps it has taken


def network(key):
    """The parameters: 4 inputs, 128 hidden units, 2 outputs."""
    first, second = jax.random.split(key)
    w1 = jax.random.normal(first, (4 * 128,)).reshape(4, 128) * (2 / 4) ** 0.5
    w2 = jax.random.normal(second, (128 * 2,)).reshape(128, 2) * (1 / 128) ** 0.5
    return {"w1": w1, "b1": jnp.zeros(128), "w2": w2, "b2": jnp.zeros(2)}


def values_of(p, observation):
    """The value of each action."""
    hidden = jax.nn.relu(observation @ p["w1"] + p["b1"])
    return hidden @ p["w2"] + p["b2"]


def init(recipe, learning_rate, seed):
    """An agent that knows nothing."""
    optimizer = (RECIPES | VARIANTS)[recipe][0](learning_rate)
    _, start, reset = jax.random.split(jax.random.key(seed), 3)
    params = network(start)
    observation, env_state = env.reset(reset, env_params)
    one = Transition(observation, jnp.int32(0), jnp.float32(0), observation, False)
    memory = jax.tree.map(lambda x: jnp.full((MEMORY, *jnp.shape(x)), x), one)
    state = optimizer.init(params)
    return Agent(params, params, state, memory, observation, env_state, jnp.int32(0))


# %%
# A thousand steps of training
# ----------------------------
#
# A step of the ``Training`` is 1,000 steps of the environment: four with an action
# chosen by the network, or at random, then one of the optimizer on transitions drawn
# from the memory. It returns how long the episodes lasted that ended meanwhile.

REPORT = 1_000  # steps of the environment
LEARN_EVERY, COPY_EVERY, WARM_UP, EXPLORE = 4, 500, 1_000, 20_000


def step(agent, recipe, learning_rate, seed):
    """1,000 steps of the environment."""
    make, scale = (RECIPES | VARIANTS)[recipe]
    optimizer = make(learning_rate)
    key = jax.random.split(jax.random.key(seed), 3)[0]

    def loss(params, target, batch):
        values = values_of(params, batch.observation)
        taken = jnp.take_along_axis(values, batch.action[:, None], 1)[:, 0]
        best = values_of(target, batch.following).max(-1)
        wanted = batch.reward + DISCOUNT * jnp.where(batch.fell, 0, best)
        return scale * optax.huber_loss(taken, wanted).mean()

    def act(agent, t):
        """A step of the environment, remembered."""
        chance, explore, move = jax.random.split(jax.random.fold_in(key, t), 3)
        greedy = values_of(agent.params, agent.observation).argmax()
        epsilon = jnp.maximum(0.05, 1 - t / EXPLORE)
        random = jax.random.randint(explore, (), 0, 2)
        action = jnp.where(jax.random.uniform(chance) < epsilon, random, greedy)
        length = agent.env_state.time + 1
        observation, env_state, _, ended, timeout, info = env.step(
            move, agent.env_state, action, env_params
        )
        fell = ended & ~timeout
        new = Transition(
            agent.observation, action, -1.0 * fell, info["final_observation"], fell
        )
        memory = jax.tree.map(lambda m, x: m.at[t % MEMORY].set(x), agent.memory, new)
        agent = agent._replace(
            memory=memory, observation=observation, env_state=env_state
        )
        return agent, (length, ended | timeout)

    def learn(agent, t):
        """A step of the optimizer, on transitions drawn from the memory."""
        draw = jax.random.fold_in(jax.random.fold_in(key, t), 1)
        chosen = jax.random.randint(draw, (BATCH,), 0, jnp.minimum(t, MEMORY))
        batch = jax.tree.map(lambda m: m[chosen], agent.memory)
        gradient = jax.grad(loss)(agent.params, agent.target, batch)
        updates, state = optimizer.update(gradient, agent.state, agent.params)
        params = optax.apply_updates(agent.params, updates)
        copy = t % COPY_EVERY == 0
        target = jax.tree.map(
            lambda new, old: jnp.where(copy, new, old), params, agent.target
        )
        before = agent.params, agent.target, agent.state
        params, target, state = jax.tree.map(
            lambda new, old: jnp.where(t > WARM_UP, new, old),
            (params, target, state),
            before,
        )
        return agent._replace(params=params, target=target, state=state)

    def play(agent, t):
        """Some steps of the environment, then one of the optimizer."""
        agent, found = jax.lax.scan(act, agent, t)
        return learn(agent, t[-1] + 1), found

    t = agent.t + jnp.arange(REPORT).reshape(-1, LEARN_EVERY)
    agent, (length, ended) = jax.lax.scan(play, agent._replace(t=agent.t + REPORT), t)
    return agent, {"episode_length": (length * ended).sum() / ended.sum()}


# %%
# All of them, as one sweep
# -------------------------
#
# The recipes are Python values: each becomes a program of its own, which runs its 15
# rates and seeds at once. ``on_step`` is called after each step of each batch, with
# what the batch has so far; here it says every 50 thousand steps how it goes. With
# ``store=`` the sweep would resume after an interruption, and train further if called
# with more ``steps``.

RATES, SEEDS = [2.5e-4, 1e-3, 1e-2], range(5)
THOUSANDS = 100
grid = {"recipe": list(RECIPES | VARIANTS), "learning_rate": RATES, "seed": SEEDS}


def watch(batch):
    """Print how long the last episodes of a batch were."""
    last = batch.episode_length.isel(step=-1)
    thousands = int(last.step) + 1
    if thousands % 50 == 0:
        recipe = batch.recipe.values[0]
        print(f"{recipe}, {thousands},000 steps: {float(last.mean()):.0f} on average")


curves = sweep(
    Training(init, step),
    grid,
    steps=THOUSANDS,
    batch_size=15,
    on_step=watch,
    progress=False,
)

# %%
# What they learn
# ---------------
#
# The mean length of the episodes in the last tenth of the training, over five seeds,
# and the seeds' range:

lengths = curves.episode_length
last = lengths.isel(step=slice(-THOUSANDS // 10, None)).mean("step")
print(f"{'learning rate':22}" + "".join(f"{rate:>20g}" for rate in RATES))
for recipe in RECIPES | VARIANTS:
    cells = [
        f"{x.mean():.0f} ({x.min():.0f} to {x.max():.0f})"
        for x in (last.sel(recipe=recipe, learning_rate=rate).values for rate in RATES)
    ]
    print(f"{recipe:22}" + "".join(f"{cell:>20}" for cell in cells))

# %%
# Three things to read from it:
#
# - ``nature_dqn`` on a sum and ``dqn_zoo`` on a mean have the same numbers: they are
#   one optimizer, whose eps was moved with the loss.
# - ``nature_dqn`` on a mean hardly learns at the paper's rate. Its eps of 0.01 is far
#   above the squared gradients of a mean, so its steps are those of plain gradient
#   descent with a rate of 2.5e-4 / sqrt(0.01).
# - ``dopamine_dqn``, whose average starts at 1 and whose eps of 1e-5 is meant for a
#   mean, has the highest mean, at 1e-3. But the seeds' ranges are wide: five seeds do
#   not tell it from the plain average with eps outside the root.

figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
thousands = np.arange(1, THOUSANDS + 1)
for recipe in RECIPES:
    rate = RATES[-1] if recipe == "pytorch" else RATES[0]
    curve = lengths.sel(recipe=recipe, learning_rate=rate).mean("seed")
    smooth = np.convolve(curve, np.ones(5) / 5, mode="valid")
    width = 5 if recipe == "nature_dqn" else 1.5  # dqn_zoo's lies upon it
    axes.plot(thousands[4:], smooth, linewidth=width, label=f"{recipe}, {rate:g}")
axes.set(
    xlabel="steps of the environment, thousands",
    ylabel="episode length, mean of 5 seeds",
    title="Each recipe at its own learning rate",
)
_ = figure.legend(fontsize=9, loc="outside lower center", ncols=3)

# %%
# And all of them at each rate, in the last tenth:

figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
cells = last.mean("seed").transpose("recipe", "learning_rate").values
image = axes.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
for (row, column), value in np.ndenumerate(cells):
    shade = "black" if value > cells.max() / 2 else "white"
    axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade)
axes.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
axes.set_yticks(range(len(cells)), list(RECIPES | VARIANTS))
axes.grid(visible=False)
axes.set(xlabel="learning rate", title="The last tenth of the training")
_ = figure.colorbar(image, ax=axes, label="episode length, at most 500")

# %%
# How this compares
# -----------------
#
# `CleanRL's DQN <https://huggingface.co/cleanrl/CartPole-v1-dqn_jax-seed1>`__ balances
# all 500 steps when evaluated after 500,000, with Adam at 2.5e-4, a squared error and
# batches of 128. `Obando-Ceron and Castro <https://arxiv.org/abs/2011.14826>`__ (2021)
# find Adam with a squared error better than RMSProp with a clipped one on CartPole and
# its like. Ours has a fifth of CleanRL's steps, batches of 32 as in the papers, and is
# judged while it learns, with one action in twenty at random.
#
# What to do next: swap the environment for another of gymnax, add a row to ``RECIPES``,
# or read :doc:`which recipe belongs to which loss <../how-to/dqn>`.
