"""`unrounded` carries what rounding loses; `relax` says what it cannot do."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from cases import DISTRIBUTIONS
from relaxit_jax import distributions as rd
from relaxit_jax.handlers import AutoMeanField, marginals, relax, take, unrounded

KEY = jax.random.key(20261122)
pytestmark = pytest.mark.usefixtures("fast_compilation")
ELBOS = [Trace_ELBO(num_particles=3), TraceMeanField_ELBO(num_particles=3), TraceGraph_ELBO(num_particles=3)]
CONTINUOUS = [case for case in DISTRIBUTIONS if case.support in ("unit", "simplex", "gate") and case.log_prob]
MASK = np.arange(20).reshape(10, 2) % 3 > 0


def losses(handle, prior, params, mask=MASK):
    """The loss and its gradient under every ELBO, for a guide that equals the prior."""

    def site(d):
        with numpyro.plate("outer", 10, dim=-2), numpyro.plate("inner", 2, dim=-1):
            numpyro.sample("z", d.expand([10, 2]).mask(mask))

    def loss(params, elbo):
        scaled = lambda p: handlers.scale(handle(lambda: site(prior(p))), 100.0)()
        return elbo.loss(KEY, {}, lambda: scaled(fixed), lambda: scaled(params))

    fixed = params
    return [jax.value_and_grad(loss)(params, elbo) for elbo in ELBOS]


@pytest.mark.few(1)
@pytest.mark.parametrize("case", CONTINUOUS, ids=str)
def test_guide_equal_to_prior_costs_nothing_at_low_temperature(case):
    """In masked plates, scaled by 100, at tau = 0.01, every ELBO has loss 0 and finite gradients."""
    params = {n: jnp.asarray(x) for n, x in case.floats.items()}
    if "tau" in params:
        params["tau"] = jnp.full((2,), 0.01)
    elif "scale" in params and case.support == "simplex":  # of draws that round to vertices as well
        params["scale"] = 100 * params["scale"]
    prior = lambda p: case.build(**p, validate_args=True)
    for value, gradients in jax.jit(lambda p: losses(unrounded, prior, p))(params):
        scale = 100 * MASK.sum() * 20  # of what is subtracted
        assert abs(value) < 1e-6 * scale
        for name, gradient in gradients.items():
            assert jnp.isfinite(gradient).all(), name


@pytest.mark.whole
def test_without_the_handler_it_costs_a_lot():
    """NumPyro's own class has this loss too; here the rounded draws of guide and prior disagree."""
    logits = jnp.array([0.3, -0.7])
    own = lambda logits: rd.RelaxedBernoulli(logits=logits, tau=0.01)
    for prior in (own, lambda logits: dist.RelaxedBernoulliLogits(0.01, logits)):
        (value, _), *_ = jax.jit(lambda p, prior=prior: losses(lambda f: f, prior, p, True))(logits)
        assert not abs(value) < 1000
    relaxed = lambda f: relax(f, tau=0.01, kl="relaxed")
    bernoulli = lambda logits: dist.Bernoulli(logits=logits)
    for value, _ in jax.jit(lambda p: losses(relaxed, bernoulli, p))(logits):
        assert abs(value) < 1


@pytest.mark.whole
def test_a_draw_of_another_kind_is_scored_by_its_value():
    """The unrounded draw of a hard concrete gate is before stretching: of no use to another class."""
    kinds = [
        lambda: rd.HardConcrete(logits=0.0, tau=0.5),
        lambda: rd.HardConcrete(logits=0.0, tau=0.5, stretch=(-0.2, 1.2)),
        lambda: rd.RelaxedBernoulli(logits=0.0, tau=0.5),
    ]  # fmt: skip
    for guide, model in itertools.permutations(kinds, 2):
        run = lambda kind: unrounded(lambda: numpyro.sample("z", kind()))
        drawn = handlers.trace(handlers.seed(run(guide), 3)).get_trace()
        scored = handlers.trace(handlers.replay(run(model), drawn)).get_trace()["z"]
        law = scored["fn"].log_prob(scored["value"], scored["intermediates"])
        np.testing.assert_allclose(law, model().log_prob(drawn["z"]["value"]), rtol=1e-4)


