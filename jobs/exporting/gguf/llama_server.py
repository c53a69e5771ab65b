"""What llama.cpp makes of a base and an adapter, where the binding that takes adapters is installed."""

from __future__ import annotations

import importlib.util
import secrets
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError

BINDING = "xllamacpp"


def installed() -> bool:
    """Whether llama.cpp can be asked here."""
    return importlib.util.find_spec(BINDING) is not None


class LlamaServer:
    """llama.cpp's server inside this process, at a free port of the loopback address, for the CPU, with keys and values
    in fp32. It tells probabilities, and those of tokens that it writes alone."""

    def __init__(self, base: Path, adapter: Path, length: int, letter: int) -> None:
        """length: of the longest text that is asked for, and a token more. letter: a token that is a letter. Raises
        UserError where it cannot load the files."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.lora_adapters = str(base), [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        params.n_ctx, params.n_parallel, params.n_gpu_layers = length, 1, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        params.api_keys = [secrets.token_urlsafe()]  # nobody else is served
        params.verbosity, params.warmup, params.fit_params, params.use_jinja = -1, False, False, False
        try:
            self.letter, self.server = letter, xllamacpp.Server(params)
        except RuntimeError as error:
            raise UserError(f"llama.cpp cannot load what was written: {error}; nothing was saved") from None

    def last_logprobs(self, tokens: Tensor) -> Tensor:
        """The logarithm of the probability of each token after the last, (rows, length) -> (rows, vocabulary)."""
        return torch.stack([self._row(row.tolist()) for row in tokens])

    def _row(self, ids: list[int]) -> Tensor:
        asked = {"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 10**6, "cache_prompt": False}
        # It tells nothing of tokens that are half a letter, and is made to write a whole one after computing the rest.
        asked["logit_bias"] = [[self.letter, 1e6]]
        answer = self.server.handle_completions(asked)
        if "choices" not in answer:
            raise UserError(f"llama.cpp cannot compute with what was written: {answer}; nothing was saved")
        chances = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return torch.tensor([chance["logprob"] for chance in sorted(chances, key=lambda chance: chance["id"])])
