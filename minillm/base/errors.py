"""Every error that a user can meet, in one place."""

from __future__ import annotations

from pathlib import Path


class MiniLLMError(Exception):
    """Something is wrong with a file or with data; the message names it. The command line exits with status 2."""


class CheckpointError(MiniLLMError):
    """A checkpoint is missing, damaged or does not fit."""


class CleanError(MiniLLMError):
    """Cleaning cannot go on: a step failed on a document, or a folder holds something else."""


class CorpusError(MiniLLMError):
    """A source of text is missing, damaged or not what it should be; the message names file, line and way out."""


class MissingPackage(MiniLLMError):
    """A part that is used needs a package that is not installed; the message says how to get it."""


class TrainingDiverged(MiniLLMError):
    """The loss or the gradient is no longer a number, or has leapt; no weight was updated with it."""


class Interrupted(MiniLLMError):
    """Training was asked to stop (Ctrl-C, SIGTERM, SIGHUP); it finished its step and saved. The same call resumes."""

    def __init__(self, step: int, checkpoint: Path | None, signal_name: str):
        self.step, self.checkpoint, self.signal_name = step, checkpoint, signal_name
        where = (
            f"saved to {checkpoint}; the same command resumes"
            if checkpoint
            else "nothing saved: no run_dir was given"
        )
        super().__init__(f"{signal_name} after step {step}: {where}")


class WorkersFailed(MiniLLMError):
    """A process that `run_processes` started has failed; the message has what each one said."""


class RunLocked(MiniLLMError):
    """Another process is writing to the same run folder."""


class PeerLost(MiniLLMError):
    """Another process of the run has ended, or has not answered in time."""


class NoSpace(MiniLLMError):
    """A run would fill the disk."""
