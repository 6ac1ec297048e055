"""The real libraries behind one interface: steps with given gradients.

    theirs = FRAMEWORKS["pytorch"](parameters, options)
    trajectory = theirs.run(gradients, rates)

`parameters` is a dict of arrays by name; `gradients` the same with a leading axis of
steps; `rates` the learning rate of each step. The trajectory is every step's
parameters. The library computes everything; nothing here is from the package.
"""

import importlib
import importlib.util
import os
import sys
import types
import warnings

import numpy as np

from tests.helpers import require

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def quietly(module):
    """Import a library without its own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require(module)


def alone(module):
    """Import one module of a package without the package's other dependencies."""
    *packages, _ = module.split(".")
    top = importlib.util.find_spec(packages[0])
    if top is None:
        return require(packages[0])
    stubs = {}
    for i in range(len(packages)):
        path = os.path.join(top.submodule_search_locations[0], *packages[1 : i + 1])
        stub = types.ModuleType(".".join(packages[: i + 1]))
        stub.__path__ = [path]
        stubs[stub.__name__] = stub
    before = dict(sys.modules)
    sys.modules.update(stubs)
    try:
        return importlib.import_module(module)
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] == packages[0]:
                del sys.modules[name]
        sys.modules.update({n: before[n] for n in stubs if n in before})


class Torch:
    """Any optimizer with PyTorch's interface."""

    dtypes = ("float32", "float64")

    def __init__(self, parameters, options):
        self.torch = quietly("torch")
        self.names = list(parameters)
        self.x = [
            self.torch.nn.Parameter(self.torch.tensor(parameters[n]))
            for n in self.names
        ]
        self.optimizer = self.make()(self.x, **options)

    def make(self):
        return self.torch.optim.RMSprop

    def run(self, gradients, rates):
        trajectory = {n: np.empty_like(gradients[n]) for n in self.names}
        for t, rate in enumerate(rates):
            self.optimizer.param_groups[0]["lr"] = float(rate)
            for name, x in zip(self.names, self.x, strict=True):
                x.grad = self.torch.from_numpy(gradients[name][t])
            self.optimizer.step()
            for name, x in zip(self.names, self.x, strict=True):
                trajectory[name][t] = x.detach().numpy()
        return trajectory


class Timm(Torch):
    def make(self):
        return alone("timm.optim.rmsprop_tf").RMSpropTF


class TimmLaProp(Torch):
    def make(self):
        return alone("timm.optim.laprop").LaProp

    def run(self, gradients, rates):
        # It stores the weights of the averages in PyTorch's default dtype.
        default = self.torch.get_default_dtype()
        self.torch.set_default_dtype(self.x[0].dtype)
        try:
            return super().run(gradients, rates)
        finally:
            self.torch.set_default_dtype(default)


class StableBaselines3(Torch):
    def make(self):
        return alone(
            "stable_baselines3.common.sb2_compat.rmsprop_tf_like"
        ).RMSpropTFLike


class BitsAndBytes(Torch):
    dtypes = ("float32",)

    def make(self):
        return quietly("bitsandbytes").optim.RMSprop32bit


