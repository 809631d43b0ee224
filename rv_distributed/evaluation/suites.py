"""Tasks that go together, each with the way it is asked."""

from __future__ import annotations

from typing import Final

from rv_distributed.errors import UsageError
from rv_distributed.evaluation.model import Ask

#: The benchmarks of arXiv 2509.01363, with its kind of settings: zero-shot chains of thought, greedy. Prompts and
#: do_sample=False are the harness's own; its limit of 256 tokens would cut many chains off. The few-shot twins are
#: gsm8k_cot and bbh_cot_fewshot.
SUITES: Final[dict[str, tuple[Ask, ...]]] = {
    "paper": (
        Ask("gsm8k_cot_zeroshot", num_fewshot=0, gen_kwargs="max_gen_toks=1024", metric="exact_match,flexible-extract"),
        Ask("humaneval", num_fewshot=0, gen_kwargs="max_gen_toks=1024", metric="pass@1"),
        Ask("sciq", num_fewshot=0, metric="acc"),
        Ask("bbh_cot_zeroshot", num_fewshot=0, gen_kwargs="max_gen_toks=1024", metric="exact_match,flexible-extract"),
    )
}


def suite(name: str) -> tuple[Ask, ...]:
    """The tasks of a suite. Raises UsageError."""
    if name not in SUITES:
        raise UsageError(f"--suite: {name!r} is not one of {', '.join(SUITES)}")
    return SUITES[name]
