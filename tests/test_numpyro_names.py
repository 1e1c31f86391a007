"""The parts of NumPyro that `relaxit_jax/_numpyro.py` uses: each test fails if a release changes one."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import cond, scan
from numpyro.infer.autoguide import AutoGuide, AutoNormal
from numpyro.primitives import Messenger

from relaxit_jax import _numpyro as npr

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("fast_compilation")
CHANGED = f"NumPyro {numpyro.__version__} changed"


class Seen(Messenger):
    """Record what a function returns for each message."""

    def __init__(self, fn, note):
        self.note, self.found = note, []
        super().__init__(fn)

    def process_message(self, msg):
        self.found.append(self.note(msg))

    def postprocess_message(self, msg):
        self.found.append(self.note(msg))


def normal(name="x", **options):
    return numpyro.sample(name, dist.Normal(0, 1), **options)


def seen(fn, note, *args):
    messenger = Seen(handlers.seed(fn, KEY), note)
    messenger(*args)
    return messenger.found


def test_handlers_are_in_one_list_from_the_outside_in():
    """Read by `active_handlers`."""
    outer, inner = Messenger(), Messenger()
    with outer, inner:
        found = list(npr.active_handlers())
    assert found[:2] == [inner, outer], f"{CHANGED} its stack of handlers"
    assert outer not in npr.active_handlers()


def test_replay_hands_on_the_values_of_the_trace_themselves():
    """Read by `replayed_site`."""
    guide = handlers.trace(handlers.seed(normal, KEY)).get_trace()
    with handlers.replay(trace=guide):
        value = handlers.seed(normal, KEY)()
        assert npr.replayed_site(value) is guide["x"], f"{CHANGED} how replay hands on a value"
        assert npr.replayed_site(value + 0) is None


def test_replay_copies_the_infer_of_the_guides_site():
    """Read by `OnReplay`."""
    called = []
    trace = handlers.trace(handlers.seed(normal, KEY)).get_trace()
    trace["x"]["infer"] = npr.OnReplay({"a": 1}, lambda: called.append(True))
    trace["x"]["infer"].copy()
    assert not called  # outside replay
    handlers.seed(handlers.replay(normal, trace=trace), KEY)()
    assert called, f"{CHANGED} how replay hands on what a site infers by"


def step(carry, x):
    return carry, normal("z")


def test_control_flows_are_messages_of_two_wrappers():
    """Read by `runs_scan`, `runs_cond`, `wrap_scan_body` and `comes_from_flow`."""
    branches = (lambda _: normal("z"), lambda _: normal("z"))
    for model, which in (
        (lambda: scan(step, 0.0, jnp.arange(3.0)), npr.runs_scan),
        (lambda: cond(True, *branches, None), npr.runs_cond),
    ):
        flows = seen(model, lambda msg: msg["type"] == "control_flow" and msg["fn"])
        assert any(which(fn) for fn in flows if fn), f"{CHANGED} the wrappers of scan and cond"
        done = seen(model, lambda msg: msg["type"] == "sample" and npr.comes_from_flow(msg))
        assert any(done), f"{CHANGED} how sites come out of a control flow"
    assert not any(seen(normal, npr.comes_from_flow))


def test_the_body_of_a_scan_is_its_first_argument():
    """Read by `wrap_scan_body`: inside the body handlers see each site without the steps' axis."""
    shapes = []

    def inside(body):
        return Seen(body, lambda msg: msg["type"] == "sample" and shapes.append(msg["fn"].batch_shape))

    class Around(Messenger):
        def process_message(self, msg):
            if msg["type"] == "control_flow" and npr.runs_scan(msg["fn"]):
                npr.wrap_scan_body(msg, inside)

    model = lambda: scan(step, 0.0, jnp.arange(3.0))
    handlers.seed(Around(model), KEY)()
    assert () in shapes, f"{CHANGED} the arguments of a scan"


