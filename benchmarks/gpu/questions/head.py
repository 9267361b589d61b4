"""What do fp32 logits cost over bf16 logits in the frozen head, and what do they save in error?

Log-probabilities are taken in fp32 from either; the truth is fp64 throughout from the same bf16
operands. Synthetic head with a logit deviation of 2.6. The bf16 row is the habit, not a candidate:
its error, summed over an answer of 128 tokens, is what a preference margin would carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from gpu.bench import Bench, Case, Check
from gpu.rows import Measure, Part, figure

PART = Part("head", 1, "Frozen head: fp32-out GEMM against bf16-out, time and log-prob error?")
CHECKED_ROWS = 256
ANSWER_TOKENS = 128
# An fp32 sum of 4096 products, then log-sum-exp over 32000: far above its rounding, far below
# the 1e-2 of bf16 logits.
FP32_BOUND_NATS = 1e-3


def cases(bench: Bench) -> Iterator[Case]:
    """Chunks of 1024, 2048 and 4096 predicting rows."""
    vocabulary, hidden = bench.pick((32000, 4096), (512, 64))
    for rows in bench.pick((1024, 2048, 4096), (32,)):
        shape = {"rows": rows, "vocabulary": vocabulary, "hidden": hidden}
        yield Case(shape, lambda s=shape: _measure(bench, s))


def log_probs(logits_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """Log-probability of each target, at least in fp32 whatever the logits are."""
    precise = logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()
    return precise.log_softmax(dim=-1).gather(1, target_T[:, None]).squeeze(1)


def _measure(bench: Bench, shape: dict[str, int]) -> Iterator[Measure]:
    rows, vocabulary, hidden = (shape[key] for key in ("rows", "vocabulary", "hidden"))
    x_TD = bench.randn(rows, hidden)
    weight_VD = bench.randn(vocabulary, hidden, std=2.6 * hidden**-0.5)
    target_T = torch.randint(vocabulary, (rows,), device=bench.device)
    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "bf16_logits": lambda: x_TD @ weight_VD.T,
        "fp32_logits": lambda: torch.mm(x_TD, weight_VD.T, out_dtype=torch.float32),
        "fp32_logits_of_upcast_operands": lambda: x_TD.float() @ weight_VD.float().T,
    }
    some = slice(0, CHECKED_ROWS)
    truth_T = log_probs(x_TD[some].double() @ weight_VD.double().T, target_T[some])
    running = {}
    for name, candidate in candidates.items():
        logits = bench.probe(name, candidate)
        if isinstance(logits, Measure):
            yield logits
            continue
        error_T = log_probs(logits[some], target_T[some]).double() - truth_T
        del logits
        yield from _errors(name, error_T)
        if name == "bf16_logits" or Check(float(error_T.abs().max()), FP32_BOUND_NATS).is_right:
            running[name] = candidate
    timings = bench.race(running)
    for name, timing in timings.items():
        ratio = timing.p50_ms / timings["bf16_logits"].p50_ms
        flops = 2 * rows * vocabulary * hidden
        yield bench.speed(name, timing, flops=flops, times_bf16_ms=ratio)


def _errors(name: str, error_T: torch.Tensor) -> Iterator[Measure]:
    answers = error_T[: len(error_T) // ANSWER_TOKENS * ANSWER_TOKENS].view(-1, ANSWER_TOKENS)
    sums = {"mean_answer_sum_nats": float(answers.sum(1).mean())} if len(answers) else {}
    check = Check(float(error_T.abs().max()), FP32_BOUND_NATS)
    if name != "bf16_logits" and not check.is_right:
        yield check.measure(f"{name}_worst_error")
        return
    mean = float(error_T.abs().mean())
    signed, worst = float(error_T.mean()), float(error_T.abs().max())
    yield figure(
        f"{name}_error", "nats/token", mean, signed_mean_nats=signed, worst_nats=worst, **sums
    )
