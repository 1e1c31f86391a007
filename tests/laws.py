"""Exact laws of discrete draws, for one element of a batch, and which of their outcomes a draw is."""

import itertools

import numpy as np
import scipy.integrate
import scipy.special as sp
import scipy.stats as st


def bernoulli(logits, **_):
    return np.array([sp.expit(-logits), sp.expit(logits)])


def categorical(logits, **_):
    return sp.softmax(logits)


def root(logits, **_):
    p = np.sqrt(sp.expit(logits))
    return np.array([1 - p, p])


def bit_pairs(logits, scale_tril, **_):
    """Probabilities of two correlated bits, in the order 00, 01, 10, 11, from the bivariate normal."""
    probit = sp.ndtri(sp.expit(logits.astype(float)))
    covariance = scale_tril @ scale_tril.T
    both = st.multivariate_normal([0, 0], covariance).cdf(probit)
    a, b = sp.ndtr(probit / np.sqrt(covariance.diagonal()))
    return np.array([1 - a - b + both, b - both, a - both, both])


def orders(logits, k, **_):
    """Ordered draws without replacement, by enumeration."""
    p = np.exp(logits.astype(float))
    law = []
    for order in itertools.permutations(range(len(p)), k):
        left = [p[list(set(range(len(p))) - set(order[:j]))].sum() for j in range(k)]
        law.append(np.prod(p[list(order)] / left))
    return np.array(law)


def subsets(logits, k, **_):
    names = [frozenset(order) for order in itertools.permutations(range(len(logits)), k)]
    sets = list(map(frozenset, itertools.combinations(range(len(logits)), k)))
    law = orders(logits, k)
    return np.array([sum(law[i] for i, name in enumerate(names) if name == s) for s in sets])


def bits_given_their_sum(logits, k, **_):
    """Independent bits with these log-odds, given that k are ones, by enumeration."""
    sums = [logits[list(s)].astype(float).sum() for s in itertools.combinations(range(len(logits)), k)]
    return sp.softmax(sums)


def which_order(draws, n=4, k=2):
    codes = [np.dot(order, [n, 1]) for order in itertools.permutations(range(n), k)]
    return np.searchsorted(codes, np.asarray(draws) @ np.array([n, 1]))


def which_set(draws, n=4, k=2):
    codes = [np.dot(subset, [n, 1]) for subset in itertools.combinations(range(n), k)]
    top = np.sort(np.argsort(-np.asarray(draws, np.float64), -1)[..., :k], -1)
    return np.searchsorted(codes, top @ np.array([n, 1]))


def which_value(draws):
    return np.abs(np.asarray(draws, np.float64)[..., None] - [0, 1, 3]).argmin(-1)


def above_half(draws):
    return (np.asarray(draws, np.float64) > 0.5).astype(int)


def pair_index(draws):
    return above_half(draws) @ np.array([2, 1])


def which_permutation(draws):
    """The index of matrices whose row i is the item at place i."""
    n = np.shape(draws)[-1]
    digits = n ** np.arange(n)[::-1]
    codes = [np.dot(order, digits) for order in itertools.permutations(range(n))]
    return np.searchsorted(codes, largest(draws) @ digits)


def largest(draws):
    return np.argmax(np.asarray(draws, np.float64), -1)


def hard_concrete_atoms(logits, tau, **_):
    low, high = np.log(0.1 / 1.1), np.log(1.1 / 0.1)
    return sp.expit(tau * low - logits), sp.expit(logits - tau * high)


def gaussian_argmax(loc, scale, tau, delta):
    """Which of independent normal numbers is the largest, or the last class if none is above log delta."""
    low = tau * np.log(delta)

    def largest_at(y, k):
        others = np.delete(np.arange(len(loc)), k)
        return st.norm.pdf(y, loc[k], scale[k]) * st.norm.cdf(y, loc[others], scale[others]).prod()

    law = [scipy.integrate.quad(largest_at, low, np.inf, args=(k,))[0] for k in range(len(loc))]
    return np.array([*law, 1 - sum(law)])


def gaussian_bits(loc, scale):
    return np.array([sp.ndtr((0.5 - loc) / scale), sp.ndtr((loc - 0.5) / scale)])


# --- log-densities and log-masses as written in papers, for one element of a batch, in float64 ---


def binary_concrete(z, logits, tau, **_):
    x = tau * sp.logit(z) - logits
    return np.log(tau) + sp.log_expit(x) + sp.log_expit(-x) - np.log(z) - np.log1p(-z)


def hard_concrete(z, logits, tau):
    zero, one = hard_concrete_atoms(logits, tau)
    inside = binary_concrete((np.clip(z, 0, 1) + 0.1) / 1.2, logits, tau) - np.log(1.2)
    return np.where(z == 0, np.log(zero), np.where(z == 1, np.log(one), inside))


def gaussian_gate(z, loc, scale):
    inside = st.norm.logpdf(z, loc, scale)
    zero, one = sp.log_ndtr(-loc / scale), sp.log_ndtr((loc - 1) / scale)
    return np.where(z == 0, zero, np.where(z == 1, one, inside))


def gaussian_copula(z, logits, tau, scale_tril):
    v = sp.ndtri(sp.expit(tau * sp.logit(z) - logits))
    together = st.multivariate_normal(cov=scale_tril @ scale_tril.T).logpdf(v)
    return together - st.norm.logpdf(v).sum(-1) + binary_concrete(z, logits, tau).sum(-1)


def concrete(z, logits, tau):
    y, k = np.log(z), len(logits)
    law = sp.gammaln(k) + (k - 1) * np.log(tau) - k * sp.logsumexp(logits - tau * y, -1)
    return law + (logits - (tau + 1) * y).sum(-1)


def softmax_plus_plus(z, loc, scale, tau, delta):
    y = tau * (np.log(z[..., :-1]) - np.log(z[..., -1:]) + np.log(delta))
    return st.norm.logpdf(y, loc, scale).sum(-1) + len(loc) * np.log(tau) - np.log(z).sum(-1)


def logistic_normal(z, loc, scale=None, scale_tril=None):
    """The Gaussian of the log-ratios to the last coordinate, and its Jacobian."""
    ratios = np.eye(len(loc))[:-1] - np.eye(len(loc))[-1]
    a = ratios @ (np.diag(scale) if scale_tril is None else scale_tril)
    return st.multivariate_normal(ratios @ loc, a @ a.T).logpdf(np.log(z) @ ratios.T) - np.log(z).sum(-1)
