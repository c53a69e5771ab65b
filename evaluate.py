"""Judge a run's answers by rules, beside those of its base: a scorecard, the worst answers, and a verdict.

python evaluate.py lora-pairs-r16                        on the run's own held-out records
python evaluate.py lora-pairs-r16 --data test.jsonl      on the records of a file
python evaluate.py lora-pairs-r16 --temperature 0.3      sampled instead of greedy
python evaluate.py lora-pairs-r16 --out report           report.json, report.md and answers.jsonl as well
torchrun --nproc-per-node 2 evaluate.py lora-pairs-r16   the same, by two processes
python evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --data test.jsonl      a model by itself

Base and run get the same prompts, seeds and settings. Rules cannot tell whether an answer is true or helpful.
"""

from __future__ import annotations

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.judging.options import Options, check_flags
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line


def main() -> None:
    """Run the command."""
    options = from_command_line(Options, __doc__).settings
    check_flags(options)
    from jobs.judging.command import run  # torch takes a second, which --help and a wrong flag need not wait for

    run(options)


if __name__ == "__main__":
    run_command(main, many=True)
