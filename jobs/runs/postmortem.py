"""What a run that ended in numbers that are not finite leaves for whoever looks into it."""

from __future__ import annotations

from jobs.runs.job import Job
from runtime.storage.encoding import to_json
from runtime.storage.runs import Run
from runtime.training.steps import NonFiniteError, Stepper

BAD_BATCH = "nonfinite-batch.json"


def with_batch(error: NonFiniteError, job: Job, run: Run, stepper: Stepper) -> NonFiniteError:
    """Record the batch that the error came from, which is a function of the step; returns the error, telling where.

    Raises UserError where the record cannot be written.
    """
    if error.step is None:
        return error
    rows = stepper.batch(error.step).tokens.tolist()
    about = {"step": error.step, "learning_rate": stepper.schedule(error.step), "error": str(error), "tokens": rows}
    about["text"] = [job.tokenizer.decode(row) for row in rows]
    run.write(BAD_BATCH, to_json(about))
    return NonFiniteError(f"{error}; its batch is in {run.folder / BAD_BATCH}", error.step)
