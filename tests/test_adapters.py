"""LoRA adapters on their base, ``BASE+ADAPTER``, against PEFT's own ``merge_and_unload``.

PEFT multiplies the factors with the machine's own matrix product, whose order of addition is its own. So there are two
kinds of factors here: numbers whose products and sums are exact in any order, with which every bit has to be PEFT's,
and ordinary ones, with which the difference has to stay within what reordering can do.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fp8_reference import dequantized, fp8_config, random_fp8, write_fp8
from reference import Raw, assert_same, read_checkpoint, read_file, same_bits, weights, widen, write_checkpoint
from refusal import Done, run_rv
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import rv_distributed as rv
from rv_distributed.checkpoint.table import read_table

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lora_reference import delta, write_adapter
from peft import LoraConfig, PeftModel, get_peft_model


def llama(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).to(dtype)


def gpt2(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16)).to(dtype)


def fill(model: Any, *, exact: bool) -> None:
    """Trained values for all that an adapter has."""
    generator = torch.Generator().manual_seed(3)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        if exact:
            drawn = torch.randint(-4, 5, parameter.shape, generator=generator) / 64
        else:
            drawn = torch.randn(parameter.shape, generator=generator) / 10
        parameter.data.copy_(drawn)


def make(folder: Path, base: Any, *, exact: bool = True, **options: Any) -> Path:
    """``base`` and ``adapter`` in a folder, as their own save_pretrained writes them."""
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(**options))
    fill(model, exact=exact)
    model.save_pretrained(folder / "adapter")
    return folder


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """What PEFT makes of the two folders."""
    kind = json.loads((folder / "base" / "config.json").read_text())["architectures"][0]
    base = {"LlamaForCausalLM": LlamaForCausalLM, "GPT2LMHeadModel": GPT2LMHeadModel}[kind]
    model = PeftModel.from_pretrained(base.from_pretrained(folder / "base", dtype="auto"), folder / "adapter")
    found: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return found


def as_raw(tensor: torch.Tensor) -> Raw:
    dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[tensor.dtype]
    return Raw(dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())


def whole_of(folder: Path) -> set[str]:
    """The base's tensors that the adapter replaces: they come back as ``t + (a − b)``, which is not always a."""
    names = read_checkpoint(folder / "adapter")
    inside = ("base_model.model.", ".base_layer")
    return {name.replace(inside[0], "").replace(inside[1], "") for name in names if "lora_" not in name}


def adapted(folder: Path) -> str:
    return f"{folder / 'base'}+{folder / 'adapter'}"


def merge(folder: Path) -> dict[str, Raw]:
    """Base and adapter as one: as a target that gets nothing."""
    base = folder / "base"
    done = transfer(adapted(folder), adapted(folder), base, folder / "merged", "--alpha", "0")
    assert done.status == 0, done.stderr
    return read_checkpoint(folder / "merged")


