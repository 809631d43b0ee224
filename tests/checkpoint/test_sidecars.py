"""Which files go with a model, and the edits of config.json."""

from __future__ import annotations

import json

import pytest

from rv_distributed.checkpoint.sidecars import why_left_out, with_dtype, without_quantization

KEPT = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "index.json",
    "model_index.json",
    "preprocessor_config.json",
    "modeling_custom.py",
    "LICENSE",
    "NOTICE.txt",
    "subfolder/config.json",
    "docs/README.md",
    "binary",
    "notes.bin.txt",
    "my.git/config.json",
    "checkpoint-best/config.json",
    "optimizers.md",
    "latest.md",
    "my_runs.txt",
    "results.json",
    "scheduler/scheduler_config.json",
]

TRAINING_STATE = [
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_0/__0_0.distcp",
    "scheduler.pt",
    "rng_state_3.pth",
    "random_states_0.pkl",
    "trainer_state.json",
    "training_args.bin",
    "training_args.json",
    "latest",
    "global_step120/mp_rank_00_model_states.pt",
    "global_step_120/actor/config.json",
    "latest_checkpointed_iteration.txt",
    "zero_to_fp32.py",
    "checkpoint-1000/config.json",
    "sub/checkpoint-1000/tokenizer.json",
]

TRAINING_LOGS = [
    "runs/Nov26_host/events.out.tfevents.1732600000.host.1.0",
    "events.out.tfevents.1732600000.host.1.0",
    "wandb/run-1/files/config.yaml",
    "trainer_log.jsonl",
    "train.log",
    "logs/rank0.txt",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "training_loss.png",
]

LEFT_OUT = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "MODEL.SafeTensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "training_args.bin",
    "optimizer.pt",
    "consolidated.00.pth",
    "last.ckpt",
    "model-Q4_K_M.GGUF",
    "tf_model.h5",
    "flax_model.msgpack",
    "tf_model.h5.index.json",
    "flax_model.msgpack.index.json",
    "diffusion/diffusion_pytorch_model.safetensors.index.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "ONNX/MODEL.ONNX_DATA",
    "mlx/weights.npz",
    "mlx/weights.npy",
    "data.pkl",
    "scaler.joblib",
    "rust_model.ot",
    "saved_model/saved_model.pb",
    "model.tflite",
    "model.keras",
    "weights.hdf5",
    "ggml-model.ggml",
    "model.nemo",
    "original/__0_0.distcp",
    "adapter/adapter_model.safetensors",
    ".git/config",
    ".git/objects/ab/cdef",
    ".cache/huggingface/download/config.json.metadata",
    "__pycache__/modeling_custom.cpython-311.pyc",
    "code/__pycache__/x.py",
    ".gitattributes",
    "sub/.gitattributes",
    ".gitignore",
    "README.md",
    "rv_manifest.json",
    "rv_tensors.parquet",
    "rv_pieces.parquet",
    "rv_recipe.yaml",
]


@pytest.mark.parametrize("name", KEPT)
def test_a_file_of_the_model_goes_with_it(name: str) -> None:
    assert why_left_out(name) == ""


@pytest.mark.parametrize("name", LEFT_OUT)
def test_weights_caches_and_own_files_stay_behind(name: str) -> None:
    assert why_left_out(name)


@pytest.mark.parametrize("name", TRAINING_STATE)
def test_the_state_of_a_training_stays_behind(name: str) -> None:
    assert why_left_out(name) == "training state"


@pytest.mark.parametrize("name", TRAINING_LOGS)
def test_the_logs_of_a_training_stay_behind(name: str) -> None:
    assert why_left_out(name) == "training log"


DTYPE_EDITS = {
    "torch_dtype": (b'{"torch_dtype": "float32"}', b'{"torch_dtype": "bfloat16"}'),
    "dtype, the newer name": (b'{"dtype":"float16"}', b'{"dtype":"bfloat16"}'),
    "white space kept": (b'{\n\t"dtype" :\r\n "float32"\n}\n', b'{\n\t"dtype" :\r\n "bfloat16"\n}\n'),
    "inside a part's config": (
        b'{"text_config": {"torch_dtype": "float32", "n": 1}, "torch_dtype": "float32"}',
        b'{"text_config": {"torch_dtype": "bfloat16", "n": 1}, "torch_dtype": "bfloat16"}',
    ),
    "already so": (b'{"dtype": "bfloat16"}', b'{"dtype": "bfloat16"}'),
}

DTYPE_UNTOUCHED = {
    "no dtype": b'{"hidden_size": 8}',
    "empty": b"",
    "null": b'{"torch_dtype": null}',
    "auto": b'{"torch_dtype": "auto"}',
    "a dtype that no output has": b'{"torch_dtype": "float8_e4m3fn"}',
    "another field's name": b'{"bnb_4bit_compute_dtype": "float32", "dtype_of_cache": "float32"}',
    "the name as a value": b'{"name": "float32", "field": "torch_dtype"}',
    "quoted inside a string": json.dumps({"note": '"dtype": "float32"'}).encode(),
    "bytes that are no UTF-8": b'{"x": "\xff\xfe", "n": 1.0e5}',
}


@pytest.mark.parametrize(("before", "after"), DTYPE_EDITS.values(), ids=DTYPE_EDITS)
def test_the_dtype_fields_change_and_every_other_byte_stays(before: bytes, after: bytes) -> None:
    assert with_dtype(before, "bfloat16") == after
    assert with_dtype(after, "bfloat16") == after


@pytest.mark.parametrize("config", DTYPE_UNTOUCHED.values(), ids=DTYPE_UNTOUCHED)
def test_what_is_no_dtype_field_stays_as_it_is(config: bytes) -> None:
    assert with_dtype(config, "float16") == config


def test_odd_formatting_of_a_config_survives() -> None:
    config = b'{"rope_theta": 1e6,"eps":1.0E-06,\n  "torch_dtype": "bfloat16","z":[1,\n2], "a": "\\u00e9"}'
    assert with_dtype(config, "float32") == config.replace(b"bfloat16", b"float32")


STATED = '"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, {"quantization_config": 3}]}'


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ('{\n  "a": 1,\n  %s,\n  "b": 2.50\n}\n', '{\n  "a": 1,\n  "b": 2.50\n}\n'),
        ('{\n\t"a": 1,\n\t%s\n}\n', '{\n\t"a": 1\n}\n'),
        ("{%s}", "{}"),
        ('{"text_config": {%s, "b": 1}, "c": "\\u00ff ÿ"}', '{"text_config": {"b": 1}, "c": "\\u00ff ÿ"}'),
        ('{"a": 1, "b": {"c": [%s]}}'.replace("%s", "3"), '{"a": 1, "b": {"c": [3]}}'),
        ('{"quantization_config" :null,"a":1}', '{"a":1}'),
        ('{"a": "\\"quantization_config\\": {}, ", %s}', '{"a": "\\"quantization_config\\": {}, "}'),
        # Where the key is spelt otherwise, the document is written anew.
        ('{"a":1,"quant\\u0069zation_config":{}}', '{\n  "a": 1\n}\n'),
    ],
)
def test_the_quantization_is_taken_out_and_nothing_else(config: str, wanted: str) -> None:
    text = config.replace("%s", STATED)
    assert without_quantization(text.encode()).decode() == wanted
