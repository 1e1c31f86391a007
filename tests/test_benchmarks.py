"""The benchmarks compare like with like, and report what was measured in a run."""

import functools
import inspect
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

import accelerators
import bandwidth
import compare
import compile as compiling
import memory
import quantizers
import relaxit_jax as rj
import scaling
import speed
import table
import timing
import variance
from rows import ROWS, K
from versions import versions

pytestmark = [pytest.mark.usefixtures("fast_compilation"), pytest.mark.whole]


def test_every_sampler_is_measured():
    samplers = {
        name for name in rj.__all__
        if callable(f := getattr(rj, name)) and next(iter(inspect.signature(f).parameters)) == "key"
    }  # fmt: skip
    measured = {re.sub("_(hard|full)$", "", name) for name in ROWS}
    assert samplers - {"stochastic_beam_search"} == measured  # which takes a model


@functools.partial(jax.jit, static_argnums=0)
def draws_and_gradients(draw, key, logits, weights):
    """4,000 draws, and the gradient in the logits of a quadratic function of each."""

    def one(key):
        z, pull = jax.vjp(lambda l: draw(key, l), logits)
        return z, pull(weights * (1 + z.astype(jnp.float32)).astype(z.dtype))[0]

    return jax.vmap(one)(jax.random.split(key, 4000))


@pytest.mark.parametrize("name", ROWS)
def test_the_line_by_hand_is_the_same_method(name):
    """Its draws have the same mean, and so do its gradients, for a quadratic function."""
    row = ROWS[name]
    logits = 0.7 * jax.random.normal(jax.random.key(1), row.small)
    out = jax.eval_shape(row.ours, jax.random.key(0), logits)
    weights = jax.random.normal(jax.random.key(2), out.shape)
    for ours, by_hand in zip(
        draws_and_gradients(row.ours, jax.random.key(3), logits, weights),
        draws_and_gradients(row.by_hand, jax.random.key(4), logits, weights),
        strict=True,
    ):
        a, b = (np.asarray(x, np.float64).reshape(4000, -1) for x in (ours, by_hand))
        b = b[np.isfinite(b).all(-1)]  # relaxed_top_k gives NaN where a share rounds to 1
        assert len(b) > 3900 and np.abs(b).max() > 0
        error = np.sqrt((a.var(0) + b.var(0)) / len(b)) + 1e-6
        assert np.abs((a.mean(0) - b.mean(0)) / error).max() < 4.8


def test_turns_are_interleaved_and_timed(monkeypatch):
    """Only the functions move the clock: 2 and 6 milliseconds, in turns, and twice as slow later."""
    now, order = [0.0], []

    def work(name, seconds):
        def f():
            order.append(name)
            now[0] += seconds * (2 if len(order) > 30 else 1)

        return f

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    seconds = timing.interleaved({"a": work("a", 2e-3), "b": work("b", 6e-3)}, rounds=20)
    assert order[:4] == ["a", "a", "b", "b"]  # compiled, and tried once
    turns = ["".join(order[4 + 3 * i :][:3]) for i in range(20)]  # of 3 milliseconds at least, about
    assert set(turns) == {"aab", "baa"} and len(order) == 64
    np.testing.assert_allclose(timing.ratio(seconds, "b", "a")["ratio"], 3)  # slow turns are slow for both
    short = timing.interleaved({"a": work("a", 1.0)}, rounds=20, budget=8)
    assert len(short["a"]) == 5


def test_peak_memory_is_what_the_program_holds():
    x = jnp.zeros(1000)
    assert memory.peak(lambda x: x + 1, x) == 8000
    assert memory.peak(lambda x: jnp.sort(x * 2).sum(), x) >= 8000  # the sorted ones are kept


@pytest.mark.parametrize(
    "name", ["gumbel_top_k, k", "relaxed_top_k, k", "rloo, num_samples", "exact, outcomes"]
)
def test_memory_grows_as_the_docstring_says(name):
    row = memory.growth(name)
    assert row["admitted"] - 0.5 < row["exponent"] < row["admitted"] + 0.1


def test_exponents_are_those_of_powers():
    x = [2**i for i in range(8)]
    assert scaling.exponent(x, [5 * v**1.5 for v in x]) == pytest.approx(1.5)
    assert scaling.exponent(x, [max(v, 16) for v in x]) > 0.7  # the flat part counts for little
    assert memory.exponent((1, 2, 4), (9, 3, 12)) == pytest.approx(2)


