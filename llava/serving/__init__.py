"""Many requests, one model: prompts are prefilled in ragged batches and answers decode together, each pruned its way.

`Scheduler` is the way in: `submit` a `Request`, read pieces from `stream`. Start reading at `scheduler.py` (who runs),
then `engine.py` (what one turn computes) and `pool.py` (where keys and values lie).
"""

from .request import (
    ClosingError,
    Event,
    Failure,
    Piece,
    QueueFullError,
    Report,
    Request,
    RequestTimeoutError,
    Ticket,
    WorkerDeadError,
)
from .scheduler import Limits, Load, Scheduler

__all__ = [
    "ClosingError",
    "Event",
    "Failure",
    "Limits",
    "Load",
    "Piece",
    "QueueFullError",
    "Report",
    "Request",
    "RequestTimeoutError",
    "Scheduler",
    "Ticket",
    "WorkerDeadError",
]