@pytest.mark.whole
def test_masks_outside_of_the_handler():
    def prior():
        with numpyro.plate("n", 4):
            numpyro.sample("z", rd.GumbelSoftmax(logits=jnp.zeros(3), tau=0.01))

    mask = np.array([True, False, True, True])
    wrapped = handlers.mask(unrounded(prior), mask=mask)
    for loss in jax.jit(lambda key: [elbo.loss(key, {}, wrapped, wrapped) for elbo in ELBOS])(KEY):
        assert abs(loss) < 1e-3
    drawn = handlers.trace(handlers.seed(wrapped, 0)).get_trace()["z"]
    law = drawn["fn"].log_prob(drawn["value"], drawn["intermediates"])
    own = rd.GumbelSoftmax(logits=jnp.zeros((4, 3)), tau=0.01).log_prob(
        drawn["value"], drawn["intermediates"]
    )
    np.testing.assert_array_equal(law, np.where(mask, own, 0))


@pytest.mark.few(1)
@pytest.mark.parametrize("handle", [unrounded, functools.partial(relax, tau=0.5)], ids=["unrounded", "relax"])
def test_masks_inside_and_outside_of_the_handler_both_count(handle):
    """An element is scored where both masks allow it: masked pieces have the losses of their elements."""
    relaxed = handle is unrounded
    logits, other = jnp.linspace(-1, 1, 4), jnp.linspace(2, -1, 4)
    inner, outer = jnp.array([True, True, False, False]), jnp.array([True, False, True, False])

    def site(logits, mask):
        law = rd.RelaxedBernoulli(logits=logits, tau=0.5) if relaxed else dist.Bernoulli(logits=logits)
        with numpyro.plate("n", 4), handlers.mask(mask=mask):
            numpyro.sample("z", law)

    def loss(inner, outer):
        wrapped = [handlers.mask(handle(lambda x=x: site(x, inner)), mask=outer) for x in (other, logits)]
        return Trace_ELBO().loss(KEY, {}, *wrapped)

    np.testing.assert_allclose(loss(inner, outer), loss(inner & outer, True), rtol=1e-5)
    assert abs(loss(inner, outer) - loss(inner, True)) > 1e-3 < abs(loss(inner, outer) - loss(True, outer))


# --- scan -------------------------------------------------------------------------------------

MOVES = np.log(np.array([[0.7, 0.3], [0.2, 0.8]], np.float32))


def chain(body=lambda f: f):
    def step(before, y):
        z = numpyro.sample("z", dist.Categorical(logits=take(MOVES, before)))
        return z, z

    first = numpyro.sample("first", dist.Categorical(logits=jnp.zeros(2)))
    scan(body(step), first, jnp.zeros(5))


@pytest.mark.few(1)
@pytest.mark.parametrize("kl", ["discrete", "relaxed"])
@pytest.mark.parametrize("wrap", ["whole", "body"])
def test_scan_carries_every_step(kl, wrap):
    """A guide that equals the prior costs nothing, also with the unrounded densities at tau = 0.01."""
    soft = functools.partial(relax, tau=0.01, kl=kl)
    if wrap == "whole":  # a site inside the scan is one of the model's
        soft = functools.partial(soft, config={"z": "relaxed", "first": "relaxed"})
    whole = soft(chain) if wrap == "whole" else soft(functools.partial(chain, soft))
    other = soft(functools.partial(shifted, soft))

    @jax.jit
    def compiled(key):
        return [[elbo.loss(key, {}, whole, guide) for elbo in ELBOS[:2]] for guide in (whole, other)]

    itself, shifts = np.array(compiled(KEY))
    assert (np.abs(itself) < 1e-3).all()
    assert (shifts > 0.5).all()  # and a guide that is not the prior does


