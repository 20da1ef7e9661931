"""The one error hierarchy. Each class fixes the exit code the command line ends with.

This module imports nothing, so that every room, the compiler-free runtime included, can raise from it.
Exit codes: 0 ok, 1 internal, 2 usage, 3 unsupported model, 4 accuracy, 5 missing tuning, 6 bad artifact.
"""

from __future__ import annotations


class OptcError(Exception):
    """Base of everything optc raises on purpose. ``hint`` says what to try next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class UsageError(OptcError):
    """A wrong argument, option, file name or configuration."""

    exit_code = 2


class InputError(UsageError):
    """An array given to a model has an unknown name, a wrong shape or a wrong dtype."""


class NoLegalInputsError(UsageError):
    """The reference refuses every set of random inputs that was tried."""


class MissingDependencyError(UsageError):
    """An optional package or program is needed and not installed; the hint says how to install it."""


class ModelError(OptcError):
    """The model cannot be compiled."""

    exit_code = 3


class InvalidModelError(ModelError):
    """The file is not a legal model: truncated, not ONNX, or it breaks the ONNX specification."""


class UnsupportedModelError(ModelError):
    """A legal model that uses what optc does not support; the message names every such node at once."""


class PartitionError(ModelError):
    """A graph cannot be split into the stages asked for: too few places to cut, or no split fits into memory."""


class TrainingError(OptcError):
    """Training cannot go on."""


class RankFailureError(TrainingError):
    """Ranks of a distributed run died or hang; the message names them."""


class CheckpointError(TrainingError):
    """A checkpoint is missing, incomplete or belongs to another model."""


class IRError(OptcError):
    """The IR is not canonical: a defect of the frontend or of a pass."""


class AccuracyError(OptcError):
    """Results differ from the reference by more than allowed."""

    exit_code = 4


class MissingTuningError(OptcError):
    """Tuning was required and some kernels have no tuning record."""

    exit_code = 5


class ArtifactError(OptcError):
    """A bad artifact."""

    exit_code = 6


class TruncatedArtifactError(ArtifactError):
    """The artifact ends early or is not an artifact at all."""


class HashMismatchError(ArtifactError):
    """A part of the artifact does not have the hash its manifest states."""


class UnsafePathError(ArtifactError):
    """An entry of the artifact names a path outside of it."""


class NewerFormatError(ArtifactError):
    """The artifact was written by a newer optc."""


class TargetMismatchError(ArtifactError):
    """The artifact was built for a CPU that this machine is not."""
