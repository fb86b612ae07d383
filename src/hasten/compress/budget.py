"""Which of several choices each layer takes, so that all together cost least within a budget: an integer programme."""

from collections.abc import Sequence

import numpy as np

from hasten.base.errors import ConfigError, MissingExtraError

GAP = 1e-4
"""Share by which the sum may be above the least there is."""


def least_cost(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """For each layer the number of its choice: Σ of ``costs`` least, within GAP, with Σ of ``sizes`` at most ``budget``.

    The multiple-choice knapsack problem, solved by branch and bound (HiGHS). Raises ConfigError where no choice fits, MissingExtraError
    without scipy."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import block_diag, csr_array
    except ModuleNotFoundError:
        raise MissingExtraError("choosing bits by layer", "search") from None
    flat, bytes_of = np.concatenate([np.asarray(each, float) for each in costs]), np.concatenate([np.asarray(each) for each in sizes])
    if not np.isfinite(flat).all():
        raise ConfigError("a layer's cost is not a finite number, so nothing can be chosen; check the model's weights")
    scale = 1000 / max(float(np.abs(flat).max()), 1e-300)  # its tolerances are absolute
    one_each = block_diag([np.ones((1, len(each))) for each in costs], format="csr")
    room = float(bytes_of.max())
    found = milp(
        flat * scale,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(csr_array(bytes_of[None] / room), -np.inf, budget / room)],
        options={"mip_rel_gap": GAP},
    )
    if found.x is None:
        least, most = sum(map(min, sizes)), sum(map(max, sizes))
        raise ConfigError(f"a budget of {budget:,} bytes cannot be met; these choices take {least:,} to {most:,}")
    ends = np.cumsum([len(each) for each in costs])[:-1]
    return [int(part.argmax()) for part in np.split(found.x, ends)]
