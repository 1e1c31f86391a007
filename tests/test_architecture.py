"""The rules of the package: which module may import which, what is public, what a method has."""

import ast
import inspect
import pathlib
import subprocess
import sys

import relaxit_jax
from cases import CASES, DISTRIBUTIONS
from relaxit_jax import diagnostics, distributions, elbo, estimators, handlers, quantizers, structured

PACKAGE = pathlib.Path(relaxit_jax.__file__).parent
# of the package and of other libraries: what each module may import
FOUNDATIONS = {"_arguments", "_fused", "_gradients", "_math", "_placement", "_random"}
MODULES = {
    "_arguments": set(),
    "_placement": set(),
    "_math": {"_placement"},
    "_random": {"_math", "_placement"},
    "_gradients": {"_arguments", "_math", "_placement"},
    "_fused": {"_arguments", "_gradients", "_kernels", "_math", "_placement", "_random"},
    "_kernels": {"_fused", "_random"},
    "_numpyro": set(),
    "_terms": set(),
    "laplace_bridge": FOUNDATIONS,
    "samplers": FOUNDATIONS | {"samplers"},
    "structured": FOUNDATIONS | {"structured"},
    "estimators": FOUNDATIONS | {"samplers", "structured", "estimators"},
    "quantizers": FOUNDATIONS | {"quantizers"},
    "diagnostics": {"_arguments", "estimators", "diagnostics"},
    "distributions": FOUNDATIONS | {"samplers", "structured", "laplace_bridge", "distributions"},
    "handlers": FOUNDATIONS | {"_numpyro", "_terms", "samplers", "distributions", "elbo", "handlers"},
    "elbo": {"_arguments", "_math", "_numpyro", "_terms"},
}
STANDARD = {"__future__", "collections", "contextlib", "contextvars", "copy", "dataclasses", "functools"}
STANDARD |= {"inspect", "itertools", "math", "operator", "os", "re", "time", "typing", "warnings"}
PURE = {"jax", "numpy"} | STANDARD
NUMPYRO = {module: {"numpyro"} for module in ("_numpyro", "distributions", "elbo", "handlers")}
OTHERS = NUMPYRO | {"diagnostics": {"matplotlib"}}
SOLVERS = {"_permutation.py": {"optax", "scipy"}}  # of assignments, inside the functions that need them


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (
                f"{node.module}.{alias.name}" if node.module.startswith("relaxit_jax") else node.module
                for alias in node.names
            )


def modules():
    """Every file of the package, and the module or subpackage that it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module != "__init__":
            yield path, module


def test_modules_see_only_what_they_may():
    for path, module in modules():
        for name in imports(path):
            top, *rest = name.split(".")
            if top != "relaxit_jax":
                solvers = SOLVERS.get(path.name, set()) if module == "samplers" else set()
                assert top in PURE | OTHERS.get(module, set()) | solvers, f"{path.name} imports {name}"
            elif path.name != "__init__.py":
                assert rest[0] in MODULES[module], f"{path.name} imports {name}"


def test_private_names_of_numpyro_are_in_one_file():
    """If a release changes them, only one file needs a fix."""
    for path, module in modules():
        for name in imports(path):
            private = any(part.startswith("_") for part in name.split("."))
            assert module == "_numpyro" or not (name.startswith("numpyro") and private), f"{path}: {name}"


def test_files_are_named_by_what_is_in_them():
    """There is no file for leftovers. A class is in the file of its sampler's name, or with its kind."""
    assert not [path for path, _ in modules() if path.stem in ("_base", "_utils", "_common")]
    files = {module: {path.stem for path, m in modules() if m == module} for module in MODULES}
    assert files["samplers"] <= files["distributions"]
    for case in DISTRIBUTIONS:
        sampler, cls = (x.__module__.split(".")[-1] for x in (case.sampler, case.distribution))
        assert cls in (sampler, "_straight_through"), case.name


def test_examples_and_benchmarks_use_the_public_names_only():
    root = PACKAGE.parent
    for path in [*root.glob("examples/*.py"), *root.glob("benchmarks/*.py")]:
        for name in imports(path):
            assert not any(part.startswith("_") for part in name.split(".")), f"{path}: {name}"


