"""What fits best in closed form: weights to what a model lost so far, scales to their integers,
and a low-rank product to what those leave over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lowbitcore import ops

# Elements of the systems that scales are solved for at a time: with what a solver copies, 150 MB.
_SYSTEM_ELEMENTS = 1 << 22
# Of the random projection in which singular vectors are found (Halko et al., arXiv 0909.4061).
_OVERSAMPLED, _ITERATIONS = 8, 4


def fit_weight(weight: Tensor, cross: Tensor, factor: ops.GptqFactor, *, tokens: int) -> Tensor:
    """The weight T [N, K], float32, that on the inputs x comes nearest to W on the inputs x'.

    T = W + a W C H^-1 with C = sum of (x' - x) x^T and H as damped and factored: for a = 1 the
    least squares solution. With x' from the 16-bit model and x from the quantized one, errors of
    earlier layers are corrected as far as a linear map can. A row is fitted with K unknowns to n
    tokens, so a part of about K/n of what it corrects is chance; a = n / (n + 2K) leaves it out.

    weight [N, K], cross float32 [K, K] = C, tokens = n.
    """
    order, k = factor.order.long(), weight.shape[1]
    # In whichever order of products is cheapest for this shape.
    correction = torch.linalg.multi_dot([weight.float(), cross[:, order], factor.u.T, factor.u])
    fitted = weight.float().clone()
    fitted[:, order] += tokens / (tokens + 2 * k) * correction
    return fitted


def fit_scales(
    weight: Tensor,
    hessian: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    *,
    group_size: int,
    g_idx: Tensor | None,
    percdamp: float,
) -> Tensor:
    """The scales float32 [G, N] (fp16 values) that minimise tr(E H E^T) for given integers.

    Once the integers are chosen, a row of the error E = W - s (q - z) is linear in its G scales, so
    they follow from one G x G system a row, under the Hessian damped as for GPTQ. A row keeps its
    old scales where the new ones are not all positive, or not better after rounding to fp16.

    weight [N, K], hessian float32 [K, K], codes uint8 [N, K], scales float32 [G, N], zeros uint8
    [G, N], g_idx int32 [K] or None.
    """
    n, k = weight.shape
    groups = scales.shape[0]
    if g_idx is None:
        g_idx = ops.trivial_g_idx(k, group_size, codes.device)
    # Groups side by side, so that half of the symmetric system is enough.
    index, columns = g_idx.long().sort(stable=True)
    sizes = torch.bincount(index, minlength=groups).tolist()
    dead = (hessian.diagonal() == 0)[columns]
    damped = hessian[columns][:, columns]
    damped.diagonal().add_(percdamp * damped.diagonal()[~dead].mean() if not dead.all() else 1.0)
    fitted = []
    at_once = max(1, _SYSTEM_ELEMENTS // groups**2)
    for start in range(0, n, at_once):
        some = slice(start, start + at_once)
        target = weight[some].float()[:, columns].masked_fill(dead, 0.0)
        steps = codes[some].float()[:, columns] - zeros[:, some].float()[index].T
        fitted.append(_fit_rows(target, steps, scales[:, some].T.double(), damped, sizes))
    return torch.cat(fitted).float().T.contiguous()


def _fit_rows(
    target: Tensor, steps: Tensor, old: Tensor, damped: Tensor, sizes: list[int]
) -> Tensor:
    """The scales of some rows, float64 [rows, G]; `sizes` are those of groups side by side."""
    n, groups = old.shape

    def sum_groups(matrix: Tensor, first: int) -> Tensor:
        """From group `first` on. Not by index_add_, whose order of sums on a GPU is chance."""
        return torch.stack([part.sum(1) for part in matrix.split(sizes[first:], dim=1)], dim=1)

    right = sum_groups(steps * (target @ damped), 0).double()
    system = right.new_zeros(n, groups, groups)
    end = 0
    for group, size in enumerate(sizes):
        start, end = end, end + size
        products = steps[:, start:end] @ damped[start:end, start:]
        system[:, group, group:] = sum_groups(steps[:, start:] * products, group)
    system += system.triu(1).mT
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30  # solvable, whatever the groups are
    fitted = torch.linalg.solve(system, right).half().double()
    # A group whose integers are all at the zero point, or whose inputs are all 0, has no scale to
    # find, and others may come out without a use: they keep theirs, which the rest then knows.
    kept = ~(fitted > 0)
    if kept.any():
        free = (~kept).double()
        pinned = old * kept
        right_of_rest = free * (right - torch.einsum("ngh,nh->ng", system, pinned)) + pinned
        system_of_rest = system * free[:, :, None] * free[:, None, :] + torch.diag_embed(1 - free)
        fitted = torch.linalg.solve(system_of_rest, right_of_rest).half().double()
        fitted = torch.where(kept, old, fitted)

    def objective(candidate: Tensor) -> Tensor:
        quadratic = torch.einsum("ng,ngh,nh->n", candidate, system, candidate)
        return quadratic - 2 * (right * candidate).sum(1)

    usable = (fitted > 0).all(1) & torch.isfinite(fitted).all(1)
    better = usable & (objective(torch.where(usable[:, None], fitted, old)) < objective(old))
    return torch.where(better[:, None], fitted, old)


def dequantized(
    codes: Tensor, scales: Tensor, zeros: Tensor, *, group_size: int, g_idx: Tensor | None
) -> Tensor:
    """scales (codes - zeros), float32 [N, K]: codes [N, K], scales and zeros [G, N]."""
    if g_idx is None:
        g_idx = ops.trivial_g_idx(codes.shape[1], group_size, codes.device)
    index = g_idx.long()
    return (codes.float() - zeros.float()[index].T) * scales[index].T


def fit_low_rank(error: Tensor, factor: ops.GptqFactor, *, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r], float32, that minimise tr((E - B A) H (E - B A)^T).

    With H = L L^T the best E L of rank r keeps its first left singular vectors U, so B A = U U^T E:
    no inverse. U comes from a random sketch: of linears of SmolLM2 at 2 bits rank 16 so took 96 to
    98% of what it can. The factors are balanced, row i of A as long as column i of B.

    error [N, K] float32 = E; H as damped and factored.
    """
    error = error.masked_fill(factor.dead, 0.0)
    # H^-1 = u^T u, so L = u^-1, in the factor's order of columns.
    weighted = torch.linalg.solve_triangular(
        factor.u, error[:, factor.order.long()], upper=True, left=False
    )
    with _seeded(error.device):
        most = min(weighted.shape)
        u, _, _ = torch.svd_lowrank(weighted, q=min(rank + _OVERSAMPLED, most), niter=_ITERATIONS)
    u = u[:, :rank]
    a = u.T @ error
    norms = a.norm(dim=1).sqrt().clamp(min=1e-12)
    return a / norms[:, None], u * norms


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, and none of those that others draw on this device."""
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index]
    state = generator.get_state()
    generator.manual_seed(0)
    try:
        yield
    finally:
        generator.set_state(state)
