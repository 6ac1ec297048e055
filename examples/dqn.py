"""
DQN: which RMSProp learns to balance a pole?
============================================

Dopamine's recipe, ``dopamine_dqn``, at a rate of 1e-3. Nature's own, on the loss that
most code has, a mean over the batch, hardly learns.

The papers and codes of deep Q-learning all say "RMSProp" and mean different optimizers.
Each of them trains the same agent here, at three learning rates and with five seeds. A
training is a loop of environment, replay memory and network, compiled 1,000 steps at a
time. All of them are one ``sweep``, to be watched, interrupted and resumed. A recipe
comes with the loss it was made for: Nature's is the sum over a batch, whose
gradient is 32 times the mean's, and its eps belongs to that. On a mean the same eps is
32² times too large.

The environment is CartPole-v1 of gymnax, where an episode lasts at most 500 steps. The
agent gets nothing while the pole stands and -1 when it falls, as in `the paper that
introduced it <https://doi.org/10.1109/TSMC.1983.6313077>`__ (Barto, Sutton and
Anderson, 1983). With a reward of 1 a step, values would grow to 1/(1 - 0.99) = 100, and
DQN's clipped error, which is meant for Atari's clipped rewards, would nearly always be
clipped.

What is reported elsewhere: `CleanRL's DQN
<https://huggingface.co/cleanrl/CartPole-v1-dqn_jax-seed1>`__ balances all 500 steps
when evaluated after 500,000, with Adam at 2.5e-4, a squared error and batches of 128.
`Obando-Ceron and Castro <https://arxiv.org/abs/2011.14826>`__ (2021) find Adam with a
squared error better than RMSProp with a clipped one on CartPole and its like. Ours has
a fifth of CleanRL's steps, batches of 32 as in the papers, and is judged while it
learns, with one action in twenty at random.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from common import COLOURS, arguments, logits, network, save

from jax_rmsprop import Training, conventions, rmsprop, sweep

try:
    import gymnax
except ModuleNotFoundError as error:  # said in main
    gymnax, missing = None, error.name

REPORT = 1_000  # steps of the environment
BATCH, MEMORY, DISCOUNT = 32, 10_000, 0.99
LEARN_EVERY, COPY_EVERY, WARM_UP, EXPLORE = 4, 500, 1_000, 20_000
RATES, SEEDS = [2.5e-4, 1e-3, 1e-2], range(5)
# An optimizer of the learning rate, and what the mean loss of a batch is multiplied by.
RECIPES = {
    "nature_dqn": (conventions.nature_dqn, BATCH),
    "nature_dqn on a mean": (conventions.nature_dqn, 1),
    "dqn_zoo": (conventions.dqn_zoo, 1),
    "dopamine_dqn": (conventions.dopamine_dqn, 1),
    "pytorch": (conventions.pytorch, 1),
}
# The same eps inside and outside of the root, around a mean's own size.
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
    target: optax.Params  # the network of some time ago, whose values are the targets
    state: optax.OptState
    memory: Transition
    observation: jax.Array
    env_state: object
    t: jax.Array  # how many steps it has taken


def init(recipe, learning_rate, seed):
    """An agent that knows nothing."""
    optimizer = (RECIPES | VARIANTS)[recipe][0](learning_rate)
    env, env_params = gymnax.make("CartPole-v1")
    _, start, reset = jax.random.split(jax.random.key(seed), 3)
    params = network(start, inputs=4, hidden=128, outputs=2)
    observation, env_state = env.reset(reset, env_params)
    one = Transition(observation, jnp.int32(0), jnp.float32(0), observation, False)
    memory = jax.tree.map(lambda x: jnp.full((MEMORY, *jnp.shape(x)), x), one)
    state = optimizer.init(params)
    return Agent(params, params, state, memory, observation, env_state, jnp.int32(0))


def step(agent, recipe, learning_rate, seed):
    """1,000 steps of the environment: how long the episodes last that end in them."""
    make, scale = (RECIPES | VARIANTS)[recipe]
    optimizer = make(learning_rate)
    env, env_params = gymnax.make("CartPole-v1")
    key = jax.random.split(jax.random.key(seed), 3)[0]

    def loss(params, target, batch):
        values = logits(params, batch.observation)
        taken = jnp.take_along_axis(values, batch.action[:, None], 1)[:, 0]
        best = logits(target, batch.following).max(-1)
        wanted = batch.reward + DISCOUNT * jnp.where(batch.fell, 0, best)
        return scale * optax.huber_loss(taken, wanted).mean()

    def act(agent, t):
        """A step of the environment, remembered."""
        chance, explore, move = jax.random.split(jax.random.fold_in(key, t), 3)
        greedy = logits(agent.params, agent.observation).argmax()
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


def draw(lengths):
    """Learning curves at the recipes' own rates, and the last tenth at each rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    thousands = np.arange(1, lengths.shape[-1] + 1)
    for i, recipe in enumerate(RECIPES):
        rate = RATES[-1] if recipe == "pytorch" else RATES[0]
        curve = lengths.sel(recipe=recipe, learning_rate=rate).mean("seed")
        smooth = np.convolve(curve, np.ones(5) / 5, mode="valid")
        style = "--" if recipe == "dqn_zoo" else "-"  # it covers nature_dqn
        label = f"{recipe}, {rate:g}"
        left.plot(thousands[4:], smooth, style, color=COLOURS[i], label=label)
    left.set(
        xlabel="steps of the environment, thousands",
        ylabel="episode length, mean of 5 seeds",
        title="each recipe at its own learning rate",
    )
    left.legend(fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.15), ncols=2)
    last = lengths[..., -len(thousands) // 10 :].mean(lengths.dims[-1])
    cells = last.mean("seed").transpose("recipe", "learning_rate").values
    image = right.imshow(cells, aspect="auto", cmap="viridis", vmin=0)
    for (row, column), value in np.ndenumerate(cells):
        shade = "black" if value > cells.max() / 2 else "white"
        right.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade)
    right.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
    right.set_yticks(range(len(cells)), list(RECIPES | VARIANTS))
    right.grid(visible=False)
    right.set(xlabel="learning rate", title="the last tenth of the training")
    figure.colorbar(image, ax=right, label="episode length, at most 500")
    return figure


