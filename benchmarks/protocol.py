"""The fixed protocol: 20 latents, 784-400-20-400-784 with ReLU, 4,000 training and 1,000 test images.

Each entry is one run of examples/vae.py without its augmentation, schedule and learned prior. The number
compared is the test negative ELBO of the discrete model, in nats. `better` is the better of two measurements
to reach: the PyTorch predecessor's and a plain JAX prototype's.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import click
import numpy as np
from tqdm import tqdm

from records import RESULTS, write

VAE = pathlib.Path(__file__).parents[1] / "examples" / "vae.py"
PROTOCOL = ["--data", "mnist5k", "--hidden", "400", "--latents", "20", "--activation", "relu"]
PROTOCOL += ["--learning-rate", "0.001", "--schedule", "constant", "--batch-size", "128"]
PROTOCOL += ["--no-augment", "--prior", "fixed"]
ROWS = {  # name: (flags, the number to reach)
    "relaxed_bernoulli, tau 0.5": ("--method relaxed_bernoulli --tau 0.5", 132.2),
    "relaxed_bernoulli, tau 0.1": ("--method relaxed_bernoulli --tau 0.1", 133.6),
    "relaxed_bernoulli_hard, tau 0.5": ("--method relaxed_bernoulli_hard --tau 0.5", 132.5),
    "hard_concrete, tau 0.66": ("--method hard_concrete --tau 0.66", 131.6),
    "straight_through_bernoulli": ("--method straight_through_bernoulli", 136.6),
    "correlated_bernoulli R = I, tau 0.5": ("--method correlated_bernoulli --tau 0.5", 129.6),
    "correlated_bernoulli R = I, tau 0.1": ("--method correlated_bernoulli --tau 0.1", 133.6),
    "stochastic_times_smooth": ("--method stochastic_times_smooth --no-centre", 177.9),
    "correlated_bernoulli R learned": ("--method correlated_bernoulli --tau 0.5 --correlation learned", None),
    "gaussian_bernoulli": ("--method gaussian_bernoulli", None),
    "gumbel_softmax, 20 of 10": ("--method gumbel_softmax --tau 0.5", None),
    "gumbel_softmax_hard, 20 of 10": ("--method gumbel_softmax_hard --tau 0.5", None),
    "invertible_gaussian, 20 of 10": ("--method invertible_gaussian --tau 1", None),
    "relaxed_top_k, 10 of 20": ("--method relaxed_top_k --tau 0.5", None),
    "disarm": ("--method disarm", 131.0),
    "rebar": ("--method rebar", 132.8),
    **{name: (f"--method {name}", None) for name in ("reinforce", "rloo", "arm", "arms", "vimco", "relax")},
    **{
        f"{name}, 20 of 10": (f"--method {name}_categorical", None)
        for name in ("reinforce", "rloo", "arms", "rebar", "relax")
    },
}


def picked(name, only):
    """Select by whole name, or by a part of it that is not the whole name of another."""
    return name in only or any(part in name for part in only if part not in ROWS)


@click.command(context_settings={"show_default": True})
@click.option("--epochs", type=click.IntRange(min=1), default=50, help="Number of epochs of each run.")
@click.option(
    "--only", multiple=True, help="Run only methods with this in their name; the others keep their results."
)
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Number of runs of each method.")
def main(epochs, seeds, only):
    """Train every method under the fixed protocol and print its test negative ELBO."""
    before = RESULTS / "protocol.json"
    table = json.loads(before.read_text())["test_negative_elbo"] if only and before.exists() else {}
    rows = {name: row for name, row in ROWS.items() if not only or picked(name, only)}
    for name, (flags, target) in tqdm(rows.items(), unit="method"):
        values, seconds = [], []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, VAE, *flags.split(), *PROTOCOL, "--epochs", epochs]
                command += ["--seed", seed, "--out", folder]
                subprocess.run([*map(str, command)], check=True, capture_output=True)
                metrics = json.loads((pathlib.Path(folder) / "metrics.json").read_text())
            values.append(round(metrics["test_negative_elbo"], 2))
            seconds.append(metrics["timing"]["seconds_per_epoch"])
        table[name] = {
            "negative_elbo": values, "mean": round(float(np.mean(values)), 2), "better": target,
            "seconds_per_epoch": round(float(np.median(seconds)), 3),
        }  # fmt: skip
        tqdm.write(f"{name:36} {table[name]}")
    write("protocol", {"epochs": epochs, "test_negative_elbo": table})


if __name__ == "__main__":
    main()
