"""Models from nothing: a base, a target tuned on it, and a donor trained by reinforcement from its reference.

The base writes every step. Target and reference are tuned on terse demonstrations, each in a way to ask of its own.
The donor goes on from the reference with GRPO (arXiv 2402.03300) and finds out by itself that steps pay.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from model import TinyQwen2
from problems import END, FORMATS, LONGEST, PAD, Demonstrations, Example, Format, compact, decode, questions, sentences
from torch import Tensor
from torch.nn import functional

BATCH: Final = 16


class Effort(NamedTuple):
    """How much everything is trained; the defaults are those of the README's figures."""

    stages: tuple[int, ...] = (3, 5, 7)
    """The longest chains of each stage of the curriculum."""
    stage_steps: int = 2500
    """Most steps of a stage."""
    passes: float = 0.9
    """Accuracy that ends a stage."""
    mixture_steps: int = 1500
    sound: float = 0.85
    """Accuracy that a base needs."""
    target_steps: int = 500
    tuning_steps: int = 350
    grpo_steps: int = 60
    checked: int = 42
    """Problems of each way to ask, at each look."""


TOY: Final = Effort((1,), 20, 0.0, 10, 0.0, 5, 5, 2, 3)
"""For the tests: everything happens, and nothing is learned."""


class Family(NamedTuple):
    """All models of one seed."""

    base: TinyQwen2
    target: TinyQwen2
    reference: TinyQwen2
    """Tuned on terse demonstrations, from which the donor went on."""
    donor: TinyQwen2
    full: TinyQwen2
    """As the reference, tuned on demonstrations that leave nothing out."""
    random: TinyQwen2
    """The reference with a random vector added, which is as long as the donor's in each tensor."""


class NotLearned(Exception):
    """The base did not learn what it has to; take another seed."""


def train(seed: int, effort: Effort) -> Family:
    """Train everything. Raises NotLearned."""
    base = train_base(seed, effort)
    target = tune(base, f"target {seed}", effort.target_steps, Demonstrations(LONGEST, [sentences], 1.0))
    say(f"target: accuracy {accuracy(target, effort, LONGEST, [sentences]):.2f}")
    # The same seed for both: they see the same problems.
    reference = tune(base, f"reference {seed}", effort.tuning_steps, Demonstrations(LONGEST, [compact], 1.0))
    full = tune(base, f"reference {seed}", effort.tuning_steps, Demonstrations(LONGEST, [compact], 0.0))
    say(f"reference: accuracy {accuracy(reference, effort, LONGEST, [compact]):.2f}")
    donor = reinforce(reference, seed, effort.grpo_steps)
    say(f"donor: accuracy {accuracy(donor, effort, LONGEST, [compact]):.2f}")
    return Family(base, target, reference, donor, full, randomly_moved(reference, donor, seed))


def say(text: str) -> None:
    print(f"{time.process_time():6.0f} s of processor time: {text}", file=sys.stderr, flush=True)


def train_base(seed: int, effort: Effort) -> TinyQwen2:
    """Longer chains stage by stage, each until it passes; then also terse solutions. Raises NotLearned."""
    rng, model = random.Random(f"base {seed}"), TinyQwen2(seed)
    rate = 1.5e-3
    optimizer = _optimizer(model, rate)
    for number, longest in enumerate(effort.stages):
        batches = Demonstrations(longest, FORMATS, 0.0).batches(rng, BATCH)
        for step, batch in zip(range(1, effort.stage_steps + 1), batches, strict=False):
            warmth = min(1.0, step / 100) if number == 0 else 1.0
            _update(model, optimizer, _loss(model, batch), rate * warmth)
            if step % 100 == 0 and (found := accuracy(model, effort, longest, FORMATS)) >= effort.passes:
                break
        else:
            found = accuracy(model, effort, longest, FORMATS)
            if found < effort.passes:
                raise NotLearned(f"chains of up to {longest} were not learned in {step} steps: accuracy {found:.2f}")
        say(f"base: chains of up to {longest} after {step} steps, accuracy {found:.2f}")
    batches = Demonstrations(LONGEST, FORMATS, 0.3).batches(rng, BATCH)
    for progress, batch in _until(effort.mixture_steps, batches):
        _update(model, optimizer, _loss(model, batch), rate * max(0.02, 1 - progress))
    found = accuracy(model, effort._replace(checked=4 * effort.checked), LONGEST, FORMATS)
    if found < effort.sound:
        raise NotLearned(f"the base's accuracy is {found:.2f}, below {effort.sound}")
    say(f"base: accuracy {found:.2f}")
    return model


