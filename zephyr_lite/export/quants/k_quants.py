"""The K types of GGML: super-blocks of 256 values whose small blocks share two fp16 numbers.

Formats and search: ggml-common.h and ggml-quants.c of llama.cpp (MIT), by formula. Each encoder
takes `x_SV`, fp32 [S super-blocks, 256], and returns [S, bytes] uint8.

Every small block looks for the scale (and the minimum) that its codes fit best under weighted
least squares; the scales of a super-block are then rounded to 6 or 8 bits of its largest, and the
codes are taken anew with the rounded ones. Three searches:

    q4_k, q5_k   32 values, x ~ scale code - minimum: a grid of scales, each solved in closed form
    q6_k         16 values, x ~ scale code: a grid of scales, each solved in closed form
    q3_k         16 values, x ~ scale code: one code at a time, while that improves the fit

All blocks of a chunk search at once. Values lie with the block *last* (`x_BN`): what belongs to a
block then broadcasts and adds up along whole rows. Sums go through a block in order, as ggml's do:
on a CPU the bytes equal those of a ggml built without fused multiply-add, but for the codes under a
scale that rounds to 0, which mean nothing and are 0 here. On a GPU, or against another build, some
blocks find another scale, which fits as well to 4 digits.

Suffixes: S super-blocks, V their 256 values, J small blocks of one, N = J S, B values of one.
"""

from __future__ import annotations

import math

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from torch.nn.functional import pad

from zephyr_lite.export.quants.blocks import Encoder, extreme, half_bytes, inverse, quotient

NOTHING = 1e-15  # a small block whose magnitudes are all below is stored as zeros
ROWS = 16  # torch adds up so many rows in order,
GROUP = 8  # where columns come in fours of vectors: 64, the small blocks of 8 super-blocks


def encode_q4_k(x_SV: Tensor) -> Tensor:
    """q4_k, 144 bytes: fp16 d, fp16 dmin, 12 bytes of 6-bit scales and minima, 128 of codes.

    x = d scale code - dmin minimum, code in 0..15. A byte of the codes holds a value of an even
    block (low nibble) and the same place of the next one.
    """
    head, codes_BJS = _fit_with_minima(x_SV, 15, first=-1.0, steps=20)
    return torch.cat([*head, _nibble_pairs(codes_BJS)], 1)


def encode_q5_k(x_SV: Tensor) -> Tensor:
    """q5_k, 176 bytes: the head of q4_k, 32 bytes of fifth bits, 128 of nibbles as in q4_k.

    Code in 0..31. Bit j of fifth byte i is value i's of block j.
    """
    head, codes_BJS = _fit_with_minima(x_SV, 31, first=-0.5, steps=15)
    fifth_BS = _gather_bits(codes_BJS >> 4, range(8))
    return torch.cat([*head, fifth_BS.t(), _nibble_pairs(codes_BJS)], 1)


def encode_q6_k(x_SV: Tensor) -> Tensor:
    """q6_k, 210 bytes: 128 of low nibbles, 64 of upper bit pairs, 16 int8 scales, fp16 d.

    x = d scale (code - 32). Either half of 128 values is four runs of 32, r0 to r3: 32 bytes hold
    the nibbles of r0 and r2, 32 those of r1 and r3, and a byte of pairs one of each run.
    """
    x_BJS = _small_blocks(x_SV, 16)
    scale_JS = _search_scale(x_BJS.flatten(1), 32).view(16, -1)
    step_1S = _step(scale_JS, -128)
    levels_JS = (scale_JS * inverse(step_1S)).round_().clamp_(-128, 127)
    d_S2 = half_bytes(step_1S.t())
    codes_BJS = _signed_codes(x_BJS, _halves(step_1S) * levels_JS, 32)
    runs = codes_BJS.view(16, 2, 4, 2, -1).permute(4, 1, 2, 3, 0).reshape(-1, 2, 4, 32)
    low = (runs[:, :, :2] & 15) | (runs[:, :, 2:] << 4)
    pairs = _gather_bits(runs >> 4, (0, 2, 4, 6), dim=2)
    scales_SJ = levels_JS.t().to(torch.int8).contiguous().view(torch.uint8)
    return torch.cat([low.flatten(1), pairs.flatten(1), scales_SJ, d_S2], 1)


