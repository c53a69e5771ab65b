"""An adapter by itself as a GGUF file, which llama.cpp and Ollama put on top of its base's."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from jobs.exporting.gguf.content import GGUFTensors, Tensors, count_equal, write, write_adapter
from jobs.exporting.gguf.layout import Layout
from jobs.exporting.gguf.llama_server import LlamaServer, installed
from jobs.exporting.gguf.ollama import write_modelfile
from jobs.exporting.gguf.vocabulary import Vocabulary
from jobs.exporting.low_rank import low_rank_changes
from jobs.exporting.opening import Opened
from jobs.exporting.verifying import Difference, draft_of
from lora.combine import Delta
from runtime.start import command_line
from runtime.storage.folders import write_file

QKV = ("q_proj", "k_proj", "v_proj")
MERGED = "export base and adapter as one instead, with --to gguf"


def template_of(out: Path) -> Path:
    """Where the chat template of an adapter lies."""
    return out.with_suffix(".jinja")


def export_adapter(opened: Opened, out: Path, with_tokenizer: bool = True) -> list[str]:
    """Write the file and what stands beside it, and tell what was found. with_tokenizer: whether its base's file has
    one; else there is no Modelfile.

    Raises UserError for what llama.cpp has nothing like, and where it computes something else.
    """
    layout = Layout.of(opened.model, opened.base.family)
    vocabulary = Vocabulary.of(opened.base.tokenizer, opened.model.config.vocab_size) if with_tokenizer else None
    alpha = opened.adapter.config.alpha
    tensors = _tensors(opened, layout, alpha)
    with draft_of(out) as draft:
        write_adapter(draft, layout.arch, opened.run.name, opened.base.run.name, alpha, tensors)
        told = [f"Verified with the gguf package: {count_equal(draft, tensors)} tensors are as they were written"]
        told += [_asked_of_llama_cpp(draft, opened, layout, vocabulary), *layout.notes]
    return told + _uses(opened, out, vocabulary)


@torch.no_grad()
def _tensors(opened: Opened, layout: Layout, alpha: float) -> Tensors:
    """Two for each linear, A and B, in fp32, where llama.cpp multiplies their product by alpha / rank.

    Raises UserError for an adapter that is more than that.
    """
    import gguf

    kind, found = gguf.GGMLQuantizationType.F32, []
    changes = low_rank_changes(opened, "llama.cpp", MERGED)
    for path, (B, A) in (_joined(changes) if layout.model.config.fused_qkv else changes).items():
        own_scale = B * (len(A) / alpha)
        for leaf, factor in (("lora_a", A), ("lora_b", layout.rows(path, own_scale))):
            found.append((f"{layout.name(path)}.{leaf}", factor.float().contiguous().numpy(), kind))
    return found


def _joined(changes: Mapping[str, Delta]) -> dict[str, Delta]:
    """The changes with those of q, k and v as one of what these are side by side in."""
    parts, found = {}, {}
    for path, change in changes.items():
        parent, _, last = path.rpartition(".")
        if last in QKV:
            parts.setdefault(f"{parent}.qkv_proj", {})[last] = change
        else:
            found[path] = change
    for path, own in parts.items():
        width = len(next(iter(own.values())).B)
        blocks = [own[name].B if name in own else torch.empty(width, 0) for name in QKV]
        found[path] = Delta(torch.block_diag(*blocks), torch.cat([own[name].A for name in QKV if name in own]))
    return found


def _asked_of_llama_cpp(path: Path, opened: Opened, layout: Layout, vocabulary: Vocabulary | None) -> str:
    """What llama.cpp makes of it on its base. Raises UserError where that is something else than the run does."""
    if vocabulary is None:
        return "llama.cpp was not asked, as its server takes no base without a tokenizer"
    if not installed():
        return "llama.cpp was not asked: pip install xllamacpp, and export again, to have it compared"
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.absolute().parent) as folder:
        base = Path(folder, "base.gguf")
        write(base, opened.base.run.name, None, GGUFTensors(layout, "f32"), vocabulary)
        asked = LlamaServer(base, path, opened.probe.shape[1], vocabulary.letter)
        found = asked.last_logprobs(opened.probe[:, :-1])
    expected = opened.expected[:, -2]  # as it writes a token, for which the context must have room
    found += expected.logsumexp(-1, keepdim=True)
    told = Difference.between("llama.cpp with its base and --lora", found, expected, layout.limit)
    return f"On random tokens, {told}"


def _uses(opened: Opened, out: Path, vocabulary: Vocabulary | None) -> list[str]:
    """How to use it, after writing what that takes."""
    base = opened.base.run
    named, file = str(base.folder) if opened.base.family else base.name, f"{base.name}.gguf"
    make = command_line("export.py", base.metadata.get("hub") or named, "--to", "gguf", "--out", file)
    words = ["llama-server", "-m", file, "--lora", str(out)]
    if isinstance(opened.template, str) and opened.template != opened.base_template and vocabulary:
        write_file(template_of(out), vocabulary.template(opened.template).encode())
        words += ["--jinja", "--chat-template-file", str(template_of(out))]
    if vocabulary:
        write_modelfile(out, opened, vocabulary, file)
    return [f"The base's file: {make}", " ".join(words)]
