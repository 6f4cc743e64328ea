from __future__ import annotations

import pytest
import torch

from lowbitcore import runtime


@pytest.fixture
def gpu() -> torch.device:
    """For what neither the CPU nor the interpreter can show."""
    why_not = runtime.why_no_cuda()
    if why_not is not None:
        pytest.skip(why_not)
    return torch.device("cuda", 0)
