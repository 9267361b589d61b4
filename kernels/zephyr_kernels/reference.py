"""Every operation in plain PyTorch: the specification, the CPU's path, and the truth of the tests.

Arithmetic is in `accumulate_dtype`: fp32 for fp32, bf16 and fp16 input, fp64 for fp64; a result is
rounded once, to the dtype of the tensor it is written to. An operation whose name ends in `_`
writes over its arguments as its docstring says.

Shapes: T tokens, D hidden width, F feed-forward width, H heads, P half of a head's width, N output
and K input features of a weight, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


def accumulate_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype an operation on `x` computes in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------- norm


def rms_norm(
    x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, out_TD: torch.Tensor
) -> torch.Tensor:
    """out = x * rstd * gain; returns rstd_T = (mean(x^2) + eps)^-1/2 in the accumulate dtype."""
    wide_TD = x_TD.to(accumulate_dtype(x_TD))
    # A matrix-vector product per row: the squares are never written.
    square_T = torch.linalg.vecdot(wide_TD, wide_TD)
    rstd_T = square_T.div_(x_TD.shape[1]).add_(eps).rsqrt_()
    if out_TD.dtype == wide_TD.dtype:
        torch.mul(wide_TD, rstd_T[:, None], out=out_TD).mul_(gain_D)
    else:
        out_TD.copy_(wide_TD * rstd_T[:, None] * gain_D)
    return rstd_T


def rms_norm_backward_(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    rstd_T: torch.Tensor,
    residual_TD: torch.Tensor | None,
) -> torch.Tensor:
    """Write d loss / dx over dy and return it; `residual_TD`, when given, is added to it.

    With g = dy * gain and n = x * rstd:  dx = rstd * (g - n * mean(g * n)) + residual
    """
    wide = accumulate_dtype(x_TD)
    g_TD = dy_TD.mul_(gain_D) if dy_TD.dtype == wide else dy_TD.to(wide) * gain_D
    x_TD = x_TD.to(wide)
    mean_T = torch.linalg.vecdot(g_TD, x_TD).div_(x_TD.shape[1])
    g_TD.mul_(rstd_T[:, None]).addcmul_(x_TD, (mean_T * rstd_T**3)[:, None], value=-1.0)
    if residual_TD is not None:
        g_TD.add_(residual_TD)
    return g_TD if g_TD is dy_TD else dy_TD.copy_(g_TD)


# ---------------------------------------------------------------- rope


def rotate_(
    x_TH2P: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Turn each pair (a, b) of a head by its angle: a cos - b sin, b cos + a sin; in place.

    interleaved: pairs are neighbours (2i, 2i + 1); else they are (i, i + P), as Llama's are.
    inverse: turn back, which is the backward of the turn.
    """
    half = x_TH2P.shape[-1] // 2
    if interleaved:
        a_THP, b_THP = x_TH2P[..., 0::2], x_TH2P[..., 1::2]
    else:
        a_THP, b_THP = x_TH2P[..., :half], x_TH2P[..., half:]
    cos_T1P, sin_T1P = cos_TP[:, None], sin_TP[:, None]
    sign = -1.0 if inverse else 1.0
    if x_TH2P.dtype == cos_TP.dtype:
        turned_THP = a_THP * cos_T1P
        turned_THP.addcmul_(b_THP, sin_T1P, value=-sign)
        b_THP.mul_(cos_T1P).addcmul_(a_THP, sin_T1P, value=sign)
        a_THP.copy_(turned_THP)
        return
    wide = accumulate_dtype(x_TH2P)
    a, b = a_THP.to(wide), b_THP.to(wide)
    a_THP.copy_(a * cos_T1P - sign * b * sin_T1P)
    b_THP.copy_(b * cos_T1P + sign * a * sin_T1P)


# ---------------------------------------------------------------- swiglu


def swiglu(gate_TF: torch.Tensor, up_TF: torch.Tensor, out_TF: torch.Tensor) -> None:
    """out = silu(gate) * up, with silu(z) = z / (1 + exp(-z)) (Shazeer, arXiv 2002.05202)."""
    wide = accumulate_dtype(gate_TF)
    if gate_TF.dtype == out_TF.dtype == wide:
        torch.ops.aten.silu.out(gate_TF, out=out_TF)
        out_TF.mul_(up_TF)
    else:
        out_TF.copy_(torch.nn.functional.silu(gate_TF.to(wide)) * up_TF)


