"""Every exception this package raises, and whose fault each one is.

    PetalsEvalError                       exit code
    ├── CallerError ......................... 2   the caller's mistake: raised at once, never retried
    │   ├── ConfigError                           a setting, flag or key of the YAML file
    │   ├── ModelError                            the model folder, its family or its weights
    │   ├── AdapterError                          the prompt-tuned checkpoint
    │   ├── DataError                             the data set: file, column, row, label
    │   ├── TaskError                             the task's own definition
    │   ├── RunFolderError                        the run folder belongs to another run
    │   ├── GradientError                         autograd asked of the remote path
    │   └── ExampleError                          one example; in a run it is a failure, and the others go on
    │       ├── RequestTooLargeError              more tokens than the model reads or any server takes
    │       ├── UnknownTokenError                 a token that the model does not have
    │       └── NotFiniteError                    its answer holds NaN or infinity, whoever computes it
    ├── SwarmError .......................... 3   the swarm cannot, not even by waiting
    │   ├── SwarmUnreachableError                 no bootstrap peer answered
    │   ├── MissingBlocksError                    no server holds these blocks
    │   │   └── NoSessionError                        those that do open no session for this client
    │   └── DeadlineError                         the deadline passed first
    ├── PeerError ........................... 3   one server's fault: the work moves to another server
    │   ├── PeerUnreachableError                  no connection, or the connection broke
    │   ├── PeerTimeoutError                      no answer in time
    │   ├── PeerRefusedError                      it answered with an error
    │   │   ├── PeerCacheFullError                    no room for a session now, which is no fault of it
    │   │   └── PeerLimitError                        more tokens than it takes, which it may take in parts
    │   ├── PeerNoSessionError                    it opens no session that this client can use; ordinary calls go on
    │   ├── PeerAnswerError                       wrong count, shape or dtype
    │   │   └── PeerNotFiniteError                    NaN or infinity
    │   └── PeerDistrustedError                   caught with something that does not pass: left out for good
    │       ├── PeerNondeterministicError         two answers to one question
    │       └── PeerDisagreesError                another answer than those who compute the same
    └── MachineError ........................ 4   this machine cannot: disk, memory, permissions
    KeyboardInterrupt
    └── InterruptedRunError ......... 130 or 143  SIGINT or SIGTERM; what was scored is kept

A message says what was expected, what was found and what to do.
"""

__all__ = [
    "AdapterError",
    "CallerError",
    "ConfigError",
    "DataError",
    "DeadlineError",
    "ExampleError",
    "GradientError",
    "InterruptedRunError",
    "MachineError",
    "MissingBlocksError",
    "ModelError",
    "NoSessionError",
    "NotFiniteError",
    "PeerAnswerError",
    "PeerCacheFullError",
    "PeerDisagreesError",
    "PeerDistrustedError",
    "PeerError",
    "PeerLimitError",
    "PeerNoSessionError",
    "PeerNondeterministicError",
    "PeerNotFiniteError",
    "PeerRefusedError",
    "PeerTimeoutError",
    "PeerUnreachableError",
    "PetalsEvalError",
    "RequestTooLargeError",
    "RunFolderError",
    "SwarmError",
    "SwarmUnreachableError",
    "TaskError",
    "UnknownTokenError",
]


class PetalsEvalError(Exception):
    """Base of every error of this package. `exit_code` is what the command line ends with."""

    exit_code = 70


class CallerError(PetalsEvalError):
    """The caller's mistake: raised at once and never retried."""

    exit_code = 2


class ConfigError(CallerError):
    """A setting, a flag or a key of the YAML file is wrong."""


class ModelError(CallerError):
    """The model folder, its family or its weights cannot be used."""


class AdapterError(CallerError):
    """The prompt-tuned checkpoint cannot be used with this model."""


class DataError(CallerError):
    """The data set cannot be used: a file, a column, a row or a label."""


class TaskError(CallerError):
    """The task's own definition is wrong."""


class RunFolderError(CallerError):
    """The run folder belongs to another run."""


class GradientError(CallerError):
    """A gradient was asked of the remote path, which computes none."""


class ExampleError(CallerError):
    """One example cannot be computed, whoever tries; the others may be. A run notes it as a failure and goes on."""


class RequestTooLargeError(ExampleError):
    """An input holds more tokens than the model reads or the servers take."""


class UnknownTokenError(ExampleError):
    """A token is outside the model's vocabulary: its tokenizer has more of them than the model."""


class NotFiniteError(ExampleError):
    """An answer holds values that are not finite, whoever computes it."""


class SwarmError(PetalsEvalError):
    """The swarm cannot do this, not even by waiting."""

    exit_code = 3


class SwarmUnreachableError(SwarmError):
    """No bootstrap peer answered."""


class MissingBlocksError(SwarmError):
    """No server holds some of the blocks. `missing` lists them as spans (start, stop)."""

    def __init__(self, message: str, missing: tuple[tuple[int, int], ...] = ()):
        super().__init__(message)
        self.missing = missing


class NoSessionError(MissingBlocksError):
    """The servers of some of the blocks open no session that this client can use. They compute all the same."""


class DeadlineError(SwarmError):
    """The deadline passed before the swarm did the work."""


class PeerError(PetalsEvalError):
    """One server's fault: the work moves to another server and this one backs off."""

    exit_code = 3


class PeerUnreachableError(PeerError):
    """No connection could be made, or it broke."""


class PeerTimeoutError(PeerError):
    """No answer came in time."""


class PeerRefusedError(PeerError):
    """The server answered with an error of its own."""


class PeerLimitError(PeerRefusedError):
    """The server refused because of the size, and how much it takes is known now: ask for less, or another server."""


class PeerCacheFullError(PeerRefusedError):
    """The server's cache has no room for a session now. It is asked again later, and used for ordinary calls."""


class PeerNoSessionError(PeerError):
    """The server opens no session that this client can use. It is used for ordinary calls all the same."""


class PeerAnswerError(PeerError):
    """The answer has a wrong count, shape or dtype."""


class PeerNotFiniteError(PeerAnswerError):
    """The answer holds NaN or infinity."""


class PeerDistrustedError(PeerError):
    """The server was caught with something that no backing off mends.

    difference: of two answers, relative to what the blocks did to the question.
    """

    def __init__(self, message: str, difference: float):
        super().__init__(message)
        self.difference = difference


class PeerNondeterministicError(PeerDistrustedError):
    """The server gave two answers to one question: its blocks run in training mode."""


class PeerDisagreesError(PeerDistrustedError):
    """The server's answer differs from those of others that compute the same: it is wrong."""


class MachineError(PetalsEvalError):
    """This machine cannot: disk, memory or permissions."""

    exit_code = 4


class InterruptedRunError(KeyboardInterrupt):
    """SIGINT (130) or SIGTERM (143) ended the run; what was scored is kept.

    It is Ctrl-C, and no error of ours: a caller's `except Exception` in a loop over runs does not swallow it.
    """

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code
