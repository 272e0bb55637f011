"""Errors that a user can act on.

Every message is one sentence that says what is wrong and what to do; a face (CLI, node, tab) shows it as it is.
Anything else that is raised is a defect of this package or of the host program and keeps its traceback.
"""


class AblationError(Exception):
    """Bad input, or a state of the machine that the user can change (wrong file, no space, diverged training)."""


class IncompatibleDelta(AblationError):
    """A delta does not fit the model that it is attached to."""


class OtherDataset(AblationError):
    """A folder holds a dataset of something else than it is to hold now."""


class Diverged(AblationError):
    """Training ended in NaN or infinity, or its loss rose far above where it began; no delta is returned."""


class Interrupted(AblationError):
    """The user cancelled. Raised by a progress callback, it unwinds any long operation and leaves the model clean."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch has a type for it on GPUs; the CPU's allocator and MPS raise RuntimeErrors."""
    words = ("can't allocate memory", "out of memory")
    said = isinstance(error, RuntimeError) and any(part in str(error) for part in words)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
