"""Which setting was meant by a name that is none: a misspelt one, or what other programs call it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

# What users of PEFT, nanoGPT and Hugging Face's Trainer call our settings.
ALIASES = {
    "LORA_RANK": "R RANK LORA_R LORA_DIM",
    "LORA_ALPHA": "ALPHA",
    "LORA_DROPOUT": "LORA_DROP LORA_P",
    "LORA_TARGETS": "TARGET_MODULES LORA_TARGET_MODULES LORA_MODULES",
    "LORA_VARIANT": "USE_DORA USE_RSLORA PEFT_TYPE LORA_TYPE",
    "LORA_TRAIN_EMBEDDINGS": "MODULES_TO_SAVE",
    "LORA_PLUS_RATIO": "LORAPLUS_LR_RATIO",
    "BASE": "MODEL_NAME_OR_PATH BASE_MODEL BASE_MODEL_NAME_OR_PATH MODEL_NAME INIT_FROM",
    "DATASET": "DATASETS DATASET_NAME TRAIN_FILE",
    "CHECKPOINTS_DIR": "OUTPUT_DIR OUT_DIR",
    "FRESH": "OVERWRITE_OUTPUT_DIR",
    "DTYPE": "BF16 FP16 TORCH_DTYPE",
    "COMPILE": "TORCH_COMPILE",
    "BLOCK_SIZE": "CONTEXT_LENGTH MAX_SEQ_LENGTH MAX_SEQ_LEN SEQ_LEN SEQ_LENGTH N_CTX N_POSITIONS MAX_LENGTH",
    "N_LAYER": "NUM_LAYERS NUM_HIDDEN_LAYERS",
    "N_HEAD": "NUM_HEADS NUM_ATTENTION_HEADS",
    "N_EMBD": "HIDDEN_SIZE D_MODEL",
    "BATCH_SIZE": "PER_DEVICE_TRAIN_BATCH_SIZE TRAIN_BATCH_SIZE MICRO_BATCH_SIZE",
    "GRADIENT_ACCUMULATION_STEPS": "GRADIENT_ACCUMULATION GRAD_ACCUM GRAD_ACCUM_STEPS GRAD_ACCUMULATION_STEPS",
    "MAX_ITERS": "MAX_STEPS NUM_STEPS TRAIN_STEPS",
    "EPOCHS": "N_EPOCHS NUM_EPOCHS MAX_EPOCHS NUM_TRAIN_EPOCHS",
    "LEARNING_RATE": "LR",
    "MIN_LR": "MIN_LEARNING_RATE LR_MIN",
    "LR_DECAY": "LR_SCHEDULER LR_SCHEDULER_TYPE SCHEDULE",
    "OPTIMIZER": "OPTIM",
    "WARMUP_ITERS": "WARMUP WARMUP_STEPS",
    "BETA1": "ADAM_BETA1",
    "BETA2": "ADAM_BETA2",
    "GRAD_CLIP": "MAX_GRAD_NORM CLIP_GRAD_NORM GRADIENT_CLIPPING",
    "EVAL_INTERVAL": "EVAL_STEPS EVAL_EVERY",
    "LOG_INTERVAL": "LOGGING_STEPS LOG_EVERY LOG_STEPS",
    "SAVE_INTERVAL": "SAVE_STEPS SAVE_EVERY",
    "KEEP_CHECKPOINTS": "SAVE_TOTAL_LIMIT",
    "MAX_NEW_TOKENS": "MAX_TOKENS NUM_TOKENS",
    "PATIENCE": "EARLY_STOPPING_PATIENCE",
}
CALLED = {alias: name for name, aliases in ALIASES.items() for alias in aliases.split()}
FOREIGN = ("R", "RANK")  # set by R and by torchrun for their own use, so as variables they mean nothing to us
# Settings that are another program's where the environment has such a value: shells tell the terminal's width so.
SHELLS_OWN = {"COLUMNS": r"[0-9]+"}


def plain(name: str) -> str:
    """A name as variables are written."""
    return re.sub(r"[-. ]", "_", name.upper())


def near_miss(name: str, names: Iterable[str], alike: float = 0.8) -> str | None:
    """The nearest of the names, if `name` looks like a misspelt one.

    alike: how much of it must be the same, from 0 to 1; of a name that may be another program's, more than of a flag.
    """
    name = plain(name)
    close = get_close_matches(name, names, n=9, cutoff=alike)
    near = [other for other in close if typing_errors(name, other) <= 1 or _word_by_word(name, other)]
    return min(near, key=lambda other: typing_errors(name, other), default=None)


def _word_by_word(name: str, other: str) -> bool:
    """Whether no word has more than one error: LOCAL_RANK and USE_LOCAL, which belong to others, have two in one."""
    words, others = name.split("_"), other.split("_")
    if len(words) != len(others):
        return name.replace("_", "") == other.replace("_", "")
    return all(typing_errors(a, b) <= (len(b) > 2) for a, b in zip(words, others, strict=True))


def suggestion(name: str, shown: Mapping[str, str], near: str | None) -> str:
    """What to say of a name that is no setting, or nothing where it may be somebody else's.

    `shown` has each setting's variable, and how to show it; `near` is the variable that is nearly called so.
    """
    meant = CALLED.get(plain(name).strip("_"))
    if meant in shown:
        return f"it is called {shown[meant]} here"
    return f"did you mean {shown[near]}?" if near else ""


def is_ours(name: str, near: str | None) -> bool:
    """Whether no other program can mean this name that is no setting of ours."""
    return plain(name).startswith("LORA_") or "LORA" in (near or "")


def typing_errors(a: str, b: str) -> int:
    """Letters missing, added, wrong or swapped with their neighbour (Damerau 1964, optimal string alignment)."""
    before, above = [], list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            cost = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, above = above, row
    return above[-1]
