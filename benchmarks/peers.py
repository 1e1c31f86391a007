"""The same draws in other libraries, each where it is installed: TensorFlow Probability on JAX, PyTorch, and
PyTorch's relaxit. PyTorch's generator is its own, so its draws are functions of the logits alone.
"""

import importlib
import os
import warnings

import numpy as np

from rows import SCALE, TAU, K, factor


def load(module):
    """The module, or None and a line that says what is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from these modules, on features they still use
            return importlib.import_module(module)
    except ImportError as reason:
        print(f"{module} is left out: {reason}; pip install -e '.[peers]' has it")
        return None


def of_tfp():
    """{name: (draw from a key and logits, whether it has a gradient)}, and the version."""
    tfp = load("tensorflow_probability.substrates.jax")
    if tfp is None:
        return {}, None
    d = tfp.distributions
    return {
        "relaxed_bernoulli": (lambda k, l: d.RelaxedBernoulli(TAU, logits=l).sample(seed=k), True),
        "gumbel_softmax": (lambda k, l: d.RelaxedOneHotCategorical(TAU, logits=l).sample(seed=k), True),
        "straight_through_bernoulli": (
            lambda k, l: d.Bernoulli(logits=l, dtype=l.dtype).sample(seed=k), False,
        ),
        "straight_through_categorical": (
            lambda k, l: d.OneHotCategorical(logits=l, dtype=l.dtype).sample(seed=k), False,
        ),
    }, tfp.__version__  # fmt: skip


def of_torch():
    """{name: draw from logits} for PyTorch itself, and the version."""
    torch = load("torch")
    if torch is None:
        return {}, None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    soft, bits = torch.nn.functional.gumbel_softmax, torch.distributions.RelaxedBernoulli
    return {
        "relaxed_bernoulli": lambda l: bits(torch.tensor(TAU), logits=l).rsample(),
        "gumbel_softmax": lambda l: soft(l, TAU),
        "gumbel_softmax_hard": lambda l: soft(l, TAU, hard=True),
    }, torch.__version__


def of_relaxit():
    """{name: draw from logits, or from means} for PyTorch's relaxit, and the version."""
    torch, d = load("torch"), load("relaxit.distributions")
    if torch is None or d is None:
        return {}, None
    tau, scale = torch.tensor(TAU), torch.tensor(SCALE)
    ends = torch.tensor(1.1), torch.tensor(-0.1)

    def correlated(l):
        matrix = torch.from_numpy(np.array(factor(l.shape[-1]) @ factor(l.shape[-1]).T)).to(l.dtype)
        return d.CorrelatedRelaxedBernoulli(torch.sigmoid(l), matrix, tau).rsample()

    def counts(l):
        values = torch.arange(l.shape[-1]).to(l.dtype)
        return d.GeneralizedGumbelSoftmax(values, logits=l, tau=tau).rsample_value()

    draws = {
        "straight_through_bernoulli": lambda l: d.StraightThroughBernoulli(logits=l).rsample(),
        "stochastic_times_smooth": lambda l: d.StochasticTimesSmooth(logits=l).rsample(),
        "gaussian_bernoulli": lambda l: d.GaussianRelaxedBernoulli(l, scale.expand_as(l)).rsample(),
        "hard_concrete": lambda l: d.HardConcrete(l.exp(), tau, *ends).rsample(),
        "correlated_bernoulli": correlated,
        "decoupled_gumbel_softmax": lambda l: d.DecoupledStraightThroughGumbelSoftmax(
            TAU, 1.0, logits=l
        ).rsample(),
        "invertible_gaussian": lambda l: d.InvertibleGaussian(l, scale.expand_as(l), tau).rsample(),
        "logistic_normal": lambda l: d.LogisticNormalSoftmax(l, scale.expand_as(l)).rsample(),
        "generalized_gumbel_softmax": counts,
        "relaxed_top_k": lambda l: d.GumbelSoftmaxTopK(
            logits=l, K=torch.tensor(K), tau=tau, hard=False
        ).rsample(),
    }
    return draws, importlib.metadata.version("relaxit")


def torch_pass(draw, logits, weights, backward):
    """The draw and, if requested, its gradient in the logits, for a fixed cotangent."""
    import torch

    as_torch = lambda x: torch.from_numpy(np.array(x, np.float32)).to(getattr(torch, str(np.dtype(x.dtype))))
    l = as_torch(logits).requires_grad_(backward)
    w = as_torch(weights)

    def forward():
        with torch.no_grad():
            return draw(l)

    def both():
        l.grad = None
        z = draw(l)
        z.backward(w)
        return z, l.grad

    return both if backward else forward
