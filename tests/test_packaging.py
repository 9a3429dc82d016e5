"""The package as others meet it: lazy imports, no need of triton, an installed wheel, and what `make` would run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import cnnfast
from cnnfast.trained import SHIPPED

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Runs ``code`` in a fresh interpreter; its standard output. ``path`` goes ahead of the installed packages."""
    prelude = "" if path is None else f"import sys; sys.path.insert(0, {str(path)!r})\n"
    done = subprocess.run([sys.executable, "-c", prelude + code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_torch_nor_triton(tmp_path: Path) -> None:
    code = "import sys, cnnfast; print(sorted({'torch', 'triton', 'numpy'} & sys.modules.keys()))"
    assert python(code, cwd=tmp_path, path=ROOT) == "[]"


def test_the_kernels_folder_is_nobody_elses_package() -> None:
    """In a checkout, who asks for Hugging Face's package `kernels` as transformers does finds one that is too old."""
    code = (
        "import importlib, importlib.util\n"
        "assert importlib.util.find_spec('kernels') is not None\n"
        "print(importlib.import_module('kernels').__version__)\n"
        "for code in ('from kernels import get_kernel', 'import kernels.conv_transpose'):\n"
        "    try:\n"
        "        exec(code)\n"
        "    except ImportError as error:\n"
        "        print(type(error).__name__)\n"
        "import cnnfast.kernels\n"
        "print(hasattr(cnnfast.kernels, '__version__'))\n"
    )
    assert python(code, cwd=ROOT).split() == ["0", "ImportError", "ModuleNotFoundError", "False"]


def test_every_public_name_loads_without_triton(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import cnnfast, torch\n"
        "for name in cnnfast.__all__: getattr(cnnfast, name)\n"
        "x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 4, 2, 2)\n"
        "y = cnnfast.ops.conv_transpose2d(x, w, stride=2, activation='relu')\n"
        "print(tuple(y.shape), cnnfast.__version__)"
    )
    assert python(code, cwd=tmp_path, path=ROOT) == f"(1, 4, 6, 6) {cnnfast.__version__}"


def test_using_the_cpu_does_not_load_triton(tmp_path: Path) -> None:
    code = (
        "import sys, torch, cnnfast\n"
        "loaded = 'triton' in sys.modules\n"
        "model = cnnfast.create_model('dcgan', ngf=4).eval()\n"
        "with torch.inference_mode(): model(torch.zeros(1, 100, 1, 1))\n"
        "print(loaded or 'triton' not in sys.modules)"
    )
    assert python(code, cwd=tmp_path, path=ROOT) == "True"


def test_public_names() -> None:
    assert set(cnnfast.__all__) <= set(dir(cnnfast))
    with pytest.raises(AttributeError, match="module 'cnnfast' has no attribute 'nothing'"):
        _ = cnnfast.nothing


def test_a_checkout_runs_without_being_installed(tmp_path: Path) -> None:
    code = "import cnnfast.kernels as k; print(k.__file__)"
    assert python(code, cwd=tmp_path, path=ROOT) == str(ROOT / "kernels" / "__init__.py")


def test_kernels_is_no_package_of_its_own() -> None:
    code = "try:\n  import kernels\n  kernels.conv\nexcept AttributeError as error: print(error)"
    assert "write `import cnnfast.kernels`" in python(code, cwd=ROOT)


def test_the_wheel_holds_every_module_and_works_elsewhere(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("cnnfast", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"cnnfast-{cnnfast.__version__}-py3-none-any.whl"
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "cnnfast").rglob("*.py")} | {"cnnfast/py.typed"}
    expected |= {f"cnnfast/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    expected |= {f"cnnfast/trained/{entry.file}" for entry in SHIPPED.values()}
    assert names == expected

    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = "import cnnfast, cnnfast.kernels as k, cnnfast.ops; print(cnnfast.__file__); print(k.__file__)"
    lines = python(code, cwd=tmp_path, path=site).splitlines()
    assert lines == [str(site / "cnnfast" / "__init__.py"), str(site / "cnnfast" / "kernels" / "__init__.py")]


def test_the_sdist_holds_all_that_the_tests_need(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", *(n.strip("/") for n in (ROOT / ".gitignore").read_text().split()))
    shutil.copytree(ROOT, source, ignore=ignored)
    code = "import setuptools.build_meta as b; print(b.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(source / "dist" / f"cnnfast-{cnnfast.__version__}.tar.gz") as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
        info = archive.extractfile(f"cnnfast-{cnnfast.__version__}/PKG-INFO").read().decode()
    folders = [folder for folder in source.iterdir() if folder.name not in ("dist", "cnnfast.egg-info")]
    files = {str(p.relative_to(source)) for f in folders for p in ([f] if f.is_file() else f.rglob("*")) if p.is_file()}
    assert files <= packed, sorted(files - packed)
    targets = re.findall(r"\]\(([^)]+)\)|<img src=\"([^\"]+)", info.partition("\n\n")[2])
    assert targets and all(re.match("https:|#", a or b) for a, b in targets), "an index shows no relative links"


def test_the_version_stands_in_the_citation() -> None:
    assert f"\nversion: {cnnfast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_direct_requirement_is_pinned() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        requirements += extra
    names = {re.match(r"[A-Za-z0-9._-]+", r).group().lower() for r in requirements} - {"cnnfast"}
    pinned = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert names <= pinned, sorted(names - pinned)


# --- make -------------------------------------------------------------------------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def dry_run(*arguments: str) -> str:
    # These tests may themselves run under make: what it passes on belongs to that run.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VENV", "PYTHON")}
    command = ["make", "-n", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=env).stdout


@needs_make
def test_make_sets_up_once(tmp_path: Path) -> None:
    assert ".ci/environment.py" in dry_run(f"VENV={tmp_path}", "demo")
    (tmp_path / ".installed-demo").touch()
    assert dry_run(f"VENV={tmp_path}", "demo").strip() == f"{tmp_path}/bin/python -m cnnfast demo --output out"
    assert "ttsem==0.1.0" in dry_run(f"VENV={tmp_path}", "test")


@needs_make
@pytest.mark.parametrize("target", ["demo", "test", "test-all", "check", "bench", "gpu"])
def test_make_without_an_environment_installs_nothing(target: str) -> None:
    lines = dry_run("VENV=", "PYTHON=my-python", target).splitlines()
    assert lines and all(line.startswith("my-python ") for line in lines)
    assert not any("pip" in line or "environment.py" in line for line in lines)


@pytest.fixture(scope="module")
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", ROOT / ".ci" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_constraints_give_way_to_reused_packages(environment: ModuleType) -> None:
    pinned = environment.constraints({"torch": "2.11.0+cu128", "numpy": "2.1.0"}).splitlines()
    assert "torch==2.11.0+cu128" in pinned and "numpy==2.1.0" in pinned
    assert sum(line.startswith(("torch==", "numpy==")) for line in pinned) == 2
    assert environment.constraints({}) == (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("version, enough", [("2.11.0+cu128", True), ("2.13.0", True), ("3.0", True), ("2.9.1", False)])
def test_which_torch_is_reused(environment: ModuleType, version: str, enough: bool) -> None:
    assert environment.new_enough({"torch": (version, False)}) is enough
    assert environment.new_enough({}) is False


def test_ttsem_is_pinned_once() -> None:
    assert (ROOT / "Makefile").read_text().count("ttsem==") == 1
