"""The plan of the house: what docs/architecture.md says of imports, devices and the way of a call."""

from __future__ import annotations

import ast

import pytest

from benchmarks import house

# Files of the GPU's folder that say why not, plan or prove: they can be imported where there is no Triton.
WITHOUT_TRITON = (
    "backend", "conv_choice", "conv_plan", "conv_wgrad_plan", "devices", "guard", "observers", "trial", "tuned",
    "tuning", "warmup", "why_not",
)  # fmt: skip


def test_limits() -> None:
    found = house.numbers(calls=False)
    over = {name: value for name, value in found.items() if name in house.LIMITS and value > house.LIMITS[name]}  # type: ignore[operator]
    assert not over, over
    assert set(house.LIMITS) - set(found) == {"files of a warm training step"}


def test_the_way_of_a_call() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    found = house.trips()
    longest = max(found["training, forward"].files, found["training, backward"].files)
    assert longest <= house.LIMITS["files of a warm training step"], found


@pytest.mark.parametrize("name", WITHOUT_TRITON)
def test_files_that_need_no_triton(name: str) -> None:
    tree = ast.parse((house.ROOT / "cnnfast" / "gpu" / f"{name}.py").read_text())
    for node in tree.body:
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not [m for m in modules if m.split(".")[0] == "triton"], f"{name}.py: line {node.lineno}"


def test_circles_are_found() -> None:
    def arrow(a: str, b: str) -> house.Import:
        return house.Import(a, b, 1, False)

    found = [arrow("a", "b"), arrow("b", "c"), arrow("c", "a"), arrow("c", "d"), arrow("e", "a")]
    assert house.circles(found) == [["a", "b", "c"]] and house.circles(found[1:]) == []
