"""Checking a finished output: against its own digests, and against the inputs that it was made from."""

from rv_distributed.verification.against_inputs import Recomputed, verify_against_inputs
from rv_distributed.verification.output import VerifyProgress, verify

__all__ = ["Recomputed", "VerifyProgress", "verify", "verify_against_inputs"]
