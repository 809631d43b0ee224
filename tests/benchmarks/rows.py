"""The rows of the table: what each one runs, how that compares, and what it should reach.

`__main__` takes the rows from `rows_of` and calls the ``measure`` of each in order.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import measure
import peers
import shapes
from data import Triple
from measure import CacheState, median, ratios
from suite import Bench, Figure, Goal
from wire import measure_wire

from rv_distributed.plan import PlanOptions
from rv_distributed.preparing import prepare
from rv_distributed.recipe import Recipe, Vector
from rv_distributed.runtime.select import RunOptions, may_have_gpus

_MB = 1e6
_LOCAL = ("--runtime", "local")
_RAY = ("--runtime", "ray")
_PEERS = str(Path(__file__).with_name("peers.py"))
_SCALING = str(Path(__file__).with_name("scaling.py"))


class Row(NamedTuple):
    """One row, not measured yet."""

    name: str
    needs: tuple[shapes.DataSet, ...]
    measure: Callable[[], list[Figure]]


def rows_of(bench: Bench) -> Iterator[Row]:
    """All rows, those on the same data beside each other. Toy suites have no rows against mergekit."""
    size = bench.size
    model, layers = (size.model,), (size.layers,)
    if size.name != "toy":
        local = partial(_against_mergekit, bench, "transfer-local", size.model, _LOCAL, 8)
        yield Row("transfer-local", model, local)
        yield Row("transfer-ray", model, partial(_against_mergekit, bench, "transfer-ray", size.model, _RAY, 4))
        yield Row("memory-mergekit", model, partial(_memory_of_mergekit, bench))
    yield Row("steady-warm", model, partial(_steady, bench, "steady-warm", "warm", 1.3))
    yield Row("steady-cold", model, partial(_steady, bench, "steady-cold", "cold", 1.15))
    yield Row("apply", model, partial(_apply, bench))
    full, none, chance = (("--stats", "full"), ("--stats", "none"), ("--rounding", "stochastic", "--alpha", "0.7"))
    yield Row("statistics", model, partial(_cost, bench, "statistics", full, none, Goal("≤", 1.25, "×")))
    yield Row("stochastic", model, partial(_cost, bench, "stochastic", chance, ("--alpha", "0.7"), None))
    if may_have_gpus():
        for name, dtype in (("gpu", "float32"), ("gpu-float64", "float64")):
            gpu, cpu = (("--compute-dtype", dtype, "--device", device) for device in ("cuda", "cpu"))
            yield Row(name, model, partial(_cost, bench, name, gpu, cpu, None))
    yield Row("alphas", model, partial(_alphas, bench))
    if size.name != "toy":
        many = partial(_against_mergekit, bench, "transfer-7b", size.layers, _LOCAL, 10)
        yield Row("transfer-7b", layers, many)
    for shape in size.memory:
        yield Row(f"memory-{shape.name}", (shape,), partial(_memory, bench, shape))
    yield Row("plan", (size.plan,), partial(_plan, bench))
    yield Row("scheduling", (size.pieces, shapes.pieces(1)), partial(_scheduling, bench))
    yield Row("scaling", (size.slow,), partial(_scaling, bench))
    yield Row("large", (size.plan,), partial(_large, bench))
    yield Row("wire", model, partial(measure_wire, bench, size.model, _rv()[0]))
    yield Row("help", (), partial(_help, bench))


def _rv(*arguments: object, program: str | None = None) -> list[str]:
    return [program or str(Path(sys.executable).with_name("rv")), *map(str, arguments)]


def _transfer(triple: Triple, out: Path | str, *flags: str, program: str | None = None) -> list[str]:
    inputs = ("--target", triple.base, "--donor", triple.grpo, "--reference", triple.sft)
    return _rv("transfer", *inputs, "--out", out, *flags, program=program)


def _wall_s(command: Sequence[str], env: Mapping[str, str] | None = None) -> float:
    return measure.run(command, env=env).wall_s


def _peer(*arguments: object) -> list[str]:
    return [sys.executable, _PEERS, *map(str, arguments)]


def _seconds(command: Sequence[str]) -> float:
    """What a peer says that its work took."""
    return float(json.loads(measure.run(command).stdout)["seconds"])


def _run_s(out: Path) -> float:
    return float(json.loads((out / "rv_manifest.json").read_bytes())["timings"]["run_s"])


def _compared(row: str, what: str, goal: Goal | None, raw: Mapping[str, Sequence[float]], state: str) -> Figure:
    """A ratio of two sides, the first over the second, round by round."""
    above, below = raw
    sides = ", ".join(f"{side} {median(figures):.3g} s" for side, figures in raw.items())
    return Figure(row, what, median(ratios(raw[above], raw[below])), "×", goal, f"{sides}; {state}", raw)


def _mergekit(bench: Bench, triple: Triple) -> list[str]:
    program = peers.mergekit_environment(bench.mergekit)
    recipe = bench.work / "mergekit.yaml"
    return peers.mergekit(program, recipe, bench.theirs, base=triple.base, sft=triple.sft, grpo=triple.grpo)


def _against_mergekit(
    bench: Bench, row: str, shape: shapes.DataSet, flags: tuple[str, ...], times: float
) -> list[Figure]:
    """Whole processes, from shell to prompt; warm where all inputs stay in memory."""
    triple = bench.triple(shape)
    state = measure.best_state(3 * shape.nbytes)
    sides = {
        "mergekit": partial(_wall_s, _mergekit(bench, triple), peers.MERGEKIT_ENV),
        "rv": partial(_wall_s, _transfer(triple, bench.ours, *flags)),
    }
    raw = bench.in_turn(row, triple.files(), state, sides)
    what = f"transfer, {shape.name}, {flags[-1]} runtime, times as fast as mergekit"
    return [_compared(row, what, Goal("≥", times, "×"), raw, state)]


def _steady(bench: Bench, row: str, state: CacheState, limit: float) -> list[Figure]:
    """Our streaming seconds, start-up and commit not counted, over those of a copy with as many threads."""
    triple = bench.triple(bench.size.model)
    recipe = Recipe("transfer", str(triple.base), (Vector(str(triple.grpo), str(triple.sft)),), ((1.0,),))
    sizing = prepare(recipe, [str(bench.ours)], PlanOptions(), RunOptions(runtime="local")).sizing
    knobs = ("--threads", sizing.streams, "--chunk", sizing.chunk_bytes)
    sides = {
        "rv": partial(_seconds, _peer("transfer", bench.ours, *triple)),
        "copy": partial(_seconds, _peer("copy", bench.theirs, *triple, *knobs)),
    }
    raw = bench.in_turn(row, triple.files(), state, sides)
    what = f"steady state over a bare copy, {bench.size.model.name}, {state}"
    return [_compared(row, what, Goal("≤", limit, "×"), raw, state)]


def _apply(bench: Bench) -> list[Figure]:
    """Streaming seconds of apply, over those without measures and digests of tensors."""
    triple = bench.triple(bench.size.model)
    vector = triple.base.with_name("vector")
    if not vector.exists():
        measure.run(_rv("extract", "--donor", triple.grpo, "--reference", triple.sft, "--out", vector, "--quiet"))
    files = [path for folder in (triple.base, vector) for path in folder.glob("*.safetensors")]
    sides = {
        "with": partial(_seconds, _peer("apply", bench.ours, triple.base, vector)),
        "without": partial(_seconds, _peer("apply", bench.theirs, triple.base, vector, "--bare")),
    }
    raw = bench.in_turn("apply", files, "warm", sides)
    what = "apply with statistics and digests over without"
    return [_compared("apply", what, Goal("≤", 1.2, "×"), raw, "warm")]


def _cost(bench: Bench, row: str, with_it: Sequence[str], without: Sequence[str], goal: Goal | None) -> list[Figure]:
    """Streaming seconds of a transfer over those of one with other flags. Where a fifth goes into it, it is 1.25 ×."""
    triple = bench.triple(bench.size.model)

    def side(flags: Sequence[str]) -> float:
        measure.run(_transfer(triple, bench.ours, *_LOCAL, *flags))
        return _run_s(bench.ours)

    raw = bench.in_turn(
        row, triple.files(), "warm", {"with": partial(side, with_it), "without": partial(side, without)}
    )
    return [_compared(row, f"transfer with {' '.join(with_it)} over {' '.join(without)}", goal, raw, "warm")]


def _alphas(bench: Bench) -> list[Figure]:
    triple = bench.triple(bench.size.model)
    three = _transfer(triple, f"{bench.ours}-{{alpha}}", *_LOCAL, "--alpha", "0.5,0.7,1.0")
    one = _transfer(triple, bench.ours, *_LOCAL, "--alpha", "1.0")
    sides = {"three": partial(_wall_s, three), "one": partial(_wall_s, one)}
    raw = bench.in_turn("alphas", triple.files(), "warm", sides)
    return [_compared("alphas", "three alphas over one, whole process", Goal("≤", 2.2, "×"), raw, "warm")]


def _memory(bench: Bench, shape: shapes.DataSet) -> list[Figure]:
    """The highest peak of all rounds."""
    triple, row = bench.triple(shape), f"memory-{shape.name}"
    command = _transfer(triple, bench.ours, *_LOCAL)
    state = measure.best_state(3 * shape.nbytes)
    sides = {"rv": lambda: measure.run(command, memory=True).peak_pss_bytes / _MB}
    raw = bench.in_turn(row, triple.files(), state, sides)
    what = f"peak memory (PSS of all processes), {shape.name}"
    return [Figure(row, what, max(raw["rv"]), "MB", Goal("≤", 800, "MB"), state, raw)]


def _memory_of_mergekit(bench: Bench) -> list[Figure]:
    command = _mergekit(bench, bench.triple(bench.size.model))
    bench.clear()
    peak = measure.run(command, memory=True, env=peers.MERGEKIT_ENV).peak_pss_bytes / _MB
    bench.clear()
    what = f"peak memory of mergekit, {bench.size.model.name}"
    return [Figure("memory-mergekit", what, peak, "MB", None, "for comparison", {"mergekit": [peak]})]


def _plan(bench: Bench) -> list[Figure]:
    """A dry run over a model far larger than the disk, hence through `peers.rv_on_any_disk`."""
    shape = bench.size.plan
    triple = bench.triple(shape)
    command = _peer(*_transfer(triple, bench.ours, *_LOCAL, "--dry-run", program="rv"))
    raw = bench.in_turn("plan", [], "warm", {"rv": partial(_wall_s, command)})
    peak = measure.run(command, memory=True).peak_pss_bytes / _MB
    what = f"plan of {shape.name}: {shape.parameters / 1e9:.3g}B parameters, {len(shape.tensors)} tensors, dry run"
    seconds = median(raw["rv"])
    return [
        Figure("plan", what, seconds, "s", Goal("≤", 10, "s"), "three inputs", raw),
        Figure("plan", "peak memory of the same", peak, "MB", Goal("≤", 1000, "MB"), "", {"rv": [peak]}),
    ]


def _scheduling(bench: Bench) -> list[Figure]:
    """CPU time of the driver's process for many pieces, less that for one, a piece."""
    flags = (*_RAY, "--workers", "2", "--max-shard-size", str(shapes.PIECE_DATA_BYTES))
    many, one = bench.triple(bench.size.pieces), bench.triple(shapes.pieces(1))
    count, walls = len(bench.size.pieces.tensors), list[float]()

    def side(triple: Triple) -> float:
        measured = measure.run(_transfer(triple, bench.ours, *flags))
        if triple is many:
            walls.append(_run_s(bench.ours))
        return measured.own_cpu_s

    raw = bench.in_turn("scheduling", many.files(), "warm", {"many": partial(side, many), "one": partial(side, one)})
    each = [(more - less) * 1000 / (count - 1) for more, less in zip(raw["many"], raw["one"], strict=True)]
    detail = f"{count} pieces; {median(walls) * 1000 / count:.3g} ms of wall time a piece"
    what = "driver's CPU time for a piece of 64 KiB, Ray, two workers"
    return [Figure("scheduling", what, median(each), "ms", Goal("≤", 1, "ms"), detail, {**raw, "run_s": walls})]