def swiglu_backward_(dh_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> None:
    """In place: h = silu(gate) * up over dh, d gate over gate, d up over up.

    With s = sigmoid(gate):  d up = dh * gate * s;  d gate = dh * up * s * (1 + gate * (1 - s))
    """
    wide = accumulate_dtype(gate_TF)
    if gate_TF.dtype == wide:
        silu_TF = torch.nn.functional.silu(gate_TF)
        dsilu_TF = dh_TF * up_TF
        torch.ops.aten.silu_backward.grad_input(dsilu_TF, gate_TF, grad_input=gate_TF)
        torch.mul(dh_TF, silu_TF, out=dsilu_TF)
        torch.mul(silu_TF, up_TF, out=dh_TF)
        up_TF.copy_(dsilu_TF)
        return
    dh, gate, up = (x.to(wide) for x in (dh_TF, gate_TF, up_TF))
    s = gate.sigmoid()
    dh_TF.copy_(gate * s * up)
    gate_TF.copy_(dh * up * s * (1 + gate * (1 - s)))
    up_TF.copy_(dh * gate * s)


# ---------------------------------------------------------------- nf4


def dequantise_nf4(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    absmax_code: torch.Tensor | None,
    absmax_scale: torch.Tensor | None,
    absmax_offset: float,
    levels: torch.Tensor,
    out_NK: torch.Tensor,
) -> None:
    """Write levels[nibble] * scale of bitsandbytes' NF4 into out, which may be strided.

    packed: uint8 [N * K / 2], the high nibble first. levels: fp32 [16].
    absmax: one scale per block of 64 weights: fp32, or uint8 of a second quantisation, whose value
        is absmax_code[u] * absmax_scale[block // 256] + absmax_offset (QLoRA, arXiv 2305.14314).
    """
    if absmax_code is None or absmax_scale is None:
        scale = absmax.float()
    else:
        group = torch.arange(len(absmax), device=absmax.device) // 256
        scale = absmax_code[absmax.long()] * absmax_scale[group] + absmax_offset
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten()[: out_NK.numel()].long()
    block = torch.arange(len(nibbles), device=packed.device) // 64
    out_NK.copy_((levels[nibbles] * scale[block]).view(out_NK.shape))


# ---------------------------------------------------------------- fp16acc


def scale_rows(x_TK: torch.Tensor, out_TK: torch.Tensor) -> torch.Tensor:
    """out = x * 2^e in fp16, the largest magnitude of a row in [4, 8); returns undo_T = 2^-e, fp32.

    e is read off the exponent's bits, and bounded so that both powers are normal numbers.
    """
    wide_TK = x_TK.float()
    exponent_T = (wide_TK.abs().amax(1).view(torch.int32) >> 23).clamp_(3)
    out_TK.copy_(wide_TK * ((256 - exponent_T) << 23).view(torch.float32)[:, None])
    return ((exponent_T - 2) << 23).view(torch.float32)


def mm_fp16_sums(x_TK: torch.Tensor, weight_KN: torch.Tensor, depth: int = 16) -> torch.Tensor:
    """x @ weight by a unit that keeps sums in fp16: `depth` products exactly, then to nearest."""
    total_TN = x_TK.new_zeros(len(x_TK), weight_KN.shape[1])
    for x_TC, weight_CN in zip(x_TK.split(depth, 1), weight_KN.split(depth), strict=True):
        total_TN = torch.addmm(total_TN.float(), x_TC.float(), weight_CN.float()).to(x_TK.dtype)
    return total_TN


def unscale_rows(sums_PTN: torch.Tensor, undo_T: torch.Tensor, out_TN: torch.Tensor) -> None:
    """out = undo * (sum over P pieces), added in fp32."""
    out_TN.copy_(sums_PTN.sum(0, dtype=torch.float32) * undo_T[:, None])


# ---------------------------------------------------------------- attention


def attention(
    q_UHD: torch.Tensor,
    k_TJD: torch.Tensor,
    v_TJD: torch.Tensor,
    seen_UT: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention under a mask of who sees whom: output [U, H, D] and log-sum-exp [U, H].

    Query head h reads key head h // (H / J). Memory: H * U * T scores.
    """
    wide = accumulate_dtype(q_UHD)
    groups = q_UHD.shape[1] // k_TJD.shape[1]
    k_THD, v_THD = (x.to(wide).repeat_interleave(groups, 1) for x in (k_TJD, v_TJD))
    scores_HUT = torch.einsum("uhd,thd->hut", q_UHD.to(wide), k_THD) * scale
    scores_HUT = scores_HUT.masked_fill(~seen_UT, float("-inf"))
    out_UHD = torch.einsum("hut,thd->uhd", scores_HUT.softmax(-1), v_THD)
    return out_UHD.to(q_UHD.dtype), scores_HUT.logsumexp(-1).T


# ---------------------------------------------------------------- dropout


def dropout_mask(
    seed: int, rate: float, rows: int, width: int, device: torch.device
) -> torch.Tensor:
    """A bool mask [rows, width], a pure function of its arguments: True where a value is kept.

    Element e = row * width + column takes the low (e even) or high (e odd) 16 bits of a 32-bit
    integer hash of e // 2, and is kept when they are >= `dropout_threshold(rate)`. The hash is two
    rounds of multiply and shift (C. Wellons' lowbias32 constants), begun at a hash of the seed.
    """
    elements = rows * width
    bits = torch.arange((elements + 1) // 2, dtype=torch.int32, device=device)
    _hash32_(bits.bitwise_xor_(signed(dropout_start(seed))))
    # Signed numbers compare as unsigned ones do when both have their top bit turned.
    lanes = bits.bitwise_xor_(signed(0x80008000)).view(torch.int16)[:elements]
    return (lanes >= dropout_threshold(rate) - 0x8000).view(rows, width)


def dropout_threshold(rate: float) -> int:
    """The rate in 65,536ths; what is kept is scaled by 65536 / (65536 - threshold)."""
    return round(rate * 65536)


def dropout_start(seed: int) -> int:
    """What a mask's counter is combined with: the hash of the seed's low 31 bits."""
    return hash32(seed & 0x7FFFFFFF)


def hash32(x: int) -> int:
    """lowbias32 of the low 32 bits of x."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & mask
    return x ^ (x >> 15)


def _hash32_(x: torch.Tensor) -> torch.Tensor:
    """`hash32` of each 32-bit pattern of an int32 tensor, in place; products wrap around."""
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, 1)):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1))  # no copies of the sign
        if factor != 1:
            x.mul_(signed(factor))
    return x