def watch(batch):
    """Print how long the last episodes of a batch were."""
    last = batch.episode_length.isel(step=-1)
    recipe = batch.recipe.values[0]
    thousands = int(last.step) + 1
    print(f"{recipe}, {thousands},000 steps: {float(last.mean()):.0f} on average")


def main():
    """Train all of them, print how long they balance the pole, and draw it."""
    parser = arguments(__doc__, "dqn.png")
    parser.add_argument("--steps", type=int, default=100_000, help="of each agent")
    parser.add_argument("--store", help="a folder to go on from, and to keep it in")
    parser.add_argument(
        "--watch", action="store_true", help="print how they learn, while they learn"
    )
    options = parser.parse_args()
    if gymnax is None:
        raise SystemExit(
            f"{missing} is not installed; run `pip install gymnax six` first"
        )
    grid = {
        "recipe": list(RECIPES | VARIANTS),
        "learning_rate": RATES,
        "seed": SEEDS,
    }
    curves = sweep(
        Training(init, step),
        grid,
        steps=options.steps // REPORT,
        batch_size=len(RATES) * len(SEEDS),
        store=options.store,
        on_step=watch if options.watch else None,
    )
    lengths = curves.episode_length
    last = lengths[..., -lengths.shape[-1] // 10 :].mean(lengths.dims[-1])
    print("mean length of the last tenth's episodes, and its range over five seeds")
    print(f"{'learning rate':22}" + "".join(f"{rate:>20g}" for rate in RATES))
    for recipe in RECIPES | VARIANTS:
        cells = [
            f"{x.mean():.0f} ({x.min():.0f} to {x.max():.0f})"
            for x in (
                last.sel(recipe=recipe, learning_rate=rate).values for rate in RATES
            )
        ]
        print(f"{recipe:22}" + "".join(f"{cell:>20}" for cell in cells))
    save(draw(lengths), options.output)


if __name__ == "__main__":
    main()
