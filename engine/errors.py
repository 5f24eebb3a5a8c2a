"""What can go wrong between the caller and the engine, by owner.

EngineError
├── RequestError       this request: the engine refused it or its own computation failed; others go on
├── TimeLimitError     this request: its time was up
├── EngineDeadError    the process: it has failed or ended; every request in flight ends with this
│   ├── EngineRestartingError   and a new one is about to serve
│   └── EngineClosedError       because it was told to
├── EngineStartError   the process could not start; the message tells the operator what to mend
└── RankError          a rank of a tensor-parallel engine has failed or is out of step: none of them can go on
"""


class EngineError(Exception):
    """Base of all that the engine tells its callers."""


class RequestError(EngineError):
    """One request failed inside the engine. Safe to show to whoever sent it."""


class EngineDeadError(EngineError):
    """The engine has died or was shut down; requests in flight are lost."""


class EngineRestartingError(EngineDeadError):
    """The engine has died, and is being started again."""


class EngineClosedError(EngineDeadError):
    """The engine was shut down."""


class TimeLimitError(EngineError):
    """One request has had its time. Safe to show to whoever sent it."""


class EngineStartError(EngineError):
    """The engine could not be built: checkpoint, device or memory. Read by the operator."""


class RankError(EngineError):
    """The ranks compute each step together, so that what ends one of them ends the engine."""