def signed(bits: int) -> int:
    """The int32 of a 32-bit pattern."""
    return bits - (bits >> 31 << 32)


# ---------------------------------------------------------------- lora


@dataclass(frozen=True)
class Dropout:
    """drop(X) = mask(seed) * X * scale, the mask that of `dropout_mask` over all of X."""

    rate: float
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= dropout_threshold(self.rate) < 65536:
            raise ValueError(f"dropout rate must be in [0, 1), got {self.rate}")

    @property
    def threshold(self) -> int:
        """The rate in 65,536ths."""
        return dropout_threshold(self.rate)

    @property
    def scale(self) -> float:
        """What a kept value is multiplied with."""
        return 65536 / (65536 - self.threshold)


# Rows [start, stop) of a stacked A, which see drop(X) in place of X.
Span = tuple[int, int, Dropout]


def pieces(rank: int, spans: Sequence[Span]) -> list[tuple[int, int, Dropout | None]]:
    """Rows [0, rank) cut at the spans, in order; None where rows see X itself.

    Raises: ValueError if spans overlap or leave [0, rank).
    """
    found: list[tuple[int, int, Dropout | None]] = []
    done = 0
    for start, stop, dropout in sorted(spans, key=lambda span: span[:2]):
        if not done <= start <= stop <= rank:
            raise ValueError(f"spans must lie apart in [0, {rank}), got {start}:{stop}")
        found += [(done, start, None), (start, stop, dropout)]
        done = stop
    found.append((done, rank, None))
    return [piece for piece in found if piece[0] < piece[1]]


def product(x_MK: torch.Tensor, y_KN: torch.Tensor) -> torch.Tensor:
    """x @ y in the accumulate dtype; a GPU keeps its fast product of half-precision operands."""
    wide = accumulate_dtype(x_MK)
    if x_MK.dtype == wide:
        return x_MK @ y_KN
    if x_MK.is_cuda:
        return torch.mm(x_MK, y_KN, out_dtype=wide)
    return x_MK.to(wide) @ y_KN.to(wide)


