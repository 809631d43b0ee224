"""Four models from nothing: a base, a target tuned on it, and a donor trained by reinforcement from its reference.

The base writes every step. Target and reference are tuned on terse demonstrations, each in a way to ask of its own.
The donor goes on from the reference with GRPO (arXiv 2402.03300) and finds out by itself that steps pay.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from model import TinyQwen2
from problems import END, FORMATS, LONGEST, OMITTED, PAD, Format, compact, decode, draw_batch, sentences
from torch import Tensor
from torch.nn import functional

BATCH: Final = 16


class Effort(NamedTuple):
    """How long everything is trained."""

    stage_steps: int = 2000
    """Most steps of one length of the curriculum."""
    mixture_steps: int = 2500
    target_steps: int = 500
    sft_steps: int = 350
    grpo_steps: int = 60
    checked: int = 128
    """Problems at each gate."""


class NoBase(Exception):
    """The base did not learn; take another seed."""


def say(text: str) -> None:
    print(f"[{time.process_time():6.0f} s] {text}", file=sys.stderr, flush=True)


def _loss(model: TinyQwen2, prompts: list[list[int]], solutions: list[list[int]]) -> Tensor:
    """Cross entropy of the solutions' tokens."""
    start, most = len(prompts[0]), max(map(len, solutions))
    tokens = torch.tensor([p + s + [PAD] * (most - len(s)) for p, s in zip(prompts, solutions, strict=True)])
    logits, _ = model(tokens[:, :-1])
    wanted = tokens[:, start:]
    return functional.cross_entropy(logits[:, start - 1 :].flatten(0, 1), wanted.flatten(), ignore_index=PAD)


def _optimizer(model: TinyQwen2, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)


def _step(model: TinyQwen2, optimizer: torch.optim.AdamW, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def accuracy(model: TinyQwen2, rng: random.Random, count: int, lengths: range, form: Format) -> float:
    """Share of random problems, of all lengths alike, that greedy decoding solves."""
    right = 0
    each = -(-count // len(lengths))
    for length in lengths:
        prompts, _, problems = draw_batch(rng, each, length, form, 0.0)
        for made, problem in zip(model.generate(prompts, 7 * length + 8), problems, strict=True):
            right += solved(made, problem.answer)
    return right / (each * len(lengths))


def solved(made: list[int], answer: int) -> bool:
    """Whether a solution ends cleanly, with the right answer."""
    return made[-1] == END and decode(made).partition("#")[2] == str(answer)


def train_base(seed: int, effort: Effort) -> TinyQwen2:
    """One length after the other, then everything mixed. Raises NoBase."""
    rng, model = random.Random(f"base {seed}"), TinyQwen2(seed)
    optimizer = _optimizer(model, 3e-3)
    done = 0
    for longest in range(1, 6):
        for step in range(1, effort.stage_steps + 1):
            # The new length half of the time; what was learned before is not to be forgotten.
            length = longest if rng.random() < 0.5 else rng.randint(1, longest)
            prompts, solutions, _ = draw_batch(rng, BATCH, length, rng.choice(FORMATS), 0.0, shuffled=0.2)
            done += 1
            _step(model, optimizer, _loss(model, prompts, solutions), 3e-3 * min(1.0, done / 100))
            if step % 50 == 0:
                found = sum(accuracy(model, rng, effort.checked // 2, range(longest, longest + 1), form) for form in FORMATS) / len(FORMATS)
                if found >= 0.9:
                    break
        else:
            raise NoBase(f"length {longest} was not learned in {effort.stage_steps} steps: {found:.2f}")
        say(f"base: length {longest} after {step} steps, {found:.2f}")
    for step in range(effort.mixture_steps):
        length, form = rng.randint(1, LONGEST), rng.choice(FORMATS)
        omitted = OMITTED if rng.random() < 0.3 else 0.0
        prompts, solutions, _ = draw_batch(rng, BATCH, length, form, omitted, shuffled=0.2)
        loss = _loss(model, prompts, solutions)
        _step(model, optimizer, loss, 3e-3 * max(0.05, 1 - step / effort.mixture_steps))
        if (step + 1) % 500 == 0:
            say(f"base: mixture {step + 1}, loss {loss.item():.3f}, " + ", ".join(f"{accuracy(model, rng, effort.checked, range(1, LONGEST+1), form):.2f}" for form in FORMATS))
    found = min(accuracy(model, rng, 2 * effort.checked, range(1, LONGEST + 1), form) for form in FORMATS)
    if found < 0.85:
        raise NoBase(f"accuracy {found:.2f} is below 0.85 after the mixture")
    return model


def tune(model: TinyQwen2, seed: str, steps: int, form: Format, omitted: float, rate: float = 1e-3) -> TinyQwen2:
    """A copy of the model, tuned to imitate demonstrations in one way to ask."""
    rng, tuned = random.Random(seed), copy.deepcopy(model)
    optimizer = _optimizer(tuned, rate)
    for step in range(steps):
        prompts, solutions, _ = draw_batch(rng, BATCH, rng.randint(1, LONGEST), form, omitted)
        _step(tuned, optimizer, _loss(tuned, prompts, solutions), rate * max(0.05, 1 - step / steps))
    return tuned


def reinforce(model: TinyQwen2, seed: int, steps: int, form: Format, *, prompts_each: int = 32, samples: int = 8) -> TinyQwen2:
    """A copy of the model, trained by GRPO: reward 1 for the exact answer and a clean end, no KL, on-policy."""
    rng, trained = random.Random(f"grpo {seed}"), copy.deepcopy(model)
    torch.manual_seed(seed)
    optimizer = _optimizer(trained, 2e-4)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for step in range(steps):
        length = rng.randint(2, LONGEST)
        prompts, _, problems = draw_batch(rng, prompts_each, length, form, 0.0)
        every = [prompt for prompt in prompts for _ in range(samples)]
        made = trained.generate(every, 7 * length + 8, temperature=1.0)
        rewards = torch.tensor([float(solved(one, problems[n // samples].answer)) for n, one in enumerate(made)])
        groups = rewards.view(prompts_each, samples)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        if step % 10 == 0 or step == steps - 1:
            written = sum(decode(one).count("=") for one in made) / (len(made) * length)
            say(f"grpo: step {step}, length {length}, reward {rewards.mean():.2f}, {written:.2f} of the steps written")
        loss = _policy_loss(trained, every, made, advantages.flatten())
        _step(trained, optimizer, loss, 2e-4 * (1 - step / steps))
    return trained


def _policy_loss(model: TinyQwen2, prompts: list[list[int]], made: list[list[int]], advantages: Tensor) -> Tensor:
    """Of one step on fresh samples, where GRPO's ratio is 1: minus the advantage times the mean log-likelihood."""
    kept = advantages.abs() > 0
    rows = kept.nonzero()[:, 0].tolist()
    if not rows:
        return sum(parameter.sum() for parameter in model.parameters()) * 0.0
    prompts, made = [prompts[row] for row in rows], [made[row] for row in rows]
    start, most = len(prompts[0]), max(map(len, made))
    tokens = torch.tensor([p + s + [PAD] * (most - len(s)) for p, s in zip(prompts, made, strict=True)])
    logits, _ = model(tokens[:, :-1])
    wanted = tokens[:, start:]
    logs = -functional.cross_entropy(logits[:, start - 1 :].transpose(1, 2), wanted, ignore_index=PAD, reduction="none")
    return -(logs.sum(1) / (wanted != PAD).sum(1) * advantages[kept]).sum() / len(advantages)