def _scaling(bench: Bench) -> list[Figure]:
    """What several workers write together, over so many times what one writes; all wait for slow reads."""
    triple, counts = bench.triple(bench.size.slow), bench.size.workers
    # So slow that the most workers are busy for three times as long as they are watched.
    rate = 3 * bench.size.slow.nbytes / counts[-1] / (3 * bench.size.seconds)

    def side(workers: int) -> float:
        flags = ("--workers", workers, "--rate", rate, "--seconds", bench.size.seconds)
        command = [sys.executable, _SCALING, "throughput", str(bench.ours), *map(str, triple), *map(str, flags)]
        return float(json.loads(measure.run(command).stdout)["bytes_per_s"])

    raw = {str(count): list[float]() for count in counts}
    for _ in range(bench.size.repeats):
        for count in counts:
            bench.clear()
            measure.warm(triple.files())
            raw[str(count)].append(side(count))
    bench.clear()
    one = raw[str(counts[0])]
    shares = {
        count: median([many / count / single for many, single in zip(raw[str(count)], one, strict=True)])
        for count in counts[1:]
    }
    detail = ", ".join(f"{count} workers {share:.1%}" for count, share in shares.items())
    what = "throughput over so many times that of one worker, storage of a fixed speed each, two raylets"
    return [Figure("scaling", what, 100 * min(shares.values()), "%", Goal("≥", 95, "%"), detail, raw)]


def _large(bench: Bench) -> list[Figure]:
    """The driver's own work for the largest plan, when nothing has to be waited for."""
    triple = bench.triple(bench.size.plan)
    command = [sys.executable, _SCALING, "large", str(bench.ours), *map(str, triple)]
    found = [json.loads(measure.run(command).stdout) for _ in range(bench.size.repeats)]
    bench.clear()
    parts = {name: [run[name] for run in found] for name in found[0] if name.endswith("_s")}
    detail = f"{found[0]['pieces']} pieces, {found[0]['tensors']} tensors; " + ", ".join(
        f"{name.removesuffix('_s')} {median(figures):.2g} s" for name, figures in parts.items()
    )
    what = f"driver's own work for {bench.size.plan.name}, without calls to workers"
    total = [sum(run[name] for name in parts) for run in found]
    return [Figure("large", what, median(total), "s", None, detail, parts)]


def _help(bench: Bench) -> list[Figure]:
    figures = [measure.run(_rv("--help")).cpu_s for _ in range(2 * bench.size.repeats + 1)]
    return [Figure("help", "rv --help, CPU time", median(figures), "s", Goal("≤", 0.3, "s"), "", {"rv": figures})]