def shifted(body):
    def step(before, y):
        z = numpyro.sample("z", dist.Categorical(logits=take(MOVES[::-1], before)))
        return z, z

    first = numpyro.sample("first", dist.Categorical(logits=jnp.array([1.0, 0.0])))
    scan(body(step), first, jnp.zeros(5))


@pytest.mark.whole
def test_scan_scores_by_the_guide_of_the_same_step():
    """The KL of a chain with a mean-field guide, each of whose steps has its own law."""
    q = jax.nn.log_softmax(jnp.linspace(-2, 2, 10).reshape(5, 2))
    prior = jnp.log(jnp.array([0.3, 0.7]))

    def model():
        scan(lambda c, x: (c, numpyro.sample("z", dist.Categorical(logits=prior))), 0.0, jnp.zeros(5))

    guide = lambda: numpyro.sample("z", dist.Categorical(logits=q))
    expected = jnp.sum(jnp.exp(q) * (q - prior))
    for elbo in ELBOS[:2]:
        loss = elbo.loss(KEY, {}, relax(model, tau=0.3), relax(guide, tau=0.3))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


# --- refusals -----------------------------------------------------------------------------------


def bits():
    return numpyro.sample("z", dist.Bernoulli(0.3))


def classes():
    return numpyro.sample("z", dist.Categorical(np.array([0.2, 0.3, 0.5])))


def loss(model, guide, elbo=ELBOS[0]):
    return jax.jit(lambda key: elbo.loss(key, {}, model, guide))(KEY)


@pytest.mark.parametrize("elbo", ELBOS, ids=lambda elbo: type(elbo).__name__)
@pytest.mark.parametrize("site", [bits, classes])
def test_only_one_of_model_and_guide_relaxed(site, elbo):
    soft = relax(site, tau=0.5)
    with pytest.raises(ValueError, match="relaxed in the guide, not in the model: wrap the model"):
        loss(site, soft, elbo)
    with pytest.raises(ValueError, match="'z' is relaxed in the model, not in the guide: wrap the guide"):
        loss(soft, site, elbo)


def test_other_guides_that_do_not_fit():
    with pytest.raises(
        ValueError, match="'z' must be relaxed in the same way in model and guide, got kl='discrete'"
    ):
        loss(relax(bits, tau=0.5), lambda: numpyro.sample("z", rd.RelaxedBernoulli(logits=0.0, tau=0.5)))
    with pytest.raises(
        ValueError, match="'z' must be relaxed in the same way in model and guide, got kl='relaxed'"
    ):
        loss(relax(bits, tau=0.5, kl="relaxed"), relax(bits, tau=0.5))
    soft = relax(bits, tau=0.5, kl="relaxed")
    with pytest.raises(ValueError, match="'z' has a point estimate in the guide"):
        loss(soft, lambda: numpyro.sample("z", dist.Delta(0.4)))
    count = lambda: numpyro.sample("z", dist.Poisson(3.0))
    with pytest.raises(ValueError, match="num_values must be the same for the model and the guide"):
        loss(relax(count, tau=0.5), relax(count, tau=0.5, num_values=5))


def test_conditioned_after_relaxed():
    with pytest.raises(ValueError, match=r"write relax\(condition\(model, data\)\)"):
        handlers.seed(handlers.condition(relax(bits, tau=0.5), {"z": 1.0}), 0)()
    fine = handlers.trace(handlers.seed(relax(handlers.condition(bits, {"z": 1}), tau=0.5), 0)).get_trace()
    assert fine["z"]["is_observed"] and fine["z"]["value"] == 1


INDEXED = {
    "jax": lambda z: jnp.arange(3.0)[z],
    "numpy": lambda z: np.arange(3.0)[z],
    "take": lambda z: jnp.take(jnp.arange(3.0), z),
    "list": lambda z: [1.0, 2.0, 3.0][z],
}