def transfer(target: str | Path, donor: str | Path, reference: str | Path, out: Path, *more: str) -> Done:
    inputs = ["--target", target, "--donor", donor, "--reference", reference]
    return run_rv("transfer", *inputs, "--out", out, "--runtime", "local", *more)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What PEFT and transformers warn of is not ours to judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "attention": (llama, {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "all linear, of odd rank": (llama, {"r": 5, "lora_alpha": 20, "target_modules": "all-linear"}),
    "rslora": (llama, {"r": 16, "lora_alpha": 8, "use_rslora": True, "target_modules": ["down_proj"]}),
    "patterns": (
        llama,
        {
            "r": 8,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 4, r"^model\.layers\.\d+\.mlp\.down_proj": 2},
            "alpha_pattern": {"k_proj": 32, "layers.0.self_attn.q_proj": 2},
        },
    ),
    "whole modules and biases": (
        llama,
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head", "norm"],
            "bias": "all",
        },
    ),
    "embedding": (llama, {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "o_proj"]}),
    "transposed weights": (
        gpt2,
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float32) for case in CASES), ("attention", torch.float16), ("patterns", torch.bfloat16)],
    ids=str,
)
def test_exact_factors_give_the_bits_of_merge_and_unload(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    model, options = CASES[case]
    found = merge(make(tmp_path, model(dtype), **options))
    wanted = merged(tmp_path)
    changed = 0
    base = read_checkpoint(tmp_path / "base")
    for name, raw in found.items():
        # GPT-2's files lack the prefix that its modules have.
        of_peft = as_raw(wanted[name if name in wanted else f"transformer.{name}"])
        assert raw[:2] == of_peft[:2]
        assert same_bits(raw.data, of_peft.data, raw.dtype), name
        changed += raw.data != base[name].data
    assert changed >= 2
    # And what the adapter adds, added to its base.
    done = transfer(tmp_path / "base", adapted(tmp_path), tmp_path / "base", tmp_path / "out")
    assert done.status == 0, done.stderr
    for name, raw in read_checkpoint(tmp_path / "out").items():
        if name not in whole_of(tmp_path):
            assert same_bits(raw.data, found[name].data, raw.dtype), name


def test_ordinary_factors_differ_from_peft_s_by_no_more_than_the_order_of_addition(tmp_path: Path) -> None:
    options = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]}
    found = merge(make(tmp_path, llama(), exact=False, **options))
    wanted = merged(tmp_path)
    factors = read_checkpoint(tmp_path / "adapter")
    for name in (name for name in found if "q_proj.weight" in name or "down_proj.weight" in name):
        a, b = (
            widen(factors[f"base_model.model.{name[:-7]}.lora_{of}.weight"]).reshape(-1, *shape)
            for of, shape in (("A", found[name].shape[1:]), ("B", (16,)))
        )
        ours, theirs = widen(found[name]).reshape(found[name].shape), wanted[name].numpy()
        # Both sums of 16 products are off by at most 16 roundings, of at most all magnitudes together; and two more.
        largest = 2.0 * (np.abs(b).astype(np.float64) @ np.abs(a)) + np.abs(theirs)
        assert np.all(np.abs(ours - theirs) <= 2 * 18 * 2.0**-24 * largest)
        assert np.abs(ours - theirs).max() < 1e-6


# What follows needs no PEFT: adapters are written here, and products are added up in the order that the README states.


#: Both longer and shorter than what is computed at once; the rank is no multiple of what is added up at a time.
SHAPES = {"wide": (7, 300_001), "tall": (300_001, 5), "square": (700, 1100)}
RANK = 7


class Made:
    """A base and two adapters, and what they are."""

    def __init__(self, root: Path, base_dtype: str = "BF16") -> None:
        rng = np.random.default_rng(12)
        self.root = root
        self.tensors = {f"{name}.weight": weights(rng, base_dtype, shape) for name, shape in SHAPES.items()}
        self.tensors["norm"] = weights(rng, "F32", (9,))
        self.base = write_checkpoint(root / "base", self.tensors, pad=1)
        self.factors = [
            {
                name: (weights(rng, dtype, (rows, RANK)), weights(rng, dtype, (RANK, columns)))
                for name, (rows, columns) in SHAPES.items()
            }
            for dtype in ("F32", "BF16")
        ]
        self.adapters = [str(write_adapter(root / f"adapter{n}", factors)) for n, factors in enumerate(self.factors)]

    def delta(self, number: int, name: str) -> Any:
        return delta(self.factors[number][name.removesuffix(".weight")], 8 / RANK)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


def extract(donor: str, reference: str, out: Path) -> dict[str, Raw]:
    options = rv.PlanOptions(piece_bytes=1 << 20, max_shard_bytes=3_000_000)
    threads = rv.RunOptions(runtime="local", workers=3)
    rv.extract(donor, reference, str(out), plan_options=options, run_options=threads)
    done = run_rv("verify", out, "--against-inputs")
    assert done.status == 0, done.stderr
    return read_checkpoint(out)


