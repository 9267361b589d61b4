"""Trials of norm, rotation, SwiGLU and the head's log-probs; see trial.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from zephyr_kernels import linear_logprob, norm, rope, swiglu

from gpu.bench import Bench
from gpu.trials.trial import Outputs, Trial, poisoned, still_poisoned

EPS = 1e-5


# ---------------------------------------------------------------- norm


def _norm(x_TD: torch.Tensor, gain_D: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers does it: statistics in fp32, the normed row rounded, then the gain."""
    wide_TD = x_TD if x_TD.dtype == torch.float64 else x_TD.float()
    rstd_T1 = (wide_TD.square().mean(1, keepdim=True) + EPS).rsqrt()
    return gain_D * (wide_TD * rstd_T1).to(x_TD.dtype), rstd_T1.squeeze(1)


def _gain(bench: Bench, width: int, dtype: torch.dtype) -> torch.Tensor:
    return (1 + bench.randn(width, std=0.2, dtype=torch.float32)).to(dtype)


def norm_forward(bench: Bench, dtype: torch.dtype, tokens: int, width: int, add: bool) -> Trial:
    """`rms_norm`, or `add_rms_norm_`, into strided rows."""
    x, gain = bench.randn(tokens, width, dtype=dtype), _gain(bench, width, dtype)
    delta = bench.randn(tokens, width, dtype=dtype)

    def ours() -> Outputs:
        out, behind = poisoned(tokens, width, x)
        stream = delta.clone()
        if add:
            y, rstd = norm.add_rms_norm_(stream, x, gain, EPS, out)
        else:
            y, rstd = norm.rms_norm(x, gain, EPS, out)
        still_poisoned(behind)
        return {"y": y, "rstd": rstd} | ({"sum": stream} if add else {})

    def formula(x: torch.Tensor, delta: torch.Tensor, gain: torch.Tensor) -> Outputs:
        stream = delta + x if add else x
        y, rstd = _norm(stream, gain)
        return {"y": y, "rstd": rstd} | ({"sum": stream} if add else {})

    return Trial(ours, formula, (x, delta, gain))


def norm_backward(
    bench: Bench, dtype: torch.dtype, tokens: int, width: int, residual: bool
) -> Trial:
    """`rms_norm_backward_`, with or without the gradient of the residual stream."""
    dy, x, stream = (bench.randn(tokens, width, dtype=dtype) for _ in range(3))
    gain = _gain(bench, width, dtype)

    def ours() -> Outputs:
        _, rstd = norm.rms_norm(x, gain, EPS)
        added = stream if residual else None
        return {"dx": norm.rms_norm_backward_(dy.clone(), x, gain, rstd, added)}

    def formula(
        dy: torch.Tensor, x: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor
    ) -> Outputs:
        leaf = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(_norm(leaf, gain)[0], leaf, dy)
        return {"dx": dx + stream if residual else dx}

    return Trial(ours, formula, (dy, x, stream, gain))


# ---------------------------------------------------------------- rope


