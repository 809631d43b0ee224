"""What changed between two checkpoints."""

from rv_distributed.comparison.measure import DiffProgress, diff
from rv_distributed.comparison.model import Diff, LayerDiff, Sums, TensorDiff, Unlike

__all__ = ["Diff", "DiffProgress", "LayerDiff", "Sums", "TensorDiff", "Unlike", "diff"]