@pytest.mark.parametrize("how", INDEXED)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_relaxed_categorical_is_no_index(how, compiled):
    soft = relax(lambda: INDEXED[how](classes()), tau=0.5)
    run = lambda key: handlers.seed(soft, key)()
    with pytest.raises(TypeError, match=r"relaxed here: 'z'.*take\(table, z\)"):
        (jax.jit(run) if compiled else run)(KEY)
    with pytest.raises(TypeError) as other:  # what has nothing to do with it is left as it was
        handlers.seed(relax(lambda: (classes(), None + 1), tau=0.5), 0)()
    assert "take(table, z)" not in str(other.value)


BAD = [
    ({"tau": 0.0}, "tau must be positive"),
    ({"tau": np.ones(2)}, "tau must be a scalar"),
    ({"tau": 0.5, "method": "soft"}, "method must be one of 'relaxed', 'straight_through' or a class"),
    ({"tau": 0.5, "method": dist.Normal}, "method must be one of"),
    ({"tau": 0.5, "method": rd.InvertibleGaussian}, "method must be one of"),
    ({"tau": 0.5, "config": {"z": 3}}, r"config\['z'\] must be one of"),
    ({"tau": 0.5, "kl": "exact"}, "kl must be 'discrete' or 'relaxed'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        relax(bits, **options)


def traced_rate(rate):
    return handlers.seed(relax(lambda: numpyro.sample("n", dist.Poisson(rate)), tau=0.5), 0)()


NOT_DISCRETE = {
    "a number": lambda: dist.Normal(0.0, 1.0),
    "with a mask": lambda: dist.Normal(0.0, 1.0).mask(True),
    "a subset": lambda: rd.SimpleTopK(logits=jnp.zeros(3), k=1),
    "relaxed already": lambda: rd.RelaxedBernoulli(logits=0.0, tau=0.5),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", NOT_DISCRETE)
def test_a_method_for_a_site_that_is_not_discrete_is_refused(kind):
    def model(**given):
        return numpyro.sample("z", NOT_DISCRETE[kind](), **given)

    options = {"tau": 0.5, "config": {"z": "straight_through"}}
    soft = relax(model, **options)
    with pytest.raises(ValueError, match=r"config\['z'\] must be None or left out: relax leaves"):
        handlers.seed(soft, 0)()
    inner = handlers.substitute(model, {"z": jnp.ones(3)})
    for other in (relax(model, tau=0.5, config={"z": None}), relax(inner, **options)):
        handlers.seed(other, 0)()
    handlers.seed(soft, 0)(obs=jnp.ones(3))
    with pytest.raises(ValueError, match=r"num_values\['z'\] must be left out, as relax leaves"):
        handlers.seed(relax(model, tau=0.5, num_values={"z": 3}), 0)()
    handlers.seed(relax(model, tau=0.5, num_values=3), 0)()
    for kl in ("discrete", "relaxed"):  # the inner one has relaxed the site
        again = functools.partial(relax, tau=0.5, kl=kl, config={"z": "relaxed"})
        assert 0 < handlers.seed(again(again(bits)), 0)() < 1


@pytest.mark.parametrize(
    "d", [dist.Bernoulli(0.3), dist.Bernoulli(logits=0.3), dist.Categorical(jnp.ones(3) / 3)]
)
def test_a_number_of_values_for_a_site_that_is_no_count_is_refused(d):
    """A dictionary names the site; a number is for the counts of the model, whatever its other sites are."""

    def model():
        return numpyro.sample("n", dist.Poisson(2.0)), numpyro.sample("z", d)

    own, k = {"n": 9, "z": 3}, len(d.enumerate_support())
    need = rf"num_values\['z'\] must be left out, as a .* has {k} values, got 3"
    with pytest.raises(ValueError, match=need):
        handlers.seed(relax(model, tau=0.5, num_values=own), 0)()
    with pytest.raises(ValueError, match=r"num_values\['z'\]"):
        handlers.seed(AutoMeanField(model, num_values=own), 0)()
    with pytest.raises(ValueError, match=r"num_values\['z'\]"):
        marginals(model, {}, num_values=own)
    for several in (9, {"n": 9}, {"n": 9, "z": None}):
        handlers.seed(relax(model, tau=0.5, num_values=several), 0)()
        assert marginals(model, {}, num_values=several)["n"].shape == (9,)


def test_bad_sites():
    def draw(d, **options):
        return handlers.seed(relax(lambda: numpyro.sample("z", d), tau=0.5, **options), 0)()

    with pytest.raises(
        ValueError, match="site 'z' must be a Multinomial with one trial to be relaxed, got 3"
    ):
        draw(dist.Multinomial(3, np.array([0.2, 0.8])))
    with pytest.raises(
        ValueError, match="kl must be 'discrete' for the site 'z', as GeneralizedGumbelSoftmax"
    ):
        draw(dist.Poisson(3.0), kl="relaxed")
    with pytest.raises(ValueError, match=r"kl must be 'discrete' for the site 'z'.*StraightThrough"):
        draw(dist.Bernoulli(0.3), kl="relaxed", method="straight_through")
    with pytest.raises(ValueError, match="num_values must be given for the site 'n', a Poisson whose"):
        jax.jit(traced_rate)(3.0)
    with pytest.raises(ValueError, match="config must be a relaxation of batch shape"):
        draw(dist.Categorical(np.array([0.2, 0.8])), config={"z": rd.RelaxedBernoulli})
    with pytest.raises(ValueError, match="method of the site 'z' must be one for a bit"):
        draw(dist.Bernoulli(0.3), config={"z": rd.GeneralizedGumbelSoftmax})
    with pytest.raises(ValueError, match=r"config must be names of the sites \['z'\], got 'zz'"):
        draw(dist.Bernoulli(0.3), config={"zz": rd.HardConcrete})
    with pytest.raises(ValueError, match="site 'z' must be observed, enumerated, or one of the discrete"):
        draw(Unknown())


def test_a_site_inside_of_cond():
    branch = lambda p: lambda _: numpyro.sample("z", dist.Bernoulli(p))
    inside = lambda: cond(jnp.array(True), branch(0.2), branch(0.4), None)
    with pytest.raises(ValueError, match="'z' is inside a cond"):
        handlers.seed(relax(inside, tau=0.5), 0)()
    assert handlers.seed(relax(inside, tau=0.5, config={"z": None}), 0)() in (0, 1)


class Unknown(dist.Distribution):
    support = dist.constraints.multinomial(3)

    def __init__(self):
        super().__init__((), (2,))


@pytest.mark.whole
@pytest.mark.parametrize(
    ("handle", "law"),
    [
        (functools.partial(relax, tau=0.5), dist.Bernoulli(0.3)),
        (unrounded, rd.HardConcrete(logits=0.3, tau=0.5)),
    ],
    ids=["relax", "unrounded"],
)
def test_rows_that_change_from_step_to_step_are_refused(handle, law):
    """Replay hands on the guide's values, while NumPyro draws new rows in each step for the model."""

    def model(subsample_size):
        def step(carry, _):
            with numpyro.plate("rows", 4, subsample_size=subsample_size):
                numpyro.sample("z", law)
            return carry, None

        scan(step, 0.0, jnp.arange(3))

    with pytest.raises(ValueError, match="site 'z' is in a subsampled plate inside a scan"):
        handlers.seed(handle(model), 0)(2)
    for whole in (None, 4):
        trace = handlers.trace(handlers.seed(handle(model), 0)).get_trace(whole)
        assert trace["z"]["value"].shape == (3, 4)
