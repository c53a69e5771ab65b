"""Print text from a trained run, with or without its adapter, or with several.

python generate.py                                        the newest run, from an empty line
python generate.py --run lora-folio-r8 --prompt "O Romeo"
python generate.py --run lora-folio-r8 --adapter none     the same base without its adapter
python generate.py --adapter lora-folio-r8=0.5            half of what the adapter adds
python generate.py --adapter lora-folio-r8 --adapter lora-milton-r8       the sum of what both add
python generate.py --prompts prompts.jsonl                lines {"prompt": "O Romeo", "adapter": "lora-folio-r8"}
python generate.py --prompts prompts.jsonl --out answers.jsonl            written as they come; a kill loses none
torchrun --nproc-per-node 2 -- generate.py --prompts prompts.jsonl        the same, by two processes
python generate.py --prompt "O Romeo" --best-of 8         of 8 texts that are drawn, the likeliest
python generate.py --prompt "O Romeo" --beams 4           the likeliest text that 4 beams find; nothing is drawn
python generate.py --run HuggingFaceTB/SmolLM2-135M-Instruct --chat       talk to a model that has a chat template
python generate.py --instruction "Rewrite in First Folio spelling." --input "O for a muse of fire"
"""

from __future__ import annotations

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.generating.options import Options, check_sources, check_strategy
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check_sources(given)
    check_strategy(given)
    from jobs.generating.command import run  # torch takes a second, which --help and a wrong flag need not wait for

    run(given)


if __name__ == "__main__":
    run_command(main, many=True)