def tune(model: TinyQwen2, seed: str, steps: int, shown: Demonstrations) -> TinyQwen2:
    """A copy of the model, tuned to imitate demonstrations."""
    rng, tuned, rate = random.Random(seed), copy.deepcopy(model), 1e-3
    optimizer = _optimizer(tuned, rate)
    for progress, batch in _until(steps, shown._replace(shuffled=0.0).batches(rng, BATCH)):
        _update(tuned, optimizer, _loss(tuned, batch), rate * max(0.05, 1 - progress))
    return tuned


def reinforce(model: TinyQwen2, seed: int, steps: int, *, prompts_each: int = 32, samples: int = 8) -> TinyQwen2:
    """A copy of the model, trained by GRPO: reward 1 for the right answer and a clean end, no KL, on-policy."""
    rng, trained, rate = random.Random(f"grpo {seed}"), copy.deepcopy(model), 4e-4
    torch.manual_seed(seed)
    optimizer = _optimizer(trained, rate)
    for step in range(steps):
        # Of one length, so that nothing is padded.
        length = rng.randint(2, LONGEST)
        prompts, problems = questions(rng, prompts_each, length, compact)
        every = [prompt for prompt in prompts for _ in range(samples)]
        made = trained.generate(every, _most(length), temperature=1.0)
        rewards = torch.tensor([float(solved(one, problems[n // samples].answer)) for n, one in enumerate(made)])
        groups = rewards.view(prompts_each, samples)
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        if step % 10 == 0:
            written = sum(decode(one).count("=") for one in made) / (len(made) * length)
            got = f"reward {rewards.mean():.2f}, {written:.0%} of the steps written"
            say(f"donor: step {step}, chains of {length}: {got}")
        _update(trained, optimizer, _policy_loss(trained, every, made, advantages.flatten()), rate * (1 - step / steps))
    return trained


def randomly_moved(model: TinyQwen2, other: TinyQwen2, seed: int) -> TinyQwen2:
    """A copy of ``model``, moved in each tensor as far as ``other`` is, in a random direction."""
    moved, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own, there in zip(moved.parameters(), other.parameters(), strict=True):
            way = torch.randn(own.shape, generator=generator)
            own.add_(way * ((there - own).norm() / way.norm()))
    return moved


def accuracy(model: TinyQwen2, effort: Effort, longest: int, formats: tuple[Format, ...] | list[Format]) -> float:
    """Share of problems that greedy decoding solves, with all lengths and ways to ask alike: always the same ones."""
    rng, right, count = random.Random("checked"), 0, 0
    for form in formats:
        for length in range(1, longest + 1):
            prompts, problems = questions(rng, -(-effort.checked // longest), length, form)
            made = model.generate(prompts, _most(length))
            right += sum(solved(one, problem.answer) for one, problem in zip(made, problems, strict=True))
            count += len(problems)
    return right / count


def solved(made: list[int], answer: int) -> bool:
    """Whether a solution ends cleanly, with the right answer."""
    return made[-1] == END and decode(made).partition("#")[2] == str(answer)


def _most(length: int) -> int:
    """Tokens that no solution needs."""
    return 7 * length + 8


def _until(steps: int, batches: Iterator[list[Example]]) -> Iterator[tuple[float, list[Example]]]:
    """So many batches, each with how far it is, from 0 to 1."""
    return ((step / steps, batch) for step, batch in zip(range(steps), batches, strict=False))


def _optimizer(model: TinyQwen2, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01)


def _update(model: TinyQwen2, optimizer: torch.optim.AdamW, loss: Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation for it
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _loss(model: TinyQwen2, batch: list[Example]) -> Tensor:
    """Cross entropy of the solutions' tokens."""
    logits, wanted = _logits(model, batch)
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD)


def _policy_loss(model: TinyQwen2, prompts: list[list[int]], made: list[list[int]], advantages: Tensor) -> Tensor:
    """GRPO's on fresh samples, where its ratio is 1: minus the advantage times the tokens' mean log-likelihood."""
    logits, wanted = _logits(model, [Example(*pair) for pair in zip(prompts, made, strict=True)])
    logs = -functional.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=PAD, reduction="none")
    return -(logs.sum(1) / (wanted != PAD).sum(1) * advantages).mean()


def _logits(model: TinyQwen2, batch: list[Example]) -> tuple[Tensor, Tensor]:
    """For every token, and the token that it is about: padding where none is learned from."""
    most = max(len(prompt) + len(solution) for prompt, solution in batch)
    tokens = torch.full((len(batch), most), PAD)
    wanted = torch.full((len(batch), most), PAD)
    for row, (prompt, solution) in enumerate(batch):
        end = len(prompt) + len(solution)
        tokens[row, :end] = torch.tensor(prompt + solution)
        wanted[row, len(prompt) : end] = torch.tensor(solution)
    logits, _ = model(tokens[:, :-1])
    return logits, wanted[:, 1:]