def encode_q3_k(x_SV: Tensor) -> Tensor:
    """q3_k, 110 bytes: 32 of third bits, 64 of lower bit pairs, 12 of 6-bit scales, fp16 d.

    x = d (scale - 32) (code - 4). Bit r of third byte i is value i's of run r (eight runs of 32),
    and a byte of pairs holds one of each run of its half. Scales: low nibbles of the first eight
    below those of the others, then the upper pairs of scales j, j + 4, j + 8, j + 12 in byte j.
    """
    x_BJS = _small_blocks(x_SV, 16)
    scale_JS = _search_codes(x_BJS.flatten(1), 4).view(16, -1)
    step_1S = _step(scale_JS, -32)
    levels_JS = (scale_JS * inverse(step_1S)).round_().clamp_(-32, 31)
    d_S2 = half_bytes(step_1S.t())
    codes_BJS = _signed_codes(x_BJS, _halves(step_1S) * levels_JS, 4)
    runs = codes_BJS.view(16, 8, 2, -1).permute(3, 1, 2, 0).reshape(-1, 8, 32)
    third = _gather_bits(runs >> 2, range(8), dim=1)
    pairs = _gather_bits((runs & 3).view(-1, 2, 4, 32), (0, 2, 4, 6), dim=2)
    six_SJ = (levels_JS.t() + 32).masked_fill_(step_1S.t() == 0, 0).to(torch.uint8)
    low = (six_SJ[:, :8] & 15) | (six_SJ[:, 8:] << 4)
    high = _gather_bits((six_SJ >> 4).view(-1, 4, 4), (0, 2, 4, 6), dim=1)
    return torch.cat([third, pairs.flatten(1), low, high, d_S2], 1)


def _in_groups(encode: Encoder) -> Encoder:
    """`encode` for any number of super-blocks, in whole groups.

    torch adds a column in order where whole vectors of columns lie side by side.
    """

    def encode_padded(x_SV: Tensor) -> Tensor:
        missing = -len(x_SV) % GROUP
        return encode(pad(x_SV, (0, 0, 0, missing)))[: len(x_SV)] if missing else encode(x_SV)

    return encode_padded


ENCODERS: dict[Kind, Encoder] = {
    Kind.Q3_K: _in_groups(encode_q3_k),
    Kind.Q4_K: _in_groups(encode_q4_k),
    Kind.Q5_K: _in_groups(encode_q5_k),
    Kind.Q6_K: _in_groups(encode_q6_k),
}


def _fit_with_minima(
    x_SV: Tensor, top: int, *, first: float, steps: int
) -> tuple[list[Tensor], Tensor]:
    """Head (d, dmin, scales and minima, as bytes [S, ...]) and codes [32, 8, S] of 0..top."""
    x_BJS = _small_blocks(x_SV, 32)
    scale_N, low_N = _search_scale_and_minimum(x_BJS.flatten(1), top, first, steps)
    d_1S, scales_JS = _six_bits(scale_N.view(8, -1))
    dmin_1S, minima_JS = _six_bits(-low_N.view(8, -1))
    scale_JS, minimum_JS = _halves(d_1S) * scales_JS, _halves(dmin_1S) * minima_JS
    scale_JS.masked_fill_(scale_JS == 0, math.inf)
    codes_BJS = (x_BJS + minimum_JS).div_(scale_JS).round_().clamp_(0, top).to(torch.uint8)
    head = [half_bytes(d_1S.t()), half_bytes(dmin_1S.t())]
    return [*head, _pack_six_bits(scales_JS, minima_JS)], codes_BJS


