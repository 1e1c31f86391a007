"""The Laplace Bridge in pictures: a Dirichlet, its logistic-normal, and the Dirichlet after the round trip.

The bridge is the Laplace approximation of the Dirichlet on the logits, so the middle picture differs from the
first where the Dirichlet is not Gaussian there; the way back is exact.
"""

import click
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import relaxit_jax as rj
from common import (
    SEED,
    FloatRange,
    out_option,
    output_folder,
    run,
    save_figure,
    versions,
    write_json,
)
from relaxit_jax.laplace_bridge import dirichlet_to_gaussian, gaussian_to_dirichlet

CORNERS = np.array([[0, 0], [1, 0], [0.5, 3**0.5 / 2]])


def simplex_grid(n):
    """Centers of those cells of an n by n grid over two coordinates that lie inside the simplex."""
    line = (np.arange(n) + 0.5) / n
    a, b = (x.ravel() for x in np.meshgrid(line, line))
    inside = a + b < 1 - 0.5 / n
    return np.stack([a, b, 1 - a - b], -1)[inside].astype(np.float32)


def draw_densities(path, points, densities):
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    highest = max(np.quantile(density, 0.995) for density in densities.values())
    levels = np.linspace(0, highest, 25)
    x, y = (points @ CORNERS).T
    for axis, (title, density) in zip(axes, densities.items(), strict=True):
        picture = axis.tricontourf(x, y, density, levels=levels, cmap="viridis", extend="max")
        axis.plot(*CORNERS[[0, 1, 2, 0]].T, color="black", lw=1)
        for k, (corner, place) in enumerate(zip(CORNERS, ["top", "top", "bottom"], strict=True)):
            axis.annotate(f"class {k + 1}", corner, ha="center", va=place, fontsize=9)
        axis.set_title(title, fontsize=10, pad=14)
        axis.set_aspect("equal")
        axis.set_axis_off()
    figure.colorbar(picture, ax=axes, shrink=0.7, label="density")
    save_figure(figure, path)


@click.command(context_settings={"show_default": True})
@click.option("--seed", type=SEED, default=0, help="Seed of the random concentration.")
@click.option(
    "--concentration",
    type=FloatRange(0.01, 1000),
    nargs=3,
    show_default=False,
    help="Concentration of the Dirichlet.  [default: random, between 1.2 and 7.4]",
)
@click.option("--grid", type=click.IntRange(20, 1000), default=200, help="Number of points along an edge.")
@out_option
def main(seed, concentration, grid, out):
    """Draw a Dirichlet, its logistic-normal from the Laplace Bridge, and the Dirichlet that returns."""
    if concentration is None:
        alpha = jnp.exp(jax.random.uniform(jax.random.key(seed), (3,), minval=0.2, maxval=2))
    else:
        alpha = jnp.array(concentration, jnp.float32)
    out = output_folder(out, "laplace_bridge")

    loc, covariance = dirichlet_to_gaussian(alpha)
    back = gaussian_to_dirichlet(loc, covariance)
    # softmax does not see the all-ones direction, along which the covariance is singular
    scale_tril = jnp.linalg.cholesky(covariance + jnp.mean(jnp.diag(covariance)))

    points = simplex_grid(grid)
    dirichlet = lambda alpha: jnp.exp(jax.scipy.stats.dirichlet.logpdf(points.T, alpha))
    normal = jnp.exp(rj.logistic_normal_log_prob(points, loc, scale_tril=scale_tril))
    show = lambda x: "(" + ", ".join(f"{float(a):.2f}" for a in x) + ")"
    densities = {
        f"Dirichlet{show(alpha)}": np.asarray(dirichlet(alpha)),
        f"logistic-normal of mean {show(loc)}": np.asarray(normal),
        f"back: Dirichlet{show(back)}": np.asarray(dirichlet(back)),
    }
    draw_densities(out / "densities.png", points, densities)

    distance = float(np.abs(normal - dirichlet(alpha)).sum() / 2 / grid**2)
    metrics = {
        "concentration": alpha.tolist(),
        "loc": loc.tolist(),
        "covariance": covariance.tolist(),
        "concentration_back": back.tolist(),
        "total_variation_dirichlet_to_logistic_normal": distance,
        "mass_on_the_grid": [float(density.sum() / grid**2) for density in densities.values()],
        "versions": versions(),
    }
    write_json(out / "metrics.json", metrics)
    click.echo(
        f"Dirichlet{show(alpha)} -> logistic-normal -> Dirichlet{show(back)}\n"
        f"total variation from the logistic-normal: {distance:.3f}\n"
        f"in {out}: densities.png, metrics.json"
    )


if __name__ == "__main__":
    run(main)
