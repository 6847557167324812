"""Training: the loop, optimiser, schedule, run directory, exact resume and logging."""

from rookery.train.callbacks import Callback, RunFacts
from rookery.train.monitor import Record
from rookery.train.ranks import RankLost
from rookery.train.run import RunResult, prepare, run

__all__ = ["Callback", "RankLost", "Record", "RunFacts", "RunResult", "prepare", "run"]
