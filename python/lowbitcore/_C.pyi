from torch import Tensor

class Error(RuntimeError): ...

_Norm = tuple[Tensor, float]
_Linear = tuple[
    Tensor,
    Tensor,
    Tensor | None,
    Tensor | None,
    int,
    int,
    int,
    int,
    tuple[tuple[Tensor, Tensor, float], ...],
]

def available_isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def set_num_threads(count: int) -> None: ...
def get_num_threads() -> int: ...
def cuda_status() -> str: ...
def cuda_why_not(arg: int, /) -> str: ...
def cuda_has_wgmma() -> bool: ...
def version() -> str: ...
def check_format(
    op: str, bits: int, group_size: int, in_features: int, out_features: int
) -> None: ...
def packed_size(bits: int, group_size: int, in_features: int, out_features: int) -> int: ...
def pack_qweight(codes: Tensor, bits: int, qweight: Tensor) -> None: ...
def unpack_qweight(qweight: Tensor, bits: int, codes: Tensor) -> None: ...
def pack_qzeros(zeros: Tensor, bits: int, qzeros: Tensor) -> None: ...
def unpack_qzeros(qzeros: Tensor, bits: int, zeros: Tensor) -> None: ...
def prepack(
    qweight: Tensor,
    qzeros: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    packed: Tensor,
    stream: int,
) -> None: ...
def unpack(
    packed: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    qweight: Tensor,
    qzeros: Tensor,
    stream: int,
) -> None: ...
def dequantize(
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    first_output: int,
    out: Tensor,
    stream: int,
) -> None: ...
def qgemm_nt(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    y: Tensor,
    stream: int,
) -> None: ...
def qgemm_nn(
    dy: Tensor,
    packed: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    dx: Tensor,
    stream: int,
) -> None: ...
def qgemm_grad_scales(
    dy: Tensor,
    x: Tensor,
    packed: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    out_features: int,
    ds: Tensor,
    stream: int,
) -> None: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, y: Tensor) -> None: ...
def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor) -> None: ...
def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, y: Tensor) -> None: ...
def swiglu(gate: Tensor, up: Tensor, out: Tensor) -> None: ...
def swiglu_backward(
    d_out: Tensor, gate: Tensor, up: Tensor, d_gate: Tensor, d_up: Tensor
) -> None: ...
def dropout(x: Tensor, seed: int, dropped: int, y: Tensor) -> None: ...
def token_losses(
    logits: Tensor,
    targets: Tensor,
    lambda_ce: float,
    teacher: Tensor | None,
    lambda_kl: float,
    reverse: bool,
    losses: Tensor,
    gradient: Tensor | None,
) -> None: ...
def gemm_nt(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None: ...
def gemm_nn(x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None: ...
def add_low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, low: Tensor, sum: Tensor
) -> None: ...
def add_low_rank_backward(
    dy: Tensor,
    x: Tensor | None,
    low: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dx: Tensor | None,
    da: Tensor | None,
    db: Tensor | None,
) -> None: ...
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None: ...
def attention_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None: ...
def quantize_rtn(
    weight: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    mse: bool,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    stream: int,
) -> None: ...
def permute_columns(x: Tensor, order: Tensor, y: Tensor) -> None: ...
def accumulate_hessian(hessian: Tensor, x: Tensor) -> None: ...
def accumulate_cross(cross: Tensor, a: Tensor, b: Tensor) -> None: ...
def gptq_factorize(
    hessian: Tensor, percdamp: float, act_order: bool, order: Tensor, dead: Tensor, u: Tensor
) -> float: ...
def gptq_quantize(
    weight: Tensor,
    order: Tensor,
    dead: Tensor,
    u: Tensor,
    bits: int,
    group_size: int,
    sym: bool,
    mse: bool,
    static_groups: bool,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
    stream: int,
) -> float: ...
def add_fake_quantized(
    out: Tensor, latent: Tensor, scales: Tensor, zeros: Tensor, bits: int
) -> None: ...
def fake_quantized_grads(
    dw: Tensor,
    latent: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bits: int,
    d_latent: Tensor,
    d_scales: Tensor,
) -> None: ...
def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, out: Tensor) -> None: ...
def project_token(
    x: Tensor,
    norm: _Norm,
    q_proj: _Linear,
    k_proj: _Linear,
    v_proj: _Linear,
    q_norm: _Norm | None,
    k_norm: _Norm | None,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> None: ...
def finish_token(
    x: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    o_proj: _Linear,
    norm: _Norm,
    gate_proj: _Linear,
    up_proj: _Linear,
    down_proj: _Linear,
    y: Tensor,
) -> None: ...
