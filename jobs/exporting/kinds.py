"""What matrices may be stored in, by the names of `--outtype`."""

from __future__ import annotations

DENSE = ("f32", "f16", "bf16")
IN_BLOCKS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")  # of GGUF files
BY_LLAMA_CPP = ("q6_k", "q5_k_m", "q4_k_m")  # kinds of GGUF files whose tensors llama.cpp alone can write
