"""Evaluating a model before and after a vector is added: which answers change, and by how much more than chance.

`prepare_evaluation` and `EvaluationJob.run` are the way through: tasks of lm-evaluation-harness, on the target and on
the target moved along the vector, in this process or on Ray; `statistics` compares them item by item.
"""

from __future__ import annotations

from rv_distributed.evaluation.job import EvaluationJob, EvaluationOptions, prepare_evaluation
from rv_distributed.evaluation.model import Ask, Means
from rv_distributed.evaluation.results import Evaluation

__all__ = ["Ask", "Evaluation", "EvaluationJob", "EvaluationOptions", "Means", "prepare_evaluation"]
