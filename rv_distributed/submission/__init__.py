"""Jobs of a Ray cluster, through its job server: where ``rv submit`` talks to Ray.

`JobServer` connects; `JobServer.submit` sends a `JobRequest`, or finds the job that already does that work;
`Follower` then gives the lines of its log and, at the end, its `JobState`. The status and the exit status come from
the job server itself: a log stream that ends says nothing about the job.
"""

from rv_distributed.submission.follow import Follower
from rv_distributed.submission.request import STOP_WAIT_S, JobRequest
from rv_distributed.submission.server import JobServer, JobState

__all__ = ["STOP_WAIT_S", "Follower", "JobRequest", "JobServer", "JobState"]