def test_replay_hands_values_to_a_reversed_scan_in_the_wrong_order():
    """Read by `is_reverse` and `require_right_order`, which can be removed if this fails."""
    flows = []
    for reverse in (False, True):
        model = lambda reverse=reverse: scan(step, 0.0, jnp.arange(3.0), reverse=reverse)[1]
        guide = handlers.trace(handlers.seed(model, KEY)).get_trace()
        replayed = handlers.seed(handlers.replay(model, trace=guide), KEY)()
        drawn = np.asarray(guide["z"]["value"])
        np.testing.assert_array_equal(replayed, drawn[::-1] if reverse else drawn, err_msg=CHANGED)
        flows += seen(model, lambda msg: msg["type"] == "control_flow" and npr.is_reverse(msg))
    assert set(flows) == {False, True}, f"{CHANGED} the arguments of a scan"


def test_a_step_of_a_scan_is_told_its_index_under_replay():
    """Read by `scan_index`."""
    model = lambda: scan(step, 0.0, jnp.arange(3.0))
    guide = handlers.trace(handlers.seed(model, KEY)).get_trace()
    indices = []

    class Inside(Messenger):
        def postprocess_message(self, msg):
            if msg["type"] == "sample":
                indices.append(npr.scan_index(msg["infer"]))

    class Around(Messenger):
        def process_message(self, msg):
            if msg["type"] == "control_flow" and npr.runs_scan(msg["fn"]):
                npr.wrap_scan_body(msg, Inside)

    with handlers.replay(trace=guide):
        handlers.seed(Around(model), KEY)()
    assert any(index is not None for index in indices), f"{CHANGED} what a step of a scan is told"


def test_obs_mask_is_split_by_one_function():
    """Read by `is_within_obs_mask`."""
    mask = jnp.array([True, False])
    model = lambda: numpyro.sample("x", dist.Normal(0, 1).expand([2]), obs=jnp.ones(2), obs_mask=mask)
    found = seen(model, lambda msg: (msg["name"], npr.is_within_obs_mask()))
    for half in ("x_observed", "x_unobserved"):
        assert (half, True) in found, f"{CHANGED} how a partly observed site is split"
    assert not any(seen(normal, lambda msg: npr.is_within_obs_mask()))


def test_traces_are_checked_as_numpyro_checks_them():
    """Read by `validate_model`."""

    def model():
        with numpyro.plate("rows", 3):
            normal(obs=jnp.ones(2))

    trace = {"x": {
        "type": "sample", "name": "x", "is_observed": True, "value": jnp.ones((2, 3)), "infer": {},
        "fn": dist.Normal(jnp.zeros((2, 3)), 1), "cond_indep_stack": [],
    }}  # fmt: skip
    with pytest.warns(UserWarning, match="plate"):
        npr.validate_model(trace, plate_warning="strict")


@pytest.mark.parametrize(
    "use",
    [
        lambda z: jnp.arange(3)[z],
        lambda z: np.arange(3)[z],
        lambda z: [1, 2, 3][z],
        lambda z: jnp.take(jnp.arange(3), z),
        lambda z: np.eye(3)[z],
        lambda z: range(z),
    ],
)
@pytest.mark.parametrize("traced", [True, False])
def test_a_vector_of_floats_as_an_index_is_an_error_that_is_recognized(use, traced):
    """Read by `is_used_as_index`: of JAX, NumPy and Python."""
    weights = jnp.array([0.2, 0.3, 0.5])
    with pytest.raises((TypeError, IndexError, ValueError)) as error:
        (jax.jit(use) if traced else use)(weights)
    assert npr.is_used_as_index(error.value), f"{CHANGED} or JAX what it says of an index: {error.value}"
    assert not npr.is_used_as_index(ValueError("shapes do not match"))


def test_automatic_guides_have_the_parts_that_auto_mean_field_fills():
    """Of `AutoGuide`: plates by the frames of the model, made by `_create_plates`."""
    guide = AutoNormal(normal)
    assert {"prototype_trace", "_prototype_frames", "_prototype_frame_full_sizes"} <= vars(guide).keys(), (
        f"{CHANGED} the attributes of AutoGuide"
    )
    assert AutoGuide._create_plates and AutoGuide._setup_prototype and AutoGuide.__getstate__
    calls = []
    guide.create_plates = lambda *args: calls.append(args) or []
    handlers.seed(guide, KEY)()
    assert calls, f"{CHANGED} how a guide makes its plates"