def shrink(x_TI: torch.Tensor, a_RI: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    """s = drop(x) a' with the dropout of each row of a."""
    s_TR = x_TI.new_empty(len(x_TI), len(a_RI))
    for start, stop, dropout in pieces(len(a_RI), spans):
        if dropout is None:
            torch.mm(x_TI, a_RI[start:stop].T, out=s_TR[:, start:stop])
        else:
            wide_TR = product(_mask_like(x_TI, dropout).mul_(x_TI), a_RI[start:stop].T)
            s_TR[:, start:stop] = wide_TR.mul_(dropout.scale)
    return s_TR


def rank_backward(
    dy_TN: torch.Tensor, s_TR: torch.Tensor, b_NR: torch.Tensor, db: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ds = dy b, and db = dy' s when it is wanted, in the accumulate dtype."""
    return torch.mm(dy_TN, b_NR), product(dy_TN.T, s_TR) if db else None


def a_backward(ds_TR: torch.Tensor, x_TI: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    """da = ds' drop(x) in the accumulate dtype, with the dropout of each row of a."""
    if not spans:
        return product(ds_TR.T, x_TI)
    rank, wide = ds_TR.shape[1], accumulate_dtype(x_TI)
    da_RI = torch.empty(rank, x_TI.shape[1], dtype=wide, device=x_TI.device)
    for start, stop, dropout in pieces(rank, spans):
        ds_RT = ds_TR[:, start:stop].T
        if dropout is None:
            da_RI[start:stop] = product(ds_RT, x_TI)
        else:
            masked_RI = product(ds_RT, _mask_like(x_TI, dropout).mul_(x_TI))
            torch.mul(masked_RI, dropout.scale, out=da_RI[start:stop])
    return da_RI


def input_backward_(
    dx_TI: torch.Tensor, ds_TR: torch.Tensor, a_RI: torch.Tensor, spans: Sequence[Span]
) -> None:
    """dx += mask * (ds a) * scale, with the mask of each row of a."""
    for start, stop, dropout in pieces(len(a_RI), spans):
        if dropout is None:
            dx_TI.addmm_(ds_TR[:, start:stop], a_RI[start:stop])
        else:
            grad_TI = product(ds_TR[:, start:stop], a_RI[start:stop])
            dx_TI.addcmul_(grad_TI, _mask_like(grad_TI, dropout), value=dropout.scale)


def _mask_like(x_TI: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """1 and 0 of x's dtype, which a CPU multiplies with five times as fast as with a bool."""
    make = _recent_mask if x_TI.device.type == "cpu" else dropout_mask
    rows, width = x_TI.shape
    return make(dropout.seed, dropout.rate, rows, width, x_TI.device).to(x_TI.dtype)


# A backward asks for the masks of q, k and v twice, the second time soon after the first.
_recent_mask = lru_cache(maxsize=3)(dropout_mask)


# ---------------------------------------------------------------- linear_logprob


def logits_of(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    softcap: float | None = None,
    out_CV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits in the accumulate dtype, c tanh(z / c) under a soft cap of c.

    `out_CV` is memory that may be used for them.
    """
    weight_VD = weight_VD.to(hidden_CD.dtype)
    if hidden_CD.dtype == accumulate_dtype(hidden_CD):
        logits_CV = torch.mm(hidden_CD, weight_VD.T, out=out_CV)
    else:
        logits_CV = product(hidden_CD, weight_VD.T)
    return logits_CV if softcap is None else soft_cap_(logits_CV, softcap)


def soft_cap_(logits_CV: torch.Tensor, softcap: float) -> torch.Tensor:
    """c tanh(z / c), in place."""
    return logits_CV.div_(softcap).tanh_().mul_(softcap)


def linear_log_probs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    softcap: float | None = None,
) -> torch.Tensor:
    """The definition, by log_softmax over all logits, differentiable in everything: what the fused
    head is held against, and what runs where the head itself is trained.
    """
    wide = accumulate_dtype(hidden_ND)
    logits_NV = hidden_ND.to(wide) @ weight_VD.to(wide).T
    if softcap is not None:
        logits_NV = softcap * (logits_NV / softcap).tanh()
    return logits_NV.log_softmax(-1).gather(1, target_N[:, None]).squeeze(1)


def log_probs_of_logits_(
    logits_CV: torch.Tensor, target_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the targets; over the logits is written total * (softmax - onehot).

    Returns: logp_C, and total_C1 = sum_v exp(z[v] - max z).
    Only the others' share is summed: of a sure token softmax - onehot is that share, and the
    difference of two numbers near 1 would be mostly rounding.
    """
    target_C1 = target_C[:, None]
    # In place, pass by pass: logsumexp would make a copy of the chunk and a second exponential.
    top_C1 = logits_CV.amax(1, keepdim=True)
    chosen_C1 = logits_CV.gather(1, target_C1).sub_(top_C1)
    power_CV = logits_CV.sub_(top_C1).exp_()
    others_C1 = power_CV.scatter_(1, target_C1, 0.0).sum(1, keepdim=True)
    power_CV.scatter_(1, target_C1, -others_C1)
    surplus_C1 = others_C1 + chosen_C1.expm1()  # total - 1
    return (chosen_C1 - surplus_C1.log1p()).squeeze(1), surplus_C1.add_(1.0)