def test_annealing_compiles_once():
    for name in ("gumbel_softmax", "relaxed_top_k"):
        assert compiling.compilations_of_training(compiling.ANNEALED[name], steps=5) == 1

    static = jax.jit(lambda key, l, tau: rj.gumbel_softmax(key, l, tau), static_argnums=2)
    key, l = jax.random.key(0), jnp.zeros(4)
    assert compiling.compilations(lambda: [static(key, l, tau) for tau in (1.0, 0.5, 0.5, 0.1)]) == 3


def report(**rows):
    """The part of a GradientReport that `variance` reads."""
    numbers = {name: dict(zip(("variance", "mse", "seconds", "biased"), row, strict=True))
               for name, row in rows.items()}  # fmt: skip
    for row in numbers.values():
        row |= {"calls": 1, "bias_norm": (row["mse"] - row["variance"]) ** 0.5}

    class Report(types.SimpleNamespace):
        def __getitem__(self, name):
            return numbers[name]

    return Report(names=tuple(rows), gradient=np.array([3.0, 4.0]))


def test_the_best_estimator_of_a_budget():
    """A biased one wins at the smallest budget, then one that is cheap, or one with little variance."""
    found = report(
        biased=(1.0, 5.0, 0.001, True), rloo=(100.0, 100.0, 0.01, False), dear=(10.0, 10.0, 0.05, False)
    )
    assert variance.best(found) == {"0.003": "biased", "0.03": "biased", "0.3": "dear", "3.0": "dear"}
    rows = variance.rows_of(found)
    assert rows["rloo"]["variance x seconds, to rloo"]["ratio"] == 1
    assert rows["dear"]["variance x seconds, to rloo"]["ratio"] == pytest.approx(0.5)
    assert rows["rloo"]["relative standard deviation"] == pytest.approx(2)  # 10 of |(3, 4)|
    assert rows["biased"]["relative bias"] == pytest.approx(0.4)


