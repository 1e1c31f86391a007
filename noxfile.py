"""All checks except the README's own commands. `nox -l` lists them; `.ci/run` calls the starred ones.

A session for several Pythons skips those that it does not find on the PATH or where pyenv keeps them.
"""

import os
import pathlib
import subprocess
import tarfile
import zipfile

import nox

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "uv|virtualenv"
SUPPORTED = nox.project.python_versions(nox.project.load_toml("pyproject.toml"))
DEFAULT, *OTHERS = PYTHONS = [*SUPPORTED, "3.14"]
# the Pythons between the lowest and the newest get the same packages as the newest
nox.options.sessions = ["lint", "types", "wheel", "site", "lowest", f"fast-{SUPPORTED[-1]}"]
if os.environ.get("NUMPYRO_SOURCE"):
    nox.options.sessions.append("numpyro_tests")


def real_interpreters():
    """Folders of pyenv's Pythons: its commands on the PATH run only one version, under every name."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    return [str(path) for version in PYTHONS for path in sorted(root.glob(f"versions/{version}.*/bin"))]


os.environ["PATH"] = os.pathsep.join([*real_interpreters(), os.environ["PATH"]])
os.environ["UV_PYTHON_DOWNLOADS"] = "never"
os.environ.setdefault("UV_NATIVE_TLS", "1")  # the certificates of this machine, as pip uses them


@nox.session(python=PYTHONS)
def tests(session):
    """The whole suite, with the newest versions."""
    session.install("-e", ".[dev]")
    session.run("python", "-m", "pytest", "--all", *session.posargs)


@nox.session(python=OTHERS)
def fast(session):
    """The quick tier, with the newest versions."""
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", "-q", *session.posargs)


@nox.session(python=PYTHONS[-2:], venv_backend="virtualenv")
def nightly(session):
    """The whole suite, with NumPyro's main branch and the nightly wheels of JAX."""
    index = os.environ.get("JAX_NIGHTLY_INDEX")
    if not index:
        session.error("set JAX_NIGHTLY_INDEX to the index of nightly wheels in JAX's installation page")
    session.install("-e", ".[dev]")
    session.install("--upgrade", "numpyro @ git+https://github.com/pyro-ppl/numpyro")
    session.install("--upgrade", "--pre", "--extra-index-url", index, "jax", "jaxlib")
    session.run("python", "-m", "pytest", "--all", *session.posargs)


@nox.session(python=DEFAULT)
def lowest(session):
    """The quick tier, with the lowest versions that pyproject.toml admits."""
    if session.venv_backend != "uv":
        session.skip("only uv resolves the lowest versions")
    session.install("-e", ".[test]", "--resolution", "lowest-direct")
    session.run("python", "-m", "pytest", "-q", *session.posargs)


@nox.session(python=DEFAULT)
def numpyro_tests(session):
    """NumPyro's own tests of a distribution, from the source of the installed version, over every class."""
    session.install("-e", ".[dev]", "pip")
    source = os.environ.get("NUMPYRO_SOURCE") or numpyro_source(session)
    if not source:
        session.skip("no source of NumPyro: set NUMPYRO_SOURCE to a checkout of the installed version")
    suite = ("tests/numpyro_suite.py", "-o", "addopts=", "-n", "auto", "--dist", "worksteal", "-q")
    session.run("python", "-m", "pytest", *suite, *session.posargs, env={"NUMPYRO_SOURCE": source})


def numpyro_source(session):
    """The unpacked source distribution, which has the tests; None if no package index has it."""
    version = session.run("python", "-c", "import numpyro; print(numpyro.__version__)", silent=True).strip()
    folder = pathlib.Path(session.create_tmp()).resolve()
    pip = ("pip", "download", f"numpyro=={version}", "--no-deps", "--no-binary", "numpyro")
    session.run("python", "-m", *pip, "--dest", str(folder), silent=True, success_codes=[0, 1])
    for archive in folder.glob(f"numpyro-{version}.tar.gz"):
        with tarfile.open(archive) as held:
            held.extractall(folder, filter="data")
        return str(folder / f"numpyro-{version}")


@nox.session(python=DEFAULT)
def accelerators(session):
    """Run benchmarks/accelerators.py, with the compilers for GPUs and for TPUs: 1.3 GB, some minutes."""
    session.install("-e", ".[benchmarks]", "pip")
    code = "import jax; print(jax.__version__)"
    jax = session.run("python", "-c", code, silent=True).strip()
    gpu = [f"jax-cuda12-{part}=={jax}" for part in ("plugin", "pjrt")]
    session.install(*gpu, "nvidia-cuda-nvcc-cu12", "nvidia-nvjitlink-cu12", f"jax[tpu]=={jax}")
    for kind, dtype in (("gpu", "float32"), ("gpu", "bfloat16"), ("tpu", "float32")):
        session.run("python", "benchmarks/accelerators.py", kind, "--dtype", dtype, *session.posargs)


@nox.session(python=DEFAULT)
def lint(session):
    """ruff, as pre-commit runs it."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python=DEFAULT)
def types(session):
    """Check that every public symbol has a known type, and that a user's typed script agrees with them."""
    session.install(".", "basedpyright==1.40.2")
    # NumPyro is annotated and does not say so: without this mark all types derived from it are unknown
    where = "import importlib.util as u; print(u.find_spec('numpyro').submodule_search_locations[0])"
    numpyro = session.run("python", "-c", where, silent=True).strip()
    (pathlib.Path(numpyro) / "py.typed").touch()
    session.run("basedpyright", "--verifytypes", "relaxit_jax", "--ignoreexternal")
    session.run("basedpyright", "--level", "error", "tests/typed_user.py")


@nox.session(python=DEFAULT)
def site(session):
    """Build the documentation, in site/."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", "--quiet", env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session(python=DEFAULT)
def wheel(session):
    """Build the files of a release in dist/, the sdist and the wheel made from it, and test the wheel."""
    session.install("build", "twine")
    dist = pathlib.Path("dist")
    for old in dist.glob("relaxit_jax-*"):
        old.unlink()
    session.run("python", "-m", "build", silent=True)
    (sdist,), (wheel,) = dist.glob("relaxit_jax-*.tar.gz"), dist.glob("relaxit_jax-*.whl")
    session.run("twine", "check", "--strict", str(sdist), str(wheel))
    package = {
        str(path) for path in pathlib.Path("relaxit_jax").rglob("*") if path.suffix in (".py", ".typed")
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    if held != package:
        session.error(f"the wheel lacks {sorted(package - held)} and also has {sorted(held - package)}")
    with tarfile.open(sdist) as archive:
        held = {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}
    git = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False)
    if git.returncode:
        session.warn(f"what the sdist holds is not compared, as this is no checkout: {git.stderr.strip()}")
    elif lacks := set(git.stdout.split("\n")) - held - {""}:
        session.error(f"the sdist lacks {sorted(lacks)}")
    alone, wheel = pathlib.Path(session.create_tmp()).resolve() / "alone", wheel.resolve()
    session.run("python", "-m", "venv", "--clear", str(alone))
    python = alone / "bin" / "python"
    session.run(str(python), "-m", "pip", "install", "--quiet", str(wheel), external=True)
    smoke = pathlib.Path("tests/smoke.py").resolve()
    with session.chdir(alone):
        session.run(str(python), "-W", "error", str(smoke), external=True)
