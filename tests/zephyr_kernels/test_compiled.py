"""The kernels compile for GPUs that are not here, and move 16 bytes an instruction.

The interpreter knows nothing of types, layouts or vector widths. Triton compiles without a GPU, so
the launches of a Mistral-7B layer are recorded on the meta device and compiled in a process of
their own, since this one interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from zephyr_kernels import backend

ARCHITECTURES = (86, 120)  # RTX 3090 and RTX 5090
SHARED_BYTES = 99 * 1024  # of a program, on either
# Whose loads and stores follow the layout of a product's tile or of a reduction, narrower in part.
TILED = {
    "shrink_kernel", "a_backward_kernel", "input_backward_kernel", "rank_backward_kernel",
    "row_log_prob_kernel",
}  # fmt: skip

COMPILE = """
import json, re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from zephyr_kernels import backend, fp16acc, linear_logprob, lora, nf4, norm, rope, swiglu

POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8",
    torch.int64: "*i64",
}
launches = []

def record(kernel, grid, *arguments, num_warps, num_stages=3, **constants):
    options = {"num_warps": num_warps, "num_stages": num_stages}
    launches.append((kernel, arguments, options, constants))

def source(kernel, arguments, constants):
    # As Triton specialises a launch: on None, on 1, and on what 16 divides.
    signature, constants, attributes = {}, dict(constants), {}
    for i, name in enumerate(kernel.arg_names):
        value = constants.get(name) if i >= len(arguments) else arguments[i]
        if i >= len(arguments) or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = (
            POINTERS[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        )
        if is_tensor or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attrs=attributes)

for module in (fp16acc, linear_logprob, lora, nf4, norm, rope, swiglu):
    module.launch = record
backend.use("triton")
torch.set_default_device("meta")
T, D, F, R = 4096, 4096, 14336, 48

def rows(width, wide=None):
    return torch.empty(T, wide or width, dtype=torch.bfloat16)[:, :width]

gain = torch.empty(D, dtype=torch.bfloat16)
norm.rms_norm(rows(D), gain, 1e-5, rows(D, D + R))
norm.add_rms_norm_(rows(D), rows(D), gain, 1e-5, rows(D, D + R))
norm.rms_norm_backward_(rows(D), rows(D), gain, torch.empty(T))
norm.rms_norm_backward_(rows(D), rows(D), gain, torch.empty(T), rows(D))
packed = torch.empty(T, 48, 128, dtype=torch.bfloat16)
for interleaved in (False, True):
    rope.rotate_(packed[:, :40], torch.empty(T, 64), torch.empty(T, 64), interleaved=interleaved)
gate_up = rows(2 * F)
swiglu.swiglu(gate_up[:, :F], gate_up[:, F:], rows(F, F + R))
swiglu.swiglu_backward_(rows(F), gate_up[:, :F], gate_up[:, F:])
for width in (D, F):
    fp16acc.scale_rows(rows(width))
for pieces in (1, 4):
    fp16acc.unscale_rows(
        torch.empty(pieces, T, D, dtype=torch.float16), torch.empty(T), torch.bfloat16
    )
for absmax, nested in ((torch.empty(D * F // 64), ()), (
    torch.empty(D * F // 64, dtype=torch.uint8), (torch.empty(256), torch.empty(D * F // 64 // 256))
)):
    weight = nf4.Nf4(
        torch.empty(D * F // 2, 1, dtype=torch.uint8), absmax, *(nested or (None, None)), 0.1,
        torch.empty(16), (D, F),
    )
    nf4.dequantise(weight, torch.empty(D, F + R, dtype=torch.bfloat16)[:, :F])

masks = [(start, start + 16, lora.Dropout(0.05, start)) for start in (0, 16, 32)]
a, s = torch.empty(R, D, dtype=torch.bfloat16), torch.empty(T, R, dtype=torch.bfloat16)
lora._launch_shrink(rows(D), a, masks)
lora._launch_a_backward(s, rows(D), masks)
lora._launch_input_backward(rows(D), s, a, masks)
b = torch.empty(D, 16, dtype=torch.bfloat16)
lora._launch_rank_backward(rows(D), torch.empty(T, 16, dtype=torch.bfloat16), b)
head = torch.empty(32000, D, dtype=torch.bfloat16)
target, grad = torch.empty(64, dtype=torch.int64), torch.empty(64, D, dtype=torch.bfloat16)
linear_logprob._triton_chunk(torch.empty(64, 32000), head, target, None, grad)

found = []
for kernel, arguments, options, constants in launches:
    for architecture in json.loads(sys.argv[1]):
        compiled = triton.compile(
            source(kernel, arguments, constants),
            target=GPUTarget("cuda", architecture, 32),
            options=options | {"enable_fp_fusion": False},
        )
        moves = re.findall(r"(?:ld|st)[.]global[.][a-z0-9.]+", compiled.asm["ptx"])
        fused = len(re.findall(r"fma[.]rn[.]f32", compiled.asm["ptx"]))
        shared = compiled.metadata.shared
        found.append((kernel.__name__, architecture, sorted(set(moves)), fused, shared))
print(json.dumps(found))
"""


@pytest.mark.skipif(not backend.HAS_TRITON, reason="needs triton")
def test_every_kernel_compiles_and_moves_16_bytes_at_a_time(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(ARCHITECTURES)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout)
    assert len(compiled) == 20 * len(ARCHITECTURES)
    for name, architecture, moves, fused, shared in compiled:
        where = f"{name} on sm{architecture}: {moves}"
        assert shared <= SHARED_BYTES, f"{where}: {shared} bytes of shared memory"
        if name in TILED:
            continue
        assert "st.global.v4.b32" in moves, where
        # What is left in single words: a row's rstd or scale, its target, NF4's table and its
        # bytes, four at a time.
        assert set(moves) <= {
            "ld.global.v4.b32", "st.global.v4.b32", "ld.global.b32", "st.global.b32",
            *(["ld.global.b8"] if name == "dequantise_kernel" else []),
            *(["ld.global.b64"] if name == "excess_kernel" else []),
        }, where  # fmt: skip
        assert not fused, f"{where}: {fused} fused multiply-adds"
