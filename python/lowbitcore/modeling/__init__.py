"""The core's operations inside models of transformers, wherever they compute the same."""

from __future__ import annotations

from transformers import PreTrainedModel

from lowbitcore.modeling.attention import use_own_attention
from lowbitcore.modeling.decode import use_own_blocks
from lowbitcore.modeling.elementwise import use_own_elementwise
from lowbitcore.modeling.experts import use_own_experts
from lowbitcore.modeling.linears import use_own_head, use_own_linears


def use_own_operations(model: PreTrainedModel, *, experts: bool = True) -> None:
    """The core's attention, norms, rotary positions and gates in the place of transformers', and
    quicker linears and head, where they compute the same; and, with `experts`, these apart."""
    if experts:
        use_own_experts(model)
    use_own_attention(model)
    use_own_elementwise(model)
    use_own_blocks(model)
    use_own_linears(model)
    use_own_head(model)