def test_a_vector_of_an_adapter_is_its_product_to_the_bit_and_holds_nothing_else(made: Made, tmp_path: Path) -> None:
    found = extract(f"{made.base}+{made.adapters[0]}", made.base, tmp_path / "out")
    wanted = {f"{name}.weight": Raw("F32", shape, made.delta(0, name).tobytes()) for name, shape in SHAPES.items()}
    assert_same(found, wanted)
    manifest = json.loads((tmp_path / "out" / "rv_manifest.json").read_text())
    assert [(item["role"], item["uri"]) for item in manifest["inputs"]] == [
        ("donor", made.base),
        ("adapter", made.adapters[0]),
        ("reference", made.base),
    ]
    assert len({item["fingerprint"] for item in manifest["inputs"]}) == 2
    assert manifest["left_out"] == [{"tensor": "norm", "why": "the same in donor and reference"}]
    # The base is not read: only the factors are, the right one of each weight by every thread.
    factors = sum(len(raw.data) for pair in made.factors[0].values() for raw in pair)
    assert manifest["timings"]["bytes_read"] < 4 * factors


def test_two_adapters_of_one_base_are_subtracted_without_it(made: Made, tmp_path: Path) -> None:
    one, other = (f"{made.base}+{adapter}" for adapter in made.adapters)
    found = extract(one, other, tmp_path / "out")
    for name in SHAPES:
        wanted = made.delta(0, name) - made.delta(1, name)
        assert same_bits(found[f"{name}.weight"].data, wanted.tobytes(), "F32")


def test_an_adapter_as_the_reference_is_taken_away(made: Made, tmp_path: Path) -> None:
    found = extract(made.base, f"{made.base}+{made.adapters[1]}", tmp_path / "out")
    for name in SHAPES:
        assert same_bits(found[f"{name}.weight"].data, (-made.delta(1, name)).tobytes(), "F32")


def test_an_adapter_of_another_base_is_added_to_that_base_first(made: Made, tmp_path: Path) -> None:
    other = Path(shutil.copytree(made.base, tmp_path / "other"))
    found = extract(f"{made.base}+{made.adapters[0]}", str(other), tmp_path / "out")
    assert list(found) == list(made.tensors)
    for name in SHAPES:
        base = widen(made.tensors[f"{name}.weight"]).reshape(SHAPES[name])
        wanted = (base + made.delta(0, name)) - base
        assert same_bits(found[f"{name}.weight"].data, wanted.tobytes(), "F32")


@pytest.mark.parametrize("compute_dtype", ["float32", "float64"])
def test_a_target_with_an_adapter_is_their_sum(made: Made, tmp_path: Path, compute_dtype: Any) -> None:
    """With a vector on some of its tensors: the sum is rounded to float32 once, then the vector is added."""
    options = rv.PlanOptions(include="square", compute_dtype=compute_dtype, dtype="float32")
    target, reference = f"{made.base}+{made.adapters[0]}", f"{made.base}+{made.adapters[1]}"
    rv.transfer(target, made.base, reference, str(tmp_path / "out"), alpha=0.5, plan_options=options)
    found = read_checkpoint(tmp_path / "out")
    for name in SHAPES:
        wanted = widen(made.tensors[f"{name}.weight"]).reshape(SHAPES[name]) + made.delta(0, name)
        if name == "square":
            wanted = (wanted + wanted.dtype.type(0.5) * -made.delta(1, name)).astype(np.float32)
        assert same_bits(found[f"{name}.weight"].data, wanted.tobytes(), "F32"), name