def test_speed_from_flags_to_files(tmp_path):
    flags = ["--only", "gumbel_softmax", "--size", "0", "--rounds", "5", "--budget", "0.1", "--out", tmp_path]
    done = CliRunner().invoke(speed.main, list(map(str, flags)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content["versions"] == versions()
    (size,) = content["rows"]["gumbel_softmax"].values()
    for dtype in ("float32", "bfloat16"):
        for which in ("forward", "forward + backward"):
            result = size[dtype][which]
            low, high = result["to hand-written JAX"]["quartiles"]
            assert 0 < low <= result["to hand-written JAX"]["ratio"] <= high
            assert result["milliseconds"]["random bits"] > 0
    goal = content["goals"]["to hand-written JAX"]
    assert goal["of"] == 4 and goal["met"] + len(goal["missed"]) == 4
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_bandwidth_is_what_moves_over_what_a_copy_moves(tmp_path, monkeypatch):
    """A pass moves 4 arrays in 2 ms, and a copy moves 2 MB in 1 ms: 4 x 4 kB / 2 ms of 4 GB/s."""
    times = {"ours": 2e-3, "hand-written JAX": 4e-3, "a copy": 1e-3}
    monkeypatch.setattr(bandwidth, "interleaved", lambda functions, *_, **__: {
        name: np.full(5, times[name]) for name in functions if f_runs(functions[name])
    })  # fmt: skip
    flags = ["--batch", "10", "--classes", "100", "--copy-megabytes", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(bandwidth.main, flags, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    row = json.loads((tmp_path / "bandwidth.json").read_text())["rows"]["gumbel_softmax"]["10 x 100"]
    limit = 2 * 2**21 / 1e-3
    assert row["float32"]["copy, gigabytes a second"] == round(limit / 1e9, 1)
    assert row["float32"]["ours"]["share"] == round(4 * 4000 / 2e-3 / limit, 3)
    assert row["bfloat16"]["hand-written JAX"]["share"] == round(4 * 2000 / 4e-3 / limit, 3)


def test_quantizers_end_with_one_line_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    done = CliRunner().invoke(quantizers.main, [], catch_exceptions=False)
    assert done.exit_code == 0
    assert re.fullmatch(r"vector_quantize_pytorch is left out: .*'\.\[peers\]' has it\n", done.output)


def f_runs(f):
    jax.block_until_ready(f())
    return True


def ratio(value, low=None, high=None):
    return {"ratio": value} | ({"quartiles": [low, high]} if low else {})


def test_compare_prints_what_became_slower(tmp_path):
    old = {"versions": {"jax": "1"}, "x": {"y": ratio(1.0, 0.9, 1.1), "z": ratio(2.0)}, "gone": ratio(1)}
    new = {"versions": {"jax": "2"}, "x": {"y": ratio(1.3, 1.05, 1.4), "z": ratio(2.39)}, "new": ratio(9)}
    assert compare.slower(old, new, 0.2) == [(("x", "y"), 1.0, 1.3, True)]
    assert [row[0] for row in compare.slower(old, new, 0.1)] == [("x", "y"), ("x", "z")]
    assert compare.slower(new, old, 0.2) == []
    paths = [tmp_path / "old.json", tmp_path / "new.json", tmp_path / "none.json"]
    for path, content in zip(paths, (old, new, {"x": 1}), strict=True):
        path.write_text(json.dumps(content))
    run = lambda a, b: CliRunner().invoke(compare.main, [str(paths[a]), str(paths[b])])
    done = run(0, 1)
    assert done.exit_code == 1 and "+30%  1 -> 1.3  x / y  (their quartiles overlap" in done.output
    assert "note: jax was 1 and is 2" in done.output and "1 of 2 ratios" in done.output
    assert run(0, 0).exit_code == 0
    assert "no ratio in common" in run(0, 2).output
    paths[2].write_text("not JSON")
    assert "is no JSON" in run(0, 2).output


@pytest.mark.parametrize("page", table.TABLES)
def test_tables_are_those_of_the_results(page):
    text = (table.ROOT / page).read_text()
    assert table.filled(text, table.TABLES[page]) == text, "run python benchmarks/table.py"


def test_a_table_has_the_ratios():
    speed, epochs = table.read("speed"), table.read("training")["epochs"]
    by_size = speed["rows"]["gumbel_softmax"]
    ratios = [f"{size['float32'][table.PASS][table.HAND]['ratio']:.2f}" for size in by_size.values()]
    joined = ",\N{NO-BREAK SPACE}".join(ratios)
    assert f"| `gumbel_softmax` | {joined} |" in table.samplers()
    assert "| `logistic_normal`, full |" in table.samplers() and "- |" in table.samplers()
    rebar = f"| `rebar` | {epochs['rebar']['milliseconds']:.0f} |"
    assert rebar in table.epochs() and "PyTorch rebar" not in table.epochs() and K == 5


PROGRAM = """HloModule jit_f, num_partitions=1

%body.1 (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state = (s32[], f32[4,8]{1,0}) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=1
  %step = f32[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused.1
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%x, %step)
}

ENTRY %main.2 (logits: bf16[4,8]) -> (f32[4], f32[4,8]) {
  %logits = bf16[4,8]{1,0} parameter(0)
  %start = f32[4,8]{1,0} fusion(%logits), kind=kInput, calls=%fused.2
  %ahead = (f32[4,8]{1,0}, f32[4,8]{1,0:S(1)}, u32[]) copy-start(%start)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %both = (f32[4]{0}, f32[4,8]{1,0}) fusion(%start), kind=kInput, calls=%fused.3
}
"""


def test_bytes_of_a_program_are_those_of_its_kernels():
    """Loops count as often as they turn; copies ahead of time, parameters and tuples cost nothing."""
    assert accelerators.kernels(PROGRAM) == [
        ("start", 1, 64, 128), ("step", 3, 128, 128), ("both", 1, 128, 144),
    ]  # fmt: skip


def test_a_described_device_is_written_as_its_compiler_reads_it():
    assert accelerators.text_of({"a": "b", "c": {"d": 1, "e": 2.5}}) == 'a: "b" c: { d: 1 e: 2.5 }'


@pytest.mark.parametrize("name", ROWS)
def test_no_program_for_a_gpu_asks_whether_numbers_are_finite(name):
    """XLA's compiler for GPUs ends a kernel there, so that logits and noise go through memory once more."""
    draw, logits = ROWS[name].ours, jnp.zeros((5, *ROWS[name].small))
    gradient = jax.grad(lambda logits, key: jnp.sum(jnp.cos(draw(key, logits))))
    for f, arguments in ((draw, (jax.random.key(0), logits)), (gradient, (logits, jax.random.key(0)))):
        program = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo" in program
        assert not re.search(r"is_finite.*tensor<\d+x", program)