def angles(bench: Bench, tokens: int, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, P] in fp32 of positions that restart every 37 tokens, at 5."""
    position_T1 = (5 + torch.arange(tokens, device=bench.device) % 37)[:, None]
    angle_TP = position_T1 * 10000.0 ** (-torch.arange(half, device=bench.device) / half)
    return angle_TP.cos(), angle_TP.sin()


def rotation(
    bench: Bench, dtype: torch.dtype, tokens: int, heads: int, width: int, interleaved: bool,
    inverse: bool,
) -> Trial:  # fmt: skip
    """`rotate_` on the first heads of a packed tensor; the two behind them stay as they are."""
    packed = bench.randn(tokens, heads + 2, width, dtype=dtype)
    cos, sin = angles(bench, tokens, width // 2)

    def ours() -> Outputs:
        turned = packed.clone()
        rope.rotate_(turned[:, :heads], cos, sin, interleaved=interleaved, inverse=inverse)
        return {"turned": turned[:, :heads], "rest": turned[:, heads:]}

    def formula(packed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Outputs:
        x = packed[:, :heads]
        cos_T1P, sin_T1P = (table[:, None].to(x.dtype) for table in (cos, sin))
        sin_T1P = -sin_T1P if inverse else sin_T1P
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        pair = (a * cos_T1P - b * sin_T1P, b * cos_T1P + a * sin_T1P)
        turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return {"turned": turned, "rest": packed[:, heads:]}

    return Trial(ours, formula, (packed, cos, sin))


# ---------------------------------------------------------------- swiglu


def swiglu_forward(bench: Bench, dtype: torch.dtype, tokens: int, width: int) -> Trial:
    """`swiglu` of the two halves of one buffer, into strided rows."""
    gate_up = bench.randn(tokens, 2 * width, dtype=dtype)

    def ours() -> Outputs:
        out, behind = poisoned(tokens, width, gate_up)
        gate, up = gate_up.chunk(2, 1)
        swiglu.swiglu(gate, up, out)
        still_poisoned(behind)
        return {"h": out}

    def formula(gate_up: torch.Tensor) -> Outputs:
        gate, up = gate_up.chunk(2, 1)
        return {"h": F.silu(gate) * up}

    return Trial(ours, formula, (gate_up,))


def swiglu_backward(bench: Bench, dtype: torch.dtype, tokens: int, width: int) -> Trial:
    """`swiglu_backward_`: h, d gate and d up in place."""
    gate_up, dh = (bench.randn(tokens, n * width, dtype=dtype) for n in (2, 1))

    def ours() -> Outputs:
        written, h = gate_up.clone(), dh.clone()
        gate, up = written.chunk(2, 1)
        swiglu.swiglu_backward_(h, gate, up)
        return {"h": h, "dgate": gate, "dup": up}

    def formula(gate_up: torch.Tensor, dh: torch.Tensor) -> Outputs:
        gate, up = (x.detach().requires_grad_() for x in gate_up.chunk(2, 1))
        h = F.silu(gate) * up
        dgate, dup = torch.autograd.grad(h, (gate, up), dh)
        return {"h": h.detach(), "dgate": dgate, "dup": dup}

    return Trial(ours, formula, (gate_up, dh))


# ---------------------------------------------------------------- linear_logprob


def head(
    bench: Bench, dtype: torch.dtype, rows: int, width: int, vocabulary: int, softcap: float | None
) -> Trial:
    """`log_probs` with its gradient, in chunks that do not divide, and as the reference pass."""
    hidden = bench.randn(rows, width, dtype=dtype)
    weight = bench.randn(vocabulary, width, std=2.6 * width**-0.5, dtype=dtype)
    target = torch.randint(vocabulary, (rows,), device=bench.device)
    upstream = bench.randn(rows, dtype=torch.float32)
    chunk = max(1, rows // 2 - 1)

    def ours() -> Outputs:
        leaf = hidden.clone().requires_grad_()
        logp = linear_logprob.log_probs(leaf, weight, target, chunk_rows=chunk, softcap=softcap)
        (dhidden,) = torch.autograd.grad(logp, leaf, upstream)
        again = linear_logprob.log_probs(hidden, weight, target, chunk_rows=rows, softcap=softcap)
        return {"logp": logp.detach(), "dhidden": dhidden, "logp_of_reference_pass": again}

    def formula(
        hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, upstream: torch.Tensor
    ) -> Outputs:
        leaf = hidden.detach().requires_grad_()
        logits = leaf @ weight.T
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        precise = logits if logits.dtype == torch.float64 else logits.float()
        logp = precise.log_softmax(1).gather(1, target[:, None]).squeeze(1)
        (dhidden,) = torch.autograd.grad(logp, leaf, upstream)
        logp = logp.detach()
        return {"logp": logp, "dhidden": dhidden, "logp_of_reference_pass": logp}

    return Trial(ours, formula, (hidden, weight, target, upstream))
