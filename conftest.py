"""Names for the doctests, and faster compilation for the tests that ask for it."""

import collections
import functools
import gc
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import pytest

# How the workers of pytest-xdist compile: in half of the time, to code that is hardly slower; not all jaxlibs
# support each of these. And the settings that users get instead, for the tests that compile as they do.
CHEAP = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_disable_hlo_passes": "constant_folding",  # logits of a test are constants of its programs
}
DEFAULT = {
    "xla_cpu_use_fusion_emitters": True,
    "xla_disable_hlo_passes": "",
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}


def known(options):
    """The options that this jaxlib knows. Each is tried, since an unknown flag in XLA_FLAGS is fatal."""

    def is_known(name):
        try:
            jax.jit(lambda x: x, compiler_options={name: options[name]}).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if is_known(name)}


def pytest_addoption(parser):
    parser.addoption(
        "--all", action="store_true",
        help="Run every test. The default is the quick tier: no test marked `whole`, and of those marked "
        "`few` some cases; where files are named, all of them.",
    )  # fmt: skip
    parser.addoption("--quick", action="store_true", help="The quick tier, also of the files that are named.")
    parser.addoption(
        "--rest", action="store_true", help="Run every test that the quick tier leaves out or thins."
    )


WHOLE_MODULE = re.compile(r"^pytestmark = [^\n]*(\n    [^\n]*)*pytest\.mark\.whole", re.MULTILINE)


def pytest_ignore_collect(collection_path, config):
    """Skip modules without tests and, in the quick tier, those marked `whole`: importing takes seconds."""
    if collection_path.suffix != ".py" or collection_path in named(config):
        return None
    without = collection_path.parent.name == "tests" and not collection_path.name.startswith("test_")
    whole = config.option.quick and WHOLE_MODULE.search(collection_path.read_text())
    return True if without or whole else None


def named(config):
    return {pathlib.Path(argument.split("::")[0]).resolve() for argument in config.args}


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked `whole`, and most cases of what is marked `few`, unless --all is given."""
    if config.option.all:
        return
    tests = collections.defaultdict(list)
    for item in items:
        if not item.get_closest_marker("whole"):
            tests[item.nodeid.split("[")[0]].append(item)
    kept = set()
    for cases in tests.values():
        few = cases[0].get_closest_marker("few")
        number, *texts = few.args if few else [len(cases)]
        number = min(number, len(cases))
        kept.update(cases[i * len(cases) // number] for i in range(number))  # evenly spread
        kept.update(case for case in cases if any(text in case.name for text in texts))
    if config.option.rest:  # a test that reads the configuration does more in the whole
        kept = {item for item in items if item not in kept or "pytestconfig" in item.fixturenames}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_configure(config):
    """Share compiled programs between the workers of pytest-xdist and the processes of the examples."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:  # naming a file selects all of it
        config.option.all = not (config.option.quick or config.option.rest)
    config.option.quick = not (config.option.all or config.option.rest)
    if not config.getoption("numprocesses", None):
        return
    cheap = [f"--{name}={str(value).lower()}" for name, value in known(CHEAP).items()]
    os.environ["XLA_FLAGS"] = " ".join([*cheap, os.environ.get("XLA_FLAGS", "")])  # the last one counts
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # .ci/run sets it: its sessions share a folder
        cache = tempfile.TemporaryDirectory(prefix="relaxit_jax-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
        config.add_cleanup(cache.cleanup)
    # reading a program takes a fifth of compiling it, even for the smallest, which are most of them
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


before = pytest.StashKey[set]()
left_behind = pytest.StashKey[list]()


def files(root):
    """Files of the working tree, except caches of Python and tools, and names with a dot."""
    found = set()
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name[0] != "." and name != "__pycache__"]
        found.update(os.path.join(folder, name) for name in (*folders, *names) if name[0] != ".")
    return found


def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):  # xdist's workers end before the session does
        session.config.stash[before] = files(session.config.rootpath)


def pytest_sessionfinish(session):
    """Fail the session if a test leaves anything in the working tree."""
    if before in session.config.stash:
        new = sorted(files(session.config.rootpath) - session.config.stash[before])
        session.config.stash[left_behind] = new
        if new and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for path in config.stash.get(left_behind, []):
        terminalreporter.write_line(f"FAILED: {path} appeared while the tests ran", red=True)


compiled = 0  # since the caches were last emptied


def count_compilations(event, seconds, **_):
    global compiled
    compiled += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(count_compilations)


def pytest_runtest_teardown(item, nextitem):
    """JAX keeps the last two thousand programs that it lowered, which then takes it twice as long.

    Programs that other modules share with this one are in the cache on disk.
    """
    global compiled
    ends = nextitem is None or nextitem.path != item.path
    if compiled > (200 if ends else 800):
        jax.clear_caches()
        compiled = 0


@pytest.fixture
def fast_compilation():
    """Compiling is most of the time of these tests; no law depends on how well the code is optimized."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # for the processes that a test starts
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def pytest_collection():
    """Modules make arrays and small networks as they are imported, operation by operation."""
    jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_finish():
    """Modules and tests live to the end, and tracing makes many objects: do not look for garbage so often."""
    jax.config.update("jax_disable_most_optimizations", False)
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True)
def _doctests(request, doctest_namespace):
    """Give the doctests their names. They run operation by operation, and each operation is compiled."""
    doctest_namespace.update(jax=jax, jnp=jnp)
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("fast_compilation")


@pytest.fixture(scope="session")
def _defaults():
    return known(DEFAULT)


@pytest.fixture
def as_users_compile(fast_compilation, _defaults, monkeypatch, pytestconfig):
    """Let jax.jit compile as it does for users: optimization has brought defects to light.

    Code that runs operation by operation, where nothing can be fused, still compiles fast here; in the quick
    tier everything does.

    In test_samplers.py these are the agreement of jit, eager and vmap, the exact discrete laws and the laws
    at low temperatures, so all samplers; in test_densities.py, the densities of own draws, so all that have a
    form in log space; in test_estimators.py, the means of all estimators and their variances.
    """
    if not pytestconfig.option.quick:
        monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=_defaults))


@pytest.fixture
def for_accelerators(monkeypatch):
    """Compile and run a function in its form for GPUs, which this machine runs too."""

    def traced(function):
        def other(*args, default, **platforms):
            return platforms.get("cuda", default)(*args)

        def call(*args):
            with monkeypatch.context() as patch:
                patch.setattr(jax.lax, "platform_dependent", other)
                jax.clear_caches()  # functions that were traced in their form for CPUs
                result = jax.jit(function)(*args)
                jax.clear_caches()
            return result

        return call

    return traced
