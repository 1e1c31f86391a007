"""Kernels for GPUs (Triton) and TPUs (Mosaic), written in Pallas, that make noise and use it in one pass.

A kernel hashes the position of each number, as `_random` does, so it draws the same numbers as the plain
form. Each program of its grid processes some rows of the array. On a GPU it gets whole arrays and reads a
long row in pieces, up to three times. On a TPU it gets blocks of whole rows.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas
from jax.experimental.pallas import tpu, triton

from relaxit_jax import _random as rng
from relaxit_jax._fused import PIECE


def draw(score, out, given, interpret, device, key, logits, tau):
    """The index of the largest ("race" or "gumbel"), or a relaxed draw ("softmax" or "log")."""
    rows = _Rows(device, interpret, logits)
    body = _search if score in ("race", "gumbel") else _relax
    return rows.call(functools.partial(body, score), out, key, logits.astype(given), tau)[0]


def _noisy(score, rows, words, logits, top, c):
    """exp(l) / E or l + G for a piece, which have the same largest entry; -inf outside the array."""
    l = rows.read(logits, c, -jnp.inf).astype(jnp.float32) - top
    e = rng.exponential_of(rng.threefry(words[0], words[1], rows.place(c)))
    return jnp.where(rows.inside(c), jnp.exp(l) / e if score == "race" else l - jnp.log(e), -jnp.inf)


def _top(rows, logits):
    def higher(c, top):
        return jnp.maximum(top, _largest(rows.read(logits, c, -jnp.inf).astype(jnp.float32)))

    return rows.over_pieces(higher, rows.column_of(-jnp.inf))


def _largest(x):
    return jnp.max(x, 1, keepdims=True)


def _sum(x):
    return jnp.sum(x, 1, keepdims=True)


def _search(score, rows, words, logits, _, index):
    top = _top(rows, logits)

    def search(c, best):
        score_of_best, best, nan = best
        x = _noisy(score, rows, words, logits, top, c)
        here = _largest(x)
        first = jnp.min(jnp.where(x == here, rows.place_in_row(c), rows.classes), 1, keepdims=True)
        higher = here > score_of_best
        nan = jnp.maximum(nan, _largest(jnp.where(x != x, 1, 0)))
        return jnp.where(higher, here, score_of_best), jnp.where(higher, first, best), nan

    start = rows.column_of(-jnp.inf), rows.column_of(rows.classes), rows.column_of(0)
    _, best, nan = rows.over_pieces(search, start)
    rows.write(index, jnp.where(nan > 0, rows.classes, best))


def _relax(score, rows, words, logits, tau, out):
    top, tau = _top(rows, logits), rows.read(tau, other=1.0)

    def add(c, state):
        largest, total = state
        x = _noisy("gumbel", rows, words, logits, top, c)
        higher = jnp.maximum(largest, _largest(x))
        shift = jnp.where(higher == -jnp.inf, 0, higher)
        return higher, total * jnp.exp((largest - shift) / tau) + _sum(jnp.exp((x - shift) / tau))

    largest, total = rows.over_pieces(add, (rows.column_of(-jnp.inf), rows.column_of(0.0)))

    def write(c, nothing):
        y = (_noisy("gumbel", rows, words, logits, top, c) - largest) / tau
        rows.write(out, y - jnp.log(total) if score == "log" else jnp.exp(y) / total, c)
        return nothing

    rows.over_pieces(write, 0)


def few(k, out, given, interpret, device, key, logits):
    """The k largest of the logits with noise, decreasing, and their indices."""
    return _Rows(device, interpret, logits).call(functools.partial(_few, k), out, key, logits.astype(given))


def _few(k, rows, words, logits, values, indices):
    top = _top(rows, logits)
    x, place = _noisy("gumbel", rows, words, logits, top, 0), rows.place_in_row(0)
    nan = _largest(jnp.where(x != x, 1, 0)) > 0
    left = rows.inside(0)
    for j in range(k):
        here = _largest(jnp.where(left, x, -jnp.inf))
        first = jnp.min(jnp.where(left & (x == here), place, rows.classes), 1, keepdims=True)
        rows.write_column(values, jnp.where(nan, jnp.nan, here + top), j)
        rows.write_column(indices, jnp.where(nan, j, first), j)
        left = left & (place != first)


def relaxed(soft, k, out, given, interpret, device, key, logits, tau):
    """A draw of soft(k, logits with noise, tau)."""
    rows = _Rows(device, interpret, logits, arrays=2 * k)
    return rows.call(functools.partial(_apply, soft, k), out, key, logits.astype(given), tau)[0]


def _apply(soft, k, rows, words, logits, tau, out):
    x = _noisy("gumbel", rows, words, logits, _top(rows, logits), 0)
    # Mosaic has no rule for a function with its own derivative; jax.vjp leaves plain operations
    value, _ = jax.vjp(functools.partial(soft, k), x, rows.read(tau, other=1.0))
    rows.write(out, value)


def slope(soft, k, out, given, interpret, device, key, logits, tau, cotangent):
    """The gradient of such a draw in the logits and in tau."""
    rows = _Rows(device, interpret, logits, arrays=4 * k)
    body = functools.partial(_pull, soft, k)
    return rows.call(body, out, key, logits.astype(given), tau, cotangent.astype(given))


def _pull(soft, k, rows, words, logits, tau, cotangent, of_logits, of_tau):
    x = _noisy("gumbel", rows, words, logits, _top(rows, logits), 0)
    _, pull = jax.vjp(functools.partial(soft, k), x, rows.read(tau, other=1.0))
    of_x, along = pull(rows.read(cotangent).astype(jnp.float32))
    rows.write(of_logits, of_x)
    rows.write(of_tau, along)


def mean_slope(num_samples, shift, out, given, interpret, device, key, logits, tau, index, cotangent):
    """The gradient in the logits and in tau that `_straight_through._mean_slope` returns."""
    keys = jax.vmap(jax.random.split)(jax.random.split(key, num_samples))
    rows = _Rows(device, interpret, logits)
    body = functools.partial(_slope, num_samples, shift)
    return rows.call(body, out, keys, logits.astype(given), tau, index, cotangent.astype(given))


def _slope(num_samples, shift, rows, words, logits, tau, index, cotangent, of_logits, of_tau):
    l, tau = rows.read(logits, 0, -jnp.inf).astype(jnp.float32), rows.read(tau, other=1.0)
    winner = rows.place_in_row(0) == rows.read(index)
    ct = rows.read(cotangent).astype(jnp.float32)
    below = l - _largest(l)
    log_p = below - jnp.log(_sum(jnp.exp(below))) + shift
    rare = log_p < -60
    moved, far = jnp.exp(-jnp.where(rare, 0, log_p)), jnp.where(rare, log_p, 0)

    def add(i, sums):
        e, top = (
            rng.exponential_of(rng.threefry(words[4 * i + 2 * j], words[4 * i + 2 * j + 1], place))
            for j, place in ((0, rows.place(0)), (1, rows.row(1).astype(jnp.uint32)))
        )
        ratio = e / top * moved
        gap = jnp.where(winner, 0, far - jnp.log(jnp.where(rare, ratio, 1 + ratio)))
        y = jnp.where(rows.inside(0), gap / tau, -jnp.inf)
        weights = jnp.exp(y)
        p = weights / _sum(weights)
        slope = p * (ct - _sum(p * ct))
        return sums[0] + slope, sums[1] + _sum(slope * jnp.where(y == -jnp.inf, 0, y))

    start = jnp.zeros((rows.height, rows.width), jnp.float32), rows.column_of(0.0)
    total, along = jax.lax.fori_loop(0, num_samples, add, start)
    rows.write(of_logits, total / (num_samples * tau))
    rows.write(of_tau, -along / (num_samples * tau))


class _Rows:
    """The rows that a program processes, how it reads and writes them, and the call of the kernel."""

    def __init__(self, device, interpret, logits, arrays=1):
        self.device, self.interpret = device, interpret
        self.classes = logits.shape[-1]
        self.count = logits.size // self.classes
        on_gpu = device == "cuda"
        self.width = min(pallas.next_power_of_2(self.classes), PIECE) if on_gpu else self.classes
        # fewer rows for a kernel that holds several arrays of them; a power of 2
        rows = PIECE // 2 // pallas.next_power_of_2(arrays) // self.width
        self.height = max(1, rows) if on_gpu else 16
        self.pieces = pallas.cdiv(self.classes, self.width)

    def over_pieces(self, turn, start):
        return turn(0, start) if self.pieces == 1 else jax.lax.fori_loop(0, self.pieces, turn, start)

    def column_of(self, value):
        return jnp.full((self.height, 1), value, jnp.int32 if isinstance(value, int) else jnp.float32)

    def row(self, width):
        return self.first + jax.lax.broadcasted_iota(jnp.int32, (self.height, width), 0)

    def place_in_row(self, c):
        return c * self.width + jax.lax.broadcasted_iota(jnp.int32, (self.height, self.width), 1)

    def place(self, c):
        """The position of each number in the whole array, for the hash."""
        return (self.row(self.width) * self.classes + self.place_in_row(c)).astype(jnp.uint32)

    def inside(self, c):
        return (self.row(self.width) < self.count) & (self.place_in_row(c) < self.classes)

    def _part(self, ref, c):
        rows = pallas.ds(self.first, self.height)
        if ref.shape[1] == self.classes:
            start = c * self.width + 0 * self.first  # not static: a static slice has to be inside the array
            return ref.at[rows, pallas.ds(start, self.width)], self.inside(c)
        return ref.at[rows, pallas.ds(0, 1)], self.row(1) < self.count

    def read(self, ref, c=0, other=0):
        if self.device == "tpu" or ref.shape[0] < self.count:
            return ref[...]
        part, mask = self._part(ref, c)
        return triton.load(part, mask=mask, other=other)

    def write(self, ref, value, c=0):
        if self.device == "tpu":
            ref[...] = value.astype(ref.dtype)
        else:
            part, mask = self._part(ref, c)
            triton.store(part, value.astype(ref.dtype), mask=mask)

    def write_column(self, ref, value, j):
        if self.device == "tpu":
            ref[:, j : j + 1] = value.astype(ref.dtype)
        else:
            part = ref.at[pallas.ds(self.first, self.height), pallas.ds(j, 1)]
            triton.store(part, value.astype(ref.dtype), mask=self.row(1) < self.count)

    def call(self, body, out, keys, *arrays):
        """Call the kernel on the words of keys, which every row needs, and on arrays of one or all rows."""
        arrays = [x.reshape(-1, x.shape[-1]) for x in arrays]
        shapes = [
            jax.ShapeDtypeStruct((self.count, x.shape[-1]), x.dtype, manual_axis_type=x.manual_axis_type)
            for x in out
        ]

        def kernel(*refs):
            self.first = pallas.program_id(0) * self.height  # not known inside loops
            body(self, *refs)

        def block(x):
            if x.shape[0] < self.count:
                return pallas.BlockSpec(x.shape, lambda i: (0, 0))
            return pallas.BlockSpec((self.height, x.shape[1]), lambda i: (i, 0))

        if self.device == "cuda":
            specs = [pallas.BlockSpec()] * (1 + len(arrays)), [pallas.BlockSpec()] * len(out)
            params = triton.CompilerParams(num_warps=4, num_stages=1)
        else:
            specs = [pallas.BlockSpec(memory_space=tpu.SMEM), *map(block, arrays)], [*map(block, shapes)]
            params = None
        run = pallas.pallas_call(
            kernel, shapes, in_specs=specs[0], out_specs=specs[1],
            grid=(pallas.cdiv(self.count, self.height),), compiler_params=params, interpret=self.interpret,
        )  # fmt: skip
        made = run(jax.random.key_data(keys).reshape(-1), *arrays)
        return [x.reshape(y.shape) for x, y in zip(made, out, strict=True)]