def test_importing_the_package_does_not_import_numpyro():
    """Importing the samplers imports no other submodules, which are imported at their first use."""
    heavy = ("numpyro", "flax", "optax", "matplotlib", "scipy.optimize", "relaxit_jax.diagnostics")
    heavy += ("relaxit_jax.quantizers", "relaxit_jax.structured")
    code = f"""if True:
        import sys, relaxit_jax
        assert not set({heavy}) & set(sys.modules)
        assert {{"diagnostics", "distributions", "gumbel_softmax"}} <= set(dir(relaxit_jax))
        assert relaxit_jax.diagnostics.gradient_report and relaxit_jax.estimators.rloo
        assert relaxit_jax.quantizers.vector_quantize
        assert relaxit_jax.laplace_bridge.gaussian_to_dirichlet and "numpyro" not in sys.modules
        assert relaxit_jax.distributions.HardConcrete and relaxit_jax.handlers.relax
        assert relaxit_jax.elbo.RLOO_ELBO and relaxit_jax.structured.chain_sample
        relaxit_jax.gumbel_sofmax"""
    failed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert failed.stderr.splitlines()[-1].startswith("AttributeError: module 'relaxit_jax'"), failed.stderr


def test_every_sampler_has_a_row():
    tested = {case.sampler.__name__ for case in CASES}
    samplers = {
        name for name in relaxit_jax.__all__
        if callable(f := getattr(relaxit_jax, name)) and next(iter(inspect.signature(f).parameters)) == "key"
    }  # fmt: skip
    assert samplers == tested | {"stochastic_beam_search"}  # which takes a model: test_beam_search.py


def test_docstrings_say_what_the_design_asks():
    modules = (relaxit_jax, distributions, estimators, quantizers, diagnostics, handlers, elbo, structured)
    for module in modules:
        for name in module.__all__:
            thing = getattr(module, name)
            if not callable(thing) or name.startswith("RelaxedOneHot"):  # these point to their originals
                continue
            returns = () if isinstance(thing, type) else ("Returns:",)
            for part in ("Args:", *returns, "Raises:", "References:", ">>>", "``"):
                assert part in thing.__doc__, f"{name}: {part}"


# How often a file may skip: where the machine lacks NumPyro's source, and where a test of NumPyro's needs a
# density that a class refuses to have.
SKIPS = {"numpyro_suite.py": 2}
CHECKS = ("pytest.raises", "pytest.warns", "np.testing.assert_", "chex.assert_")


def own_nodes(function):
    """Nodes that run when the function does: the functions inside it return to it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield node
            yield from own_nodes(node)


def cannot_fail(source):
    """Lines of tests that pass for any code: those that end a case early, and tests without a check."""
    skips = ("pytest.skip", "pytest.xfail", "pytest.importorskip", "pytest.mark.skip", "pytest.mark.xfail")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(skips):
            yield "skips", node.lineno
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            returns = [inner for inner in own_nodes(node) if isinstance(inner, ast.Return)]
            yield from (("returns", inner.lineno) for inner in returns)
            if not any(isinstance(inner, ast.Assert) or is_check(inner) for inner in ast.walk(node)):
                yield "looks at nothing", node.lineno


def is_check(node):
    return isinstance(node, ast.Attribute) and ast.unparse(node).startswith(CHECKS)


def test_every_case_of_a_test_can_fail():
    """A condition chooses the cases of a test; ending one early would let it pass for any code."""
    for path in pathlib.Path(__file__).parent.glob("*.py"):
        found = list(cannot_fail(path.read_text()))
        assert len(found) == SKIPS.get(path.name, 0), f"{path.name}: {found}"


def test_cases_that_cannot_fail_are_found():
    source = """if True:
        @pytest.mark.skipif(True)
        def test_one(case):
            if not case:
                return
            f = lambda: 1
            def g():
                return 2
            assert f() == g()
            pytest.skip("none")
        def test_two():
            f()
        """
    found = {("skips", 2), ("skips", 10), ("returns", 5), ("looks at nothing", 11)}
    assert set(cannot_fail(source)) == found
