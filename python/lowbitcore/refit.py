"""Scales that fit the integers best, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops


def refit_scales(
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
        g_idx = ops.trivial_g_idx(k, group_size)
    index = g_idx.long()
    dead = hessian.diagonal() == 0
    damped = hessian.clone()
    damped.diagonal().add_(percdamp * damped.diagonal()[~dead].mean() if not dead.all() else 1.0)
    target = weight.float().masked_fill(dead, 0.0)
    steps = codes.float() - zeros.float()[index].T

    def sum_groups(matrix: Tensor) -> Tensor:
        return matrix.new_zeros(n, groups).index_add_(1, index, matrix)

    right = sum_groups(steps * (target @ damped)).double()
    system = torch.empty(n, groups, groups, dtype=torch.float64)
    for group in range(groups):
        columns = (index == group).nonzero().squeeze(1)
        system[:, group] = sum_groups(steps * (steps[:, columns] @ damped[columns]))
    system = (system + system.mT) / 2
    # A group whose integers are all at the zero point has no scale to find; this keeps it solvable.
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    fitted = torch.linalg.solve(system, right).half().double()

    def objective(candidate: Tensor) -> Tensor:
        quadratic = torch.einsum("ng,ngh,nh->n", candidate, system, candidate)
        return quadratic - 2 * (right * candidate).sum(1)

    old = scales.T.double()
    usable = (fitted > 0).all(1) & torch.isfinite(fitted).all(1)
    better = usable & (objective(torch.where(usable[:, None], fitted, old)) < objective(old))
    return torch.where(better[:, None], fitted, old).float().T.contiguous()
