"""What llama.cpp makes of a GGUF file, and files that it makes itself, where a binding of it is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from runtime.errors import UserError

BINDING = "cyllama"


def installed() -> bool:
    """Whether llama.cpp can be asked here."""
    return importlib.util.find_spec(BINDING) is not None


def quantize_file(path: Path, kind: str) -> None:
    """Let llama.cpp put a file of fp32 into one of its own kinds, in its place. Raises UserError where it cannot."""
    import gguf
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    params, small = llama_cpp.LlamaModelQuantizeParams(), path.with_name(f"{path.name}.small")
    params.ftype, params.nthread = int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]), torch.get_num_threads()
    try:
        llama_cpp.model_quantize(str(path), str(small), params)
        with open(small, "rb") as file:
            os.fsync(file.fileno())
        os.replace(small, path)
    except RuntimeError as error:
        raise UserError(f"llama.cpp cannot take it to {kind}: {error}; nothing was saved") from None
    finally:
        small.unlink(missing_ok=True)


class LlamaCpp:
    """A GGUF file that llama.cpp has loaded, for the CPU, with keys and values in fp32."""

    def __init__(self, path: Path, length: int) -> None:
        """length: of the longest text that is asked for. Raises UserError where it cannot load the file."""
        from cyllama.llama import llama_cpp

        class Model(llama_cpp.LlamaModel):
            """With what the context asks its model for, and the binding's own lacks."""

            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        self.library = llama_cpp
        llama_cpp.disable_logging()
        params = llama_cpp.LlamaModelParams()
        params.n_gpu_layers = 0
        try:
            self.model = Model(str(path), params, verbose=False)
            self.context = llama_cpp.LlamaContext(self.model, self._params(length), verbose=False)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"llama.cpp cannot load what was written: {error}; nothing was saved") from None

    def _params(self, length: int):
        params = self.library.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = length
        params.type_k = params.type_v = params.flash_attn_type = 0  # fp32, and plain attention
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        return params

    def logits(self, tokens: Tensor) -> Tensor:
        """(rows, length) -> (rows, length, vocabulary)."""
        return torch.stack([self._row(row.tolist()) for row in tokens])

    def _row(self, ids: list[int]) -> Tensor:
        self.context.kv_cache_clear()
        batch = self.library.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        batch.add_sequence(ids, 0, True)
        self.context.decode(batch)
        return torch.tensor([self.context.get_logits_ith(i) for i in range(len(ids))])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with what llama.cpp puts in front; special tokens are plain text in it."""
        return list(self.model.get_vocab().tokenize(text, True, False))
