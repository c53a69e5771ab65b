"""The flags of `compare.py`, and what of them goes together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from runtime.errors import UsageError
from runtime.settings.config import PRESETS, Settings
from runtime.settings.fields import setting, settings_of
from runtime.settings.sources import Resolved

COMPARED = "What to compare"
NUMBERS = r"[0-9]{1,4}( *, *[0-9]{1,4})*"
SWEPT = {"group": COMPARED, "env": False, "pattern": NUMBERS, "allowed": "whole numbers separated by commas"}
INSTEAD = {  # flags of training.py that a comparison would ignore: what to do instead
    "use_lora": "it always compares both",
    "lora_rank": "name the ranks with --ranks",
    "run_name": "its folder is named after the base",
    "fresh": "each comparison gets a folder of its own",
    "dry_run": "training.py tells it, of one method at a time",
    "force": "it asks for no memory beforehand",
    "patience": "all methods take all steps",
    "save_interval": "it saves no checkpoints",
    "keep_checkpoints": "it saves no checkpoints",
    "track": "its files tell all of it",
    **dict.fromkeys(("push_to_hub", "push_strategy", "push_private"), "it makes nothing to push"),
}
VARIANTS = next(row.choices for row in settings_of(Settings) if row.name == "lora_variant")
PLAIN, *OTHERS = ({"lora_variant": name} for name in VARIANTS)
KINDS = {"lora": PLAIN | {"lora_plus_ratio": 1.0}, "lora+": PLAIN} | {kind["lora_variant"]: kind for kind in OTHERS}


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """The flags of compare.py, beside all settings of a training run."""

    presets: ClassVar = PRESETS | {
        "TEST_MODE": PRESETS["TEST_MODE"] | {"ranks": "8", "widths": "64,128", "batches": "4,16"},
        "--variants": {"ranks": "", "seeds": 3},
        "a pretrained base": PRESETS["a pretrained base"] | {"ranks": "16"},
    }

    ranks: str = setting(
        "4,8,16,32", "LoRA ranks, separated by commas; if empty, the default of each variant", env=False,
        group=COMPARED, pattern=f"|{NUMBERS}", allowed="whole numbers separated by commas",
    )  # fmt: skip
    targets: tuple[str, ...] = setting((), "LORA_TARGETS to compare; may be repeated", group=COMPARED, env=False)
    variants: tuple[str, ...] = setting(
        (), "Kind of adapter to compare, as in LORA_VARIANT; lora is without LoRA+, lora+ and all others with it; all "
        "compares every kind; may be repeated", group=COMPARED, env=False,
        pattern="|".join(map(re.escape, (*KINDS, "all"))), allowed=f"one of {', '.join(KINDS)}, all",
    )  # fmt: skip
    seeds: int = setting(1, "Number of seeds, from SEED upwards", group=COMPARED, env=False, low=1, high=100)
    sweep: bool = setting(False, "Time training steps by width, rank and batch size instead", group=COMPARED, env=False)
    widths: str = setting("64,128,256,384", "Values of N_EMBD for --sweep", **SWEPT)
    batches: str = setting("4,16,64", "Values of BATCH_SIZE for --sweep", **SWEPT)

    @classmethod
    def active(cls, values: Mapping[str, Any]) -> set[str]:
        """A comparison adapts a base, whether or not BASE names it."""
        variants = {"--variants"} if values["variants"] else set()
        return super().active(values) | {"from a base"} | variants


def numbers(options: Options, name: str) -> list[int]:
    """The numbers of a list such as RANKS, once each. Raises UsageError for one that is not above 0."""
    found = list(dict.fromkeys(map(int, filter(None, getattr(options, name).split(",")))))
    if found and min(found) < 1:
        raise UsageError(f"--{name} {getattr(options, name)}: every number must be at least 1")
    return found


def check_flags(given: Resolved) -> None:
    """Raises UsageError for a flag that a comparison would ignore (in the environment it may be meant for others), and
    for numbers that make no sense."""
    for name, instead in INSTEAD.items():
        if name == "lora_rank" and not given.settings.ranks:
            continue
        if given.sources.get(name.upper(), "").startswith("flag"):
            raise UsageError(f"compare.py does not take --{name.replace('_', '-')}: {instead}")
    options = given.settings
    if options.sweep and not options.ranks:
        raise UsageError("--sweep times LoRA of the ranks in --ranks, which is empty")
    for name in ("ranks", "widths", "batches"):
        numbers(options, name)
    if options.sweep and (odd := [width for width in numbers(options, "widths") if width % options.n_head]):
        raise UsageError(f"--widths {options.widths}: {odd[0]} is not a multiple of N_HEAD={options.n_head}")