class TensorFlow:
    """An optimizer of TensorFlow variables, all steps in one graph."""

    dtypes = ("float32", "float64")

    def __init__(self, parameters, options):
        self.tf = quietly("tensorflow")
        self.names = list(parameters)
        self.dtype = str(next(iter(parameters.values())).dtype)
        self.x = [self.tf.Variable(parameters[n], name=n) for n in self.names]
        self.rate = self.tf.Variable(0.0, dtype=self.dtype, trainable=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.build(options)
        self.all_steps = self.tf.function(self.graph)

    def build(self, options):
        make = self.tf.compat.v1.train.RMSPropOptimizer
        defaults = {"decay": 0.9, "momentum": 0.0, "epsilon": 1e-10}
        # As callables, since a float would pass through float32.
        numbers = {
            n: (lambda v=v: self.tf.constant(v, self.dtype))
            for n, v in (defaults | options).items()
            if n in defaults
        }
        self.optimizer = make(self.rate.read_value, **(options | numbers))
        self.optimizer._create_slots(self.x)

    def apply(self, gradients):
        self.optimizer.apply_gradients(list(zip(gradients, self.x, strict=True)))

    def graph(self, gradients, rates):
        tf = self.tf

        def step(t, *written):
            self.rate.assign(rates[t])
            self.apply([g[t] for g in gradients])
            written = [
                w.write(t, x.read_value()) for w, x in zip(written, self.x, strict=True)
            ]
            return t + 1, *written

        n = tf.shape(rates)[0]
        arrays = [tf.TensorArray(self.dtype, size=n) for _ in self.x]
        _, *arrays = tf.while_loop(lambda t, *_: t < n, step, (0, *arrays))
        return [a.stack() for a in arrays]

    def run(self, gradients, rates):
        gradients = [self.tf.constant(gradients[n]) for n in self.names]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays = self.all_steps(gradients, self.tf.constant(rates))
        return {n: a.numpy() for n, a in zip(self.names, arrays, strict=True)}


class TfKerasV2(TensorFlow):
    def build(self, options):
        keras = quietly("tf_keras")
        keras.backend.set_floatx(self.dtype)
        make = keras.optimizers.legacy.RMSprop
        # As callables, since a float would pass through float32; but the library needs
        # a number to decide if there is momentum.
        numbers = {
            n: (lambda v=v: self.tf.constant(v, self.dtype))
            for n, v in ({"rho": 0.9} | options).items()
            if n == "rho" or (n == "momentum" and v)
        }
        self.optimizer = make(learning_rate=self.rate.read_value, **(options | numbers))
        self.optimizer._create_all_weights(self.x)


class Keras(TensorFlow):
    def build(self, options):
        keras = quietly("keras")
        keras.backend.set_floatx(self.dtype)
        self.x = [
            keras.Variable(x.numpy(), name=n)
            for n, x in zip(self.names, self.x, strict=True)
        ]
        self.optimizer = keras.optimizers.RMSprop(**options)
        self.optimizer.build(self.x)
        self.rate = self.optimizer._learning_rate.value

    def apply(self, gradients):
        self.optimizer.apply(gradients, self.x)

    def graph(self, gradients, rates):
        variables, self.x = self.x, [x.value for x in self.x]
        keras_apply = self.optimizer.apply
        self.apply = lambda g: keras_apply(g, variables)
        try:
            return super().graph(gradients, rates)
        finally:
            self.x = variables


class Sonnet(TensorFlow):
    def build(self, options):
        make = quietly("sonnet").optimizers.RMSProp
        numbers = {
            n: self.tf.constant(v, self.dtype)
            for n, v in (
                {"decay": 0.9, "momentum": 0.0, "epsilon": 1e-10} | options
            ).items()
            if not isinstance(v, bool)
        }
        self.optimizer = make(self.rate, **(options | numbers))
        self.optimizer._initialize(self.x)

    def apply(self, gradients):
        self.optimizer.apply(gradients, self.x)


class Mlx:
    dtypes = ("float32", "float64")

    def __init__(self, parameters, options):
        self.mx = quietly("mlx.core")
        self.mx.set_default_device(self.mx.cpu)
        dtype = getattr(self.mx, str(next(iter(parameters.values())).dtype))
        self.x = {n: self.mx.array(x, dtype) for n, x in parameters.items()}
        self.optimizer = quietly("mlx.optimizers").RMSprop(0.0, **options)

    def run(self, gradients, rates):
        trajectory = {n: np.empty_like(g) for n, g in gradients.items()}
        for t, rate in enumerate(rates):
            dtype = next(iter(self.x.values())).dtype
            self.optimizer.state["learning_rate"] = self.mx.array(rate, dtype)
            g = {n: self.mx.array(g[t], dtype) for n, g in gradients.items()}
            self.x = self.optimizer.apply_gradients(g, self.x)
            for n, x in self.x.items():
                trajectory[n][t] = np.array(x)
        return trajectory


FRAMEWORKS = {
    "pytorch": Torch,
    "keras": Keras,
    "tensorflow1": TensorFlow,
    "tf_keras_v2": TfKerasV2,
    "timm": Timm,
    "laprop": TimmLaProp,
    "stable_baselines3": StableBaselines3,
    "bitsandbytes": BitsAndBytes,
    "sonnet": Sonnet,
    "mlx": Mlx,
}
