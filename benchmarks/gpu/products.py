"""A probe of float32 products by three of TF32 on tensor cores (`kernels/product.py`), beside those on CUDA cores: how
exact they are, and how fast. docs/facts.md ("Exact float32 on tensor cores") has what is known of it without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from cnnfast.kernels.product import multiply_add, unscaled
from cnnfast.tolerance import limits

from .. import timers

__all__ = ["product", "three_products"]


@triton.jit
def float32_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    y_ptr,  # (M, N)
    M,
    N,
    K,
    TF32: tl.constexpr,  # 3 or 0: `multiply_add`
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = a @ b in float32, whose tiles divide the sizes: by three TF32 products, or on the CUDA cores in one chain."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (k0 + k)[None, :])
        b = tl.load(b_ptr + (k0 + k)[:, None] * N + n[None, :])
        total = multiply_add(a, b, total, TF32)
    total = unscaled(total, TF32)
    tl.store(y_ptr + m[:, None] * N + n[None, :], total)


# Tiles that do not spill on sm_80 and sm_90 (compiled, triton 3.7.1): rows, columns, k, warps, stages.
TILES = {True: (64, 64, 32, 4, 3), False: (64, 64, 16, 8, 2)}


def product(a: torch.Tensor, b: torch.Tensor, three: bool) -> torch.Tensor:
    """a (M, K) @ b (K, N), float32, row-major; M and N multiples of 64, K of 32."""
    (m, k), n = a.shape, b.shape[1]
    y = a.new_empty(m, n)
    rows, columns, depth, warps, stages = TILES[three]
    grid = (m // rows, n // columns)
    float32_kernel[grid](a, b, y, m, n, k, 3 if three else 0, rows, columns, depth, num_warps=warps, num_stages=stages)
    return y


def _operands(depths: tuple[int, ...]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Noise, and noise around one, whose sums grow."""
    generator = torch.Generator().manual_seed(0)
    for depth in depths:
        for mean in (0.0, 1.0):
            a, b = torch.randn(64, depth, generator=generator), torch.randn(depth, 64, generator=generator)
            yield a + mean, (b + mean) * depth**-0.5


def three_products(
    timer: timers.Timer, device: str = "cuda", depths: tuple[int, ...] = (64, 256, 1024, 4096), size: int = 4096
) -> dict[str, Any]:
    """ "three" and "cores": the worst error over all of ``depths`` as a share of what the tolerance allows
    (`cnnfast.tolerance`, the yardstick a CPU's float32). "faster": time on the CUDA cores over that of three products,
    of (size, size) matrices."""
    shares = {True: 0.0, False: 0.0}
    for a, b in _operands(depths):
        expected = a.double() @ b.double()
        allowed = limits(expected, a @ b)
        for three in shares:
            error = (product(a.to(device), b.to(device), three).cpu().double() - expected).abs()
            rms = error.square().mean().sqrt().item()
            shares[three] = max(shares[three], (error / allowed.each).max().item(), rms / allowed.rms)
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    times = timer({"three": lambda: product(a, b, True), "cores": lambda: product(a, b, False)})
    faster = times["cores"].median / times["three"].median
    return {"three": shares[True], "cores": shares[False], "faster": faster}