def _search_scale_and_minimum(
    x_BN: Tensor, top: int, first: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Scale and minimum (at most 0) of each block: x ~ scale code + minimum, code in 0..top.

    Weights are |x| + rms. The grid stretches the codes over (top + first + i / 10) steps from the
    *best minimum so far* to the largest value; codes given, scale and minimum solve the normal
    equations. A minimum above 0 is 0. The codes are not kept: they depend on the rounded scales.
    """
    codes_BN, wc_BN, error_BN = (torch.empty_like(x_BN) for _ in range(3))
    mean_N = _sum(torch.mul(x_BN, x_BN, out=error_BN)).div_(len(x_BN))
    rms_N = mean_N.double().sqrt_().float()  # torch's own fp32 root is not the nearest
    weight_BN = x_BN.abs().add_(rms_N)
    w_N, wx_N = _sum(error_BN.copy_(weight_BN)), _sum(torch.mul(weight_BN, x_BN, out=error_BN))
    high_N, low_N = x_BN.amax(0), x_BN.amin(0).clamp_(max=0)
    flat_N = high_N == low_N
    high_N = torch.where(flat_N, low_N + 1, high_N)  # its codes are all 0: nothing improves

    def take_codes(stretch_N: Tensor) -> None:
        torch.sub(x_BN, low_N, out=codes_BN).mul_(stretch_N).round_().clamp_(0, top)

    def error(scale_N: Tensor, low_N: Tensor) -> Tensor:
        torch.mul(codes_BN, scale_N, out=error_BN).add_(low_N).sub_(x_BN)
        return _sum(error_BN.mul_(error_BN).mul_(weight_BN))

    stretch_N = quotient(top, high_N - low_N)
    take_codes(stretch_N)
    scale_N = 1 / stretch_N
    best_N = error(scale_N, low_N)
    for stretch in _grid(first, 0.1, range(steps + 1), top):
        take_codes(quotient(stretch, high_N - low_N))
        torch.mul(weight_BN, codes_BN, out=wc_BN)
        wcc_N = _sum(torch.mul(wc_BN, codes_BN, out=error_BN))
        wcx_N = _sum(torch.mul(wc_BN, x_BN, out=error_BN))
        wc_N = _sum(wc_BN)
        determinant_N = w_N * wcc_N - wc_N * wc_N
        tried_N = (w_N * wcx_N - wx_N * wc_N) / determinant_N
        tried_low_N = (wcc_N * wx_N - wc_N * wcx_N) / determinant_N
        above_N = tried_low_N > 0
        tried_N = torch.where(above_N, wcx_N / wcc_N, tried_N)
        tried_low_N.masked_fill_(above_N, 0)
        tried_error_N = error(tried_N, tried_low_N)
        better_N = (tried_error_N < best_N) & (determinant_N > 0)
        best_N = torch.where(better_N, tried_error_N, best_N)
        scale_N = torch.where(better_N, tried_N, scale_N)
        low_N = torch.where(better_N, tried_low_N, low_N)
    return scale_N.masked_fill_(flat_N, 0), low_N


def _search_scale(x_BN: Tensor, top: int) -> Tensor:
    """Scale of each block: x ~ scale code, code in -top..top - 1, the extreme at about -top.

    Weights are x^2. With codes given the best scale is sum(w x c) / sum(w c c) and the fit gains
    sum(w x c)^2 / sum(w c c), which the grid of nineteen stretches makes as large as it can.
    """
    extreme_N = extreme(x_BN, 0)[0]
    weight_BN = x_BN * x_BN
    wx_BN = weight_BN * x_BN
    codes_BN, product_BN = torch.empty_like(x_BN), torch.empty_like(x_BN)
    scale_N = best_N = extreme_N * 0  # NaN for a block that is not finite, and stays it
    for stretch in _grid(0, 0.1, (0, *range(-9, 0), *range(1, 10)), top):
        torch.mul(x_BN, quotient(-stretch, extreme_N), out=codes_BN).round_().clamp_(-top, top - 1)
        wxc_N = _sum(torch.mul(wx_BN, codes_BN, out=product_BN))
        wcc_N = _sum(torch.mul(weight_BN, codes_BN, out=product_BN).mul_(codes_BN))
        better_N = (wcc_N > 0) & (wxc_N * wxc_N > best_N * wcc_N)
        scale_N = torch.where(better_N, wxc_N / wcc_N, scale_N)
        best_N = torch.where(better_N, scale_N * wxc_N, best_N)
    return _without_nothing(scale_N, extreme_N)


def _search_codes(x_BN: Tensor, top: int) -> Tensor:
    """Scale of each block as in `_search_scale`, found by moving one code at a time.

    Each value in turn takes the code that the best scale of the *others* gives it, if that makes
    sum(w x c)^2 / sum(w c c) larger; five times through the block, or until nothing moves.
    """
    extreme_N = extreme(x_BN, 0)[0]
    weight_BN = x_BN * x_BN
    wx_BN = weight_BN * x_BN
    codes_BN = (x_BN * quotient(-top, extreme_N)).round_().clamp_(-top, top - 1)
    wxc_N = _sum(wx_BN * codes_BN)
    wcc_N = _sum((weight_BN * codes_BN).mul_(codes_BN))
    scale_N = wxc_N / wcc_N
    left = torch.arange(len(scale_N), device=x_BN.device)
    for _ in range(5):
        moved_N = torch.zeros_like(wxc_N, dtype=torch.bool)
        for x_N, w_N, wx_N, code_N in zip(x_BN, weight_BN, wx_BN, codes_BN, strict=True):
            other_wxc_N = wxc_N - wx_N * code_N
            other_wcc_N = wcc_N - (w_N * code_N).mul_(code_N)
            tried_N = (x_N * other_wcc_N).div_(other_wxc_N).round_().clamp_(-top, top - 1)
            tried_wxc_N = other_wxc_N + wx_N * tried_N
            tried_wcc_N = other_wcc_N + (w_N * tried_N).mul_(tried_N)
            gain_N = (tried_wxc_N * tried_wxc_N).mul_(wcc_N)
            better_N = gain_N > (wxc_N * wxc_N).mul_(tried_wcc_N)
            better_N &= (other_wxc_N > 0) & (tried_wcc_N > 0) & (tried_N != code_N)
            code_N.copy_(torch.where(better_N, tried_N, code_N))
            wxc_N = torch.where(better_N, tried_wxc_N, wxc_N)
            wcc_N = torch.where(better_N, tried_wcc_N, wcc_N)
            moved_N |= better_N
        scale_N[left] = wxc_N / wcc_N
        places = moved_N.nonzero().squeeze(1)  # a block in which nothing moved is done
        left, wxc_N, wcc_N = left[places], wxc_N[places], wcc_N[places]
        x_BN, weight_BN, wx_BN, codes_BN = (
            t.index_select(1, places) for t in (x_BN, weight_BN, wx_BN, codes_BN)
        )
    return _without_nothing(scale_N, extreme_N)


def _grid(first: float, step: float, places: range | tuple[int, ...], top: int) -> list[float]:
    """top + first + step i for each place i, in the roundings of fp32."""
    places_I = torch.tensor(list(places), dtype=torch.float32)
    return (places_I * step + first + top).tolist()


def _sum(scratch_BN: Tensor) -> Tensor:
    """Sum over the rows, one after the other as ggml adds; changes `scratch_BN`.

    torch adds 16 rows in order and more of them in groups of 16.
    """
    if len(scratch_BN) > ROWS:
        scratch_BN[ROWS] += scratch_BN[:ROWS].sum(0)
        return scratch_BN[ROWS:].sum(0)
    return scratch_BN.sum(0)


def _without_nothing(scale_N: Tensor, extreme_N: Tensor) -> Tensor:
    """0 for a block of (nearly) zeros, whose quotients mean nothing."""
    return scale_N.masked_fill_(extreme_N.abs() < NOTHING, 0)


def _small_blocks(x_SV: Tensor, size: int) -> Tensor:
    """[S, 256] -> [size, 256 / size, S], contiguous."""
    return x_SV.view(len(x_SV), -1, size).permute(2, 1, 0).contiguous()


def _halves(step: Tensor) -> Tensor:
    """The values that fp16 keeps of `step`."""
    return step.to(torch.float16).to(torch.float32)


def _step(scale_JS: Tensor, levels: int) -> Tensor:
    """The extreme scale of a super-block / levels, [1, S]; 0 where there is (nearly) nothing."""
    extreme_1S = extreme(scale_JS, 0)
    return (extreme_1S / levels).masked_fill_(extreme_1S.abs() < NOTHING, 0)


def _six_bits(value_JS: Tensor) -> tuple[Tensor, Tensor]:
    """The step 1/63 of the largest, [1, S], and the multiples of it, 0..63, [J, S]."""
    largest_1S = value_JS.amax(0, keepdim=True).clamp_(min=0).abs_()  # no negative zero
    factor_1S = quotient(63, largest_1S).masked_fill_(largest_1S == 0, 0)
    return quotient(largest_1S, 63), (value_JS * factor_1S).round_().clamp_(0, 63)


def _pack_six_bits(scales_JS: Tensor, minima_JS: Tensor) -> Tensor:
    """Two times eight 6-bit numbers -> [S, 12].

    The first four of each, with the upper pairs of the last four on top; then the lower nibbles of
    the last four, scale below minimum.
    """
    scales, minima = (levels.t().to(torch.uint8) for levels in (scales_JS, minima_JS))
    first = [levels[:, :4] | (levels[:, 4:] >> 4 << 6) for levels in (scales, minima)]
    return torch.cat([*first, (scales[:, 4:] & 15) | (minima[:, 4:] << 4)], 1)


def _signed_codes(x_BJS: Tensor, scale_JS: Tensor, top: int) -> Tensor:
    """round(x / scale) in -top..top - 1, stored from 0 on; 0 where the scale is 0."""
    nothing_JS = scale_JS == 0
    divisor_JS = scale_JS.masked_fill(nothing_JS, math.inf)
    codes_BJS = (x_BJS / divisor_JS).round_().clamp_(-top, top - 1).add_(top).to(torch.uint8)
    return codes_BJS.masked_fill_(nothing_JS, 0) if nothing_JS.any() else codes_BJS


def _nibble_pairs(codes_BJS: Tensor) -> Tensor:
    """[32, 8, S] codes -> [S, 128]: blocks in pairs, the second in the upper nibbles."""
    pairs_BPS = (codes_BJS[:, 0::2] & 15) | (codes_BJS[:, 1::2] << 4)
    return pairs_BPS.permute(2, 1, 0).reshape(-1, 128)


def _gather_bits(parts: Tensor, shifts: range | tuple[int, ...], dim: int = 1) -> Tensor:
    """The parts along `dim`, each moved up by its shift, in one byte."""
    merged, *others = (part << by for part, by in zip(parts.unbind(dim), shifts, strict=True))
    for part in others:
        merged |= part
    return merged