def test_an_adapter_on_an_fp8_base(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    weight, scales = random_fp8(rng, (300, 200))
    base = write_fp8(tmp_path / "base", {"up.weight": weight, "up.weight_scale_inv": scales}, fp8_config())
    factors = (weights(rng, "F32", (300, 3)), weights(rng, "F16", (3, 200)))
    adapter = write_adapter(tmp_path / "adapter", {"up": factors})
    write_checkpoint(tmp_path / "zero", {"up.weight": Raw("F32", (300, 200), bytes(240_000))})
    rv.extract(f"{base}+{adapter}", str(tmp_path / "zero"), str(tmp_path / "out"))
    (row,) = read_table((tmp_path / "out" / "rv_tensors.parquet").read_bytes())
    assert row.decoded == "donor: lora of rank 3 on fp8 128×128"
    wanted = widen(dequantized(weight, scales)).reshape(300, 200) + delta(factors, 8 / 3)
    assert_same(read_checkpoint(tmp_path / "out"), {"up.weight": Raw("F32", (300, 200), wanted.tobytes())})


def test_tensors_without_an_adapter_are_copied_and_say_so(made: Made, tmp_path: Path) -> None:
    done = transfer(made.base, f"{made.base}+{made.adapters[0]}", made.base, tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(done.stdout)["plan"]
    assert plan["copied"] == [{"tensor": "norm", "rule": "copy", "why": "the same in donor and reference"}]
    assert [item["role"] for item in plan["inputs"]] == ["target", "donor", "adapter", "reference"]
    text = transfer(made.base, f"{made.base}+{made.adapters[0]}", made.base, tmp_path / "out", "--dry-run").stdout
    assert f"   adapter  {made.adapters[0]}" in text
    assert "   decoded  adapter: lora of rank 7 (" in text


def test_a_plus_in_a_name_is_a_plus_in_a_name(tmp_path: Path, made: Made) -> None:
    plain = Path(shutil.copytree(made.base, tmp_path / "a+b"))
    adapter = Path(shutil.copytree(made.adapters[0], tmp_path / "c+d"))
    assert rv.open_checkpoint(plain).adapter is None
    opened = rv.open_checkpoint(f"{plain}+{adapter}")
    assert (opened.uri, opened.adapter and opened.adapter.uri) == (str(plain), str(adapter))
    assert opened.name == f"{plain}+{adapter}"
    assert rv.open_checkpoint(f"file://{plain}+{adapter}").uri == str(plain)


def test_inspect_shows_both(made: Made) -> None:
    done = run_rv("inspect", f"{made.base}+{made.adapters[0]}", "--json")
    document = json.loads(done.stdout)
    assert (document["uri"], document["adapter"]["uri"]) == (made.base, made.adapters[0])
    assert document["adapter"]["decoding"] == "LoRA adapter of rank 7, added"
    assert document["warnings"] == []


@pytest.mark.parametrize("role", ["donor", "reference"])
def test_an_adapter_alone_is_no_model(made: Made, tmp_path: Path, role: str) -> None:
    inputs = {"donor": made.base, "reference": made.base, role: made.adapters[0]}
    done = transfer(made.base, inputs["donor"], inputs["reference"], tmp_path / "out")
    assert done.status == 2
    told = f"rv: {made.adapters[0]}: is a LoRA adapter, and no model without its base. Write BASE+"
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1


def test_the_same_adapter_twice_is_a_zero_vector(made: Made, tmp_path: Path) -> None:
    both = f"{made.base}+{made.adapters[0]}"
    done = transfer(made.base, both, both, tmp_path / "out")
    assert (done.status, "the vector would be zero" in done.stderr) == (2, True)


def test_an_adapter_whose_alpha_was_changed_since_is_found_out(made: Made, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(made.adapters[0], tmp_path / "adapter"))
    rv.extract(f"{made.base}+{adapter}", made.base, str(tmp_path / "out"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    done = run_rv("verify", tmp_path / "out", "--against-inputs")
    assert done.status == 2
    assert f"{adapter}: has changed since the output was made of it (adapter)" in done.stderr


def test_a_nan_in_a_factor_is_found_and_its_file_named(made: Made, tmp_path: Path) -> None:
    b, a = made.factors[0]["square"]
    broken = bytearray(a.data)
    broken[4 * 1003 : 4 * 1004] = b"\xff\xff\xff\x7f"
    adapter = write_adapter(tmp_path / "adapter", {"square": (b, Raw(a.dtype, a.shape, bytes(broken)))})
    done = transfer(made.base, f"{made.base}+{adapter}", made.base, tmp_path / "out")
    assert done.status == 2
    told = f"{adapter}/adapter_model.safetensors: tensor 'square.weight': 700 of 770000 elements are NaN or infinite"
    assert told in done.stderr
    assert "the first at index 1003 " in done.stderr


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "another kind": ({"peft_type": "LOHA"}, "has the peft_type 'LOHA'; LORA is read"),
    "DoRA": ({"use_dora": True}, "has use_dora True, which is not read"),
    "parameters": ({"target_parameters": ["experts"]}, "has target_parameters ['experts'], which is not read"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "which changed the base's own weights"),
    "another rank": ({"r": 8}, "says no rank of 7 or no alpha for"),
    "no alpha": ({"lora_alpha": "8"}, "says no rank of 7 or no alpha for"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "says no rank of 7 or no alpha for"),
    "alpha beyond float32": ({"lora_alpha": 1e39}, "says no rank of 7 or no alpha for"),
    "alpha beyond any float": ({"lora_alpha": 10**400}, "says no rank of 7 or no alpha for"),
    "a pattern of no end": ({"alpha_pattern": {"(a+)+b": 1}}, "has the alpha_pattern"),
    "patterns that are none": ({"rank_pattern": [1]}, "has the rank_pattern"),
    "transposed": ({"fan_in_fan_out": True}, "the base's weight has [700, 1100]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_is_more_than_a_product_is_refused_with_what_to_do(
    made: Made, tmp_path: Path, case: str
) -> None:
    config, told = REFUSED[case]
    adapter = write_adapter(tmp_path / "adapter", {"square": made.factors[0]["square"]}, **config)
    done = transfer(made.base, f"{made.base}+{adapter}", made.base, tmp_path / "out")
    assert (done.status, done.stdout) == (2, "")
    assert told in done.stderr, done.stderr
    assert str(adapter) in done.stderr
    assert not (tmp_path / "out").exists()
    # It can be looked at all the same.
    assert told in run_rv("inspect", f"{made.base}+{adapter}").stdout


def test_factors_that_do_not_fit_are_all_told(made: Made, tmp_path: Path) -> None:
    b, a = made.factors[0]["square"]
    adapter = write_adapter(tmp_path / "adapter", {"wide": (b, a), "missing": (b, a), "square": (b, a)})
    path = adapter / "adapter_model.safetensors"
    tensors = {**read_file(path), "base_model.model.tall.lora_A.weight": a}
    tensors["base_model.model.square.lora_magnitude_vector.weight"] = a
    path.unlink()
    write_checkpoint(tmp_path / "again", tensors)
    (tmp_path / "again" / "model.safetensors").rename(path)
    done = transfer(made.base, f"{made.base}+{adapter}", made.base, tmp_path / "out")
    for told in (
        "tensor 'base_model.model.missing.lora_A.weight': belongs to missing.weight, which the base lacks",
        "tensor 'base_model.model.wide.lora_A.weight': has shape [7, 1100], and [700, 7] its fellow",
        "tensor 'base_model.model.tall.lora_A.weight': is a factor without the other one",
        "tensor 'base_model.model.square.lora_magnitude_vector.weight': is no part of an adapter that is read",
    ):
        assert told in done.stderr, done.stderr


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter_is_refused(made: Made, tmp_path: Path, missing: str) -> None:
    adapter = Path(shutil.copytree(made.adapters[0], tmp_path / "adapter"))
    (adapter / missing).rename(adapter / "other")
    done = transfer(made.base, f"{made.base}+{adapter}", made.base, tmp_path / "out")
    assert done.status == 2
    assert f"{adapter}: holds no {missing}, which a LoRA adapter has" in done.stderr


def test_names_that_are_wrapped_otherwise_are_found(tmp_path: Path) -> None:
    """As when a model of images and text keeps its language model under another name than its checkpoint does."""
    rng = np.random.default_rng(9)
    name = "language_model.model.layers.0.up"
    base = write_checkpoint(tmp_path / "base", {f"{name}.weight": weights(rng, "F32", (6, 4))})
    factors = (weights(rng, "F32", (6, 2)), weights(rng, "F32", (2, 4)))
    adapter = write_adapter(tmp_path / "adapter", {"model.language_model.layers.0.up": factors})
    rv.extract(f"{base}+{adapter}", base, str(tmp_path / "out"))
    wanted = Raw("F32", (6, 4), delta(factors, 4).tobytes())
    assert_same(read_checkpoint(tmp_path / "out"), {f"{name}.weight": wanted})
