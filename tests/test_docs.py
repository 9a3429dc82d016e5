"""The documentation: names that docstrings refer to exist, links lead somewhere, the API reference builds."""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for folder in ("cnnfast", "kernels") for p in (ROOT / folder).rglob("*.py"))
# `name` refers to something; ``code`` is code.
REFERENCE = re.compile(r"(?<![`\w])`([^`\n]+)`(?![`\w])")
NAME = re.compile(r"[A-Za-z_][\w.]*(?:\(\))?")


def docstrings(tree: ast.Module) -> Iterator[tuple[tuple[str, ...], str]]:
    """(the names of the definitions around it, text) of every docstring."""

    def walk(node: ast.AST, inside: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = inside if isinstance(node, ast.Module) else (*inside, node.name)
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inside, text
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(tree, ())


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("cnnfast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def found(name: str) -> bool:
    """Whether a dotted name can be reached: a module, or attributes of one."""
    parts = name.split(".")
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        return has(value, parts[i:])
    return False


def has(value: object, parts: list[str]) -> bool:
    for i, part in enumerate(parts):
        if not hasattr(value, part):
            fields = getattr(value, "__annotations__", {})  # of a dataclass, without a default
            return part in fields and i == len(parts) - 1
        value = getattr(value, part)
    return True


def resolves(reference: str, module: str, inside: tuple[str, ...]) -> bool:
    """Whether a reference in a docstring of ``module`` means something that exists: a name seen from there, a module, a
    command, a file."""
    if "/" in reference:
        return (ROOT / reference).exists() or (ROOT / "cnnfast" / reference).exists()
    if not NAME.fullmatch(reference):
        first = reference.split()[0]
        return first in ("python", "make", "pip", "torchrun", "with") or not re.match(r"[A-Za-z_]", first)
    reference = reference.removesuffix("()")
    if any(
        (ROOT / folder / reference).exists()
        for folder in (".", "cnnfast", "kernels", "tests", "docs", "cnnfast/gpu", "cnnfast/ops")
    ):
        return True
    parts, here = reference.split("."), importlib.import_module(module)
    for i in range(len(inside), -1, -1):  # members of the classes around it, then of the module
        value: object = here
        for name in inside[:i]:
            value = getattr(value, name, None)
        if value is not None and has(value, parts):
            return True
    package = module if hasattr(here, "__path__") else module.rpartition(".")[0]
    candidates = [reference]
    if parts[0] != "cnnfast":  # which a checkout would find in itself, under a wrong name
        candidates += [f"{package}.{reference}", f"cnnfast.{reference}", f"cnnfast.ops.{reference}"]
    return hasattr(builtins, parts[0]) or any(found(c) for c in candidates)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_references_in_docstrings(path: Path) -> None:
    if path.name == "__main__.py":
        pytest.skip("runs when it is imported")
    if path.parent.name == "kernels" or "import triton" in path.read_text():
        pytest.importorskip("triton")
    if "import gradio" in path.read_text():
        pytest.importorskip("gradio")
    module = module_name(path)
    broken = [
        f"{'.'.join(inside) or 'module'}: `{reference}`"
        for inside, text in docstrings(ast.parse(path.read_text()))
        for reference in REFERENCE.findall(text)
        if not resolves(reference, module, inside)
    ]
    assert not broken, broken


def test_the_table_of_kernels() -> None:
    """Every file and kernel stands in it, with a launcher that names the kernel and tests that there are."""
    table = (ROOT / "kernels" / "__init__.py").read_text().split("Each kernel, ")[1].split("The folder")[0]
    listed: dict[str, list[str]] = {}
    launcher = ""
    for line in re.findall(r"^    .*", table, re.M):
        name, *rest = line.replace(",", " ").split()
        if not line.startswith(" " * 8):
            kernels = listed[name] = []
            if rest[0].endswith(".py"):
                launcher = (ROOT / rest[0]).read_text()
                test = ROOT / rest[1]
                assert all(t.is_file() for t in (test, *(test.parent / other for other in rest[2:]))), line
        else:
            kernels.append(name)
            assert re.search(rf"\b{name}\b", launcher), f"{name} is not launched there"
    files = {p.name: p.read_text() for p in (ROOT / "kernels").glob("*.py") if p.name != "__init__.py"}
    assert listed == {f: re.findall(r"^def (\w+_kernel)\(", text, re.M) for f, text in files.items()}


# --- pages ------------------------------------------------------------------------------------------------------------

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    broken = []
    for target in (a or b for a, b in LINK.findall(page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or anchor and anchor not in anchors(file):
            broken.append(target)
    assert not broken


def test_files_that_pages_name() -> None:
    """`folder/file.py` in a page is a file of the project."""
    for page in PAGES:
        if page.name in ("CHANGELOG.md", "facts.md"):  # which tell of what was
            continue
        for name in re.findall(r"`((?:[\w.-]+/)+[\w-]+\.(?:py|md|txt))`", page.read_text()):
            assert any((ROOT / base / name).is_file() for base in (".", "cnnfast")), f"{page.name}: {name}"


def test_environment_variables_are_on_their_page() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    sources = [p for folder in ("cnnfast", "kernels", "tests", "benchmarks") for p in (ROOT / folder).rglob("*.py")]
    used = {name for p in sources for name in re.findall(r"\bCNNFAST_[A-Z_]+\b", p.read_text())}
    assert used == set(re.findall(r"\bCNNFAST_[A-Z_]+\b", page))


# --- the API reference ------------------------------------------------------------------------------------------------


def test_the_reference_builds(tmp_path: Path) -> None:
    if importlib.util.find_spec("pdoc") is None:
        pytest.skip("pdoc is not installed")
    command = [sys.executable, "-W", "error::UserWarning", "-m", "pdoc", "-o", str(tmp_path), "cnnfast"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "cnnfast.html").read_text()
    for name in ("Sequential", "warmup", "freeze"):
        assert f'id="{name}"' in page
