"""A GGUF file running in llama.cpp: tokens, template, log-probabilities, text.

Runs the server of the `xllamacpp` wheel inside this process, on 127.0.0.1, a free port and a key of
its own. Full-vocabulary log-probabilities along a given text take one request for many positions:
a grammar of token ids (`root ::= <[17]> <[4]> ...`) forces what is generated, and the
probabilities llama.cpp reports are those before the grammar touches them. Of those replies only the
two numbers of each entry are read, by pattern: parsed as JSON, 32,000 entries cost 160 ms a
position (most of it the garbage collector's), so 26, beside the server's own 120.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from zephyr_lite.errors import MachineError, StorageError

StopReason = Literal["eos", "length", "word"]
STOP_REASONS: dict[str, StopReason] = {"eos": "eos", "limit": "length", "word": "word"}
# llama.cpp takes the log of an fp32 probability; below the smallest one it reports -FLT_MAX.
FLOOR = -104.0
ROWS_LIMIT = 250_000  # probabilities per request: about 25 MB of JSON
UPGRADE = "pip install --upgrade 'zephyr-lite[llama]'"
# In JSON text a quote inside a string is escaped, so no token's own text can match these.
_REPORTED = b'"completion_probabilities":['
_ID = re.compile(rb'"id":(\d+),')
_LOG_PROB = re.compile(rb'"logprob":(-?\d[\d.eE+-]*)[,}]')


class LlamaCppModel:
    """A loaded model; use as a context manager. Not safe for several threads."""

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 2048,
        exact: bool = False,
        threads: int | None = None,
    ) -> None:
        """Nothing is loaded before `with`.

        Args:
            n_ctx: context, tokens.
            exact: keep the cache in f32 and use no flash attention, which computes in fp16; for
                comparisons (KL of an F32 file to its model: 1e-6 without this, 1e-9 with it).
            threads: CPU threads; default: llama.cpp's.
        Raises: MachineError when the `llama` extra is not installed.
        """
        self.path, self.n_ctx, self.exact, self.threads = path, n_ctx, exact, threads
        self._package = _import_package()
        self._server: Any = None
        self._key = secrets.token_urlsafe(24)
        self._connection: http.client.HTTPConnection | None = None

    def __enter__(self) -> LlamaCppModel:
        if not self.path.is_file():
            raise StorageError(f"{self.path}: does not exist")
        try:
            self._server = self._package.Server(self._parameters())
        except RuntimeError:
            # The wheel gives no reason; what it refuses is mostly a damaged or foreign file.
            raise StorageError(
                f"{self.path}: llama.cpp cannot load it", hint="export the file again"
            ) from None
        address = self._server.listening_address.removeprefix("http://")
        self._connection = http.client.HTTPConnection(address, timeout=3600)
        self.vocab_size: int = self._request("GET", "/v1/models")["data"][0]["meta"]["n_vocab"]
        eos_text = self._request("GET", "/props")["eos_token"]
        self.eos: int = self.tokenize(eos_text, add_special=False)[-1]
        self._filler = self.tokenize("a", add_special=False)[-1]
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()
        self._server = self._connection = None

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids; special tokens in the text are recognised, as in chat."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return self._request("POST", "/tokenize", body)["tokens"]

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The file's own chat template with the generation prompt, through llama.cpp's Jinja."""
        body = {"messages": [dict(message) for message in messages]}
        return self._request("POST", "/apply-template", body)["prompt"]

    def log_probs(self, ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the token after `ids`: fp32 [V]."""
        return self._forced(list(ids), [self._filler])[0]

    def log_probs_along(self, ids: Sequence[int], continuation: Sequence[int]) -> torch.Tensor:
        """Teacher-forced: row i predicts continuation[i]. fp32 [len(continuation), V]."""
        ids, continuation, rows = list(ids), list(continuation), []
        while continuation:
            count = min(len(continuation), max(1, ROWS_LIMIT // self.vocab_size))
            breaks = (i for i, token in enumerate(continuation[:count]) if token in self._breaking)
            count = next(breaks, count - 1) + 1
            rows.append(self._forced(ids, continuation[:count]))
            ids, continuation = ids + continuation[:count], continuation[count:]
        return torch.cat(rows) if rows else torch.empty(0, self.vocab_size)

    def greedy(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """Token ids of the model's own greedy continuation, up to and with `</s>`."""
        return self._complete(list(ids), max_tokens, return_tokens=True)["tokens"]

    def generate(
        self,
        prompt: Sequence[int] | Sequence[Mapping[str, str]],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> tuple[str, StopReason]:
        """Continue token ids, or answer messages through the file's template.

        Returns: the text, and `eos` when the model ended its turn or `length` when it was cut off.
        """
        ids = [entry for entry in prompt if isinstance(entry, int)]
        if len(ids) < len(prompt):
            messages = [entry for entry in prompt if isinstance(entry, Mapping)]
            ids = self.tokenize(self.apply_template(messages))
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": 0.0}
        reply = self._complete(ids, max_tokens, **sampling, seed=seed)
        return reply["content"], STOP_REASONS[reply["stop_type"]]

    def stops_at(self, token: int) -> bool:
        """Whether generating `token` ends the turn: it is forced once and the reason looked at."""
        reply = self._complete([self._filler], 2, logit_bias=[[token, 1e9]])
        return reply["stop_type"] == "eos" and reply["tokens_predicted"] == 1

    @cached_property
    def _breaking(self) -> set[int]:
        """Tokens that can only be the last of a request, where they need not be generated.

        Generation ends at `</s>` whatever the grammar says; while the text so far is not whole
        UTF-8 the server drops probabilities; and no grammar accepts a token without text.
        """
        reply = json.loads(self._reported([self._filler], [self._filler]))
        entries = reply["completion_probabilities"][0]["top_logprobs"]
        return {self.eos} | {e["id"] for e in entries if not _is_plain_text(e["bytes"])}

    def _forced(self, ids: list[int], targets: list[int]) -> torch.Tensor:
        # The last row is known before its token is chosen, so any token may stand there.
        forced = [*targets[:-1], self._filler]
        text = self._reported(ids, forced)
        # Each position names the token that was chosen, then every token of the vocabulary.
        ids_PE = self._by_position(_ID.findall(text), int, len(forced))
        log_probs_PE = self._by_position(_LOG_PROB.findall(text), float, len(forced))
        if ids_PE[:, 0].tolist() != forced:
            raise MachineError(
                "this build of llama.cpp does not follow a grammar of token ids", hint=UPGRADE
            )
        rows_PV = torch.full((len(forced), self.vocab_size), torch.nan)
        rows_PV.scatter_(1, ids_PE[:, 1:], log_probs_PE[:, 1:].float().clamp(min=FLOOR))
        if rows_PV.isnan().any():
            raise MachineError("llama.cpp did not return every token's probability")
        return rows_PV

    def _by_position(
        self, found: list[bytes], number: Callable[[bytes], float], positions: int
    ) -> torch.Tensor:
        per_position = 1 + self.vocab_size
        if len(found) != positions * per_position:
            raise MachineError(
                f"llama.cpp reported {len(found)} figures over {positions} positions, not "
                f"{per_position} at each: the file predicts NaN, or this build is another",
                hint=UPGRADE,
            )
        dtype = torch.int64 if number is int else torch.float64
        return torch.tensor([number(text) for text in found], dtype=dtype).reshape(positions, -1)

    def _reported(self, ids: list[int], forced: list[int]) -> bytes:
        """The reply to a forced continuation, from the list of probabilities on."""
        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in forced)
        body = self._completion(ids, len(forced), n_probs=self.vocab_size, grammar=grammar)
        _, marker, positions = self._send("POST", "/completion", body).partition(_REPORTED)
        return b"{" + marker + positions

    def _complete(self, ids: list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        return self._request("POST", "/completion", self._completion(ids, max_tokens, **options))

    def _completion(self, ids: list[int], max_tokens: int, **options: Any) -> dict[str, Any]:
        if len(ids) + max_tokens > self.n_ctx:
            raise MachineError(f"{len(ids)} + {max_tokens} tokens exceed n_ctx {self.n_ctx}")
        body = {"prompt": ids, "n_predict": max_tokens, "temperature": 0.0, "cache_prompt": True}
        return {**body, **options}

    def _request(self, method: str, path: str, body: Any = None) -> Any:
        return json.loads(self._send(method, path, body))

    def _send(self, method: str, path: str, body: Any = None) -> bytes:
        if self._connection is None:
            raise RuntimeError("LlamaCppModel is used outside its `with` block")
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        text = None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, text, headers)
        response = self._connection.getresponse()
        reply = response.read()
        if response.status != 200:
            message = json.loads(reply).get("error", {}).get("message", response.reason)
            raise MachineError(f"llama.cpp refused {path}: {message:.100}")
        return reply

    def _parameters(self) -> Any:
        package, parameters = self._package, self._package.CommonParams()
        parameters.model.path = os.fspath(self.path)
        parameters.n_ctx, parameters.n_parallel = self.n_ctx, 1
        if hasattr(parameters, "hostnames"):
            parameters.hostnames = ["127.0.0.1"]
        else:  # wheels before 2026.10
            parameters.hostname = "127.0.0.1"
        parameters.port, parameters.api_keys = 0, [self._key]
        parameters.warmup = parameters.ui = parameters.fit_params = False
        parameters.check_tensors = parameters.use_jinja = True
        parameters.ctx_shift = False
        parameters.verbosity = -1
        if self.exact:
            kind = package.ggml_type.GGML_TYPE_F32
            parameters.cache_type_k = parameters.cache_type_v = kind
            off = package.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            parameters.flash_attn_type = off
        if self.threads is not None:
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self.threads
        return parameters


def _is_plain_text(values: list[int]) -> bool:
    try:
        text = bytes(values).decode()
    except UnicodeDecodeError:
        return False
    return text != "" and not text.startswith("\0")


def _import_package() -> Any:
    try:
        import xllamacpp
    except ImportError:
        raise MachineError(
            "llama.cpp is not installed", hint="pip install 'zephyr-lite[llama]'"
        ) from None
    return xllamacpp
