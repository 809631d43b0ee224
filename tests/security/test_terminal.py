"""What a terminal, a log or a reader gets to see: names from files are shown, never obeyed, and no secret with them."""

from __future__ import annotations

import ast
import json
import unicodedata
from pathlib import Path

import pytest
from reference import Raw, write_checkpoint
from refusal import make_models, one_tensor, run_rv, transfer, tree

import rv_distributed.cli
from rv_distributed.errors import Finding, InputError, PieceError, Problem, VerifyError, one_line, printable, redacted

CONTROLS = {
    "colours": "\x1b[31mred",
    "a title": "\x1b]0;owned\x07",
    "an old title": "\x9d0;owned\x9c",
    "a line of its own": "x\nrv: all is well",
    "the line again": "x\rrv: all is well",
    "a rubout": "x\x08\x7f",
    "NUL": "a\0b",
    "text from right to left": "\u202egpj.exe",
    "nothing to see": "a\u200bb",
    "another end of line": "a\u2028b\x85c",
    "half a pair": "\ud800",
}


def assert_harmless(text: str) -> None:
    odd = {char for char in text if (char != "\n" and unicodedata.category(char)[0] == "C") or char in "\u2028\u2029"}
    assert odd == set(), text


@pytest.mark.parametrize("text", CONTROLS.values(), ids=CONTROLS)
def test_what_a_terminal_would_obey_is_escaped(text: str) -> None:
    assert_harmless(one_line(text))
    assert "\n" not in one_line(text)
    assert printable(f"a\n{text}").startswith("a\n")
    assert_harmless(printable(text))


@pytest.mark.parametrize("text", ["模型/é ‖v‖₂ 0.7·(A − B) …", r"C:\x1b", "plain text, with 'quotes'"])
def test_other_text_is_shown_as_it_is(text: str) -> None:
    assert (one_line(text), printable(text)) == (text, text)


@pytest.mark.parametrize("text", CONTROLS.values(), ids=CONTROLS)
def test_errors_are_one_line_an_entry_whatever_they_quote(text: str) -> None:
    problem, finding = Problem(text, text, text, text), Finding(text, text, text, 1, 2)
    shown = [str(problem), str(finding), str(PieceError(text, text, 0, 1, (text,)))]
    shown += [str(InputError([problem, problem])), str(VerifyError(text, [finding]))]
    assert [line.count("\n") for line in shown] == [0, 0, 0, 2, 1]
    for line in shown:
        assert_harmless(line)


def test_a_name_of_megabytes_is_cut() -> None:
    assert len(str(Problem("f", "w", "r", "x" * 50_000_000))) < 2000


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "part", ["?token=" + ":" * 1_000_000, "://a" * 300_000, "?key" * 300_000, "&" + "key" * 300_000]
)
def test_no_text_takes_long_to_be_shown(part: str) -> None:
    assert len(printable(part)) > 4


def test_only_one_module_prints() -> None:
    package = Path(rv_distributed.cli.__file__).parents[1]
    parsed = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    printing = {
        name
        for name, tree in parsed.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "print"
    }
    assert printing == {"terminal.py"}


NAMES = {name: text for name, text in CONTROLS.items() if name not in ("half a pair",)}


@pytest.mark.parametrize("text", NAMES.values(), ids=NAMES)
def test_hostile_tensor_names_are_shown_escaped_by_every_command(tmp_path: Path, text: str) -> None:
    name = f"layer.{text}"
    for number, role in enumerate(("target", "donor", "reference")):
        tensors = {name: Raw("I64", (1,), bytes([number] * 8)), "norm": Raw("F32", (1,), bytes([number, 0, 0, 63]))}
        write_checkpoint(tmp_path / role, tensors)
    done = run_rv(*transfer(tmp_path, tmp_path / "out"))
    assert done.status == 0, done.stderr
    assert "not computed: layer." in done.stdout
    runs = [done, run_rv("inspect", tmp_path / "out"), run_rv("verify", tmp_path / "out")]
    (tmp_path / "reference" / "model.safetensors").unlink()
    write_checkpoint(tmp_path / "bad", {name: Raw("F8_E4M3", (8,), bytes(8)), "norm": Raw("F32", (1,), bytes(4))})
    refused = run_rv("extract", "--donor", tmp_path / "bad", "--reference", tmp_path / "bad", "--out", tmp_path / "v")
    assert refused.status == 2
    assert "tensor 'layer." in refused.stderr
    for shown in (*runs, refused):
        assert_harmless(shown.stdout + shown.stderr)
        assert "\nrv: all is well" not in shown.stdout + shown.stderr


@pytest.mark.parametrize("text", [t for n, t in NAMES.items() if n != "NUL"], ids=[n for n in NAMES if n != "NUL"])
def test_hostile_file_names_and_configs_are_shown_escaped(tmp_path: Path, text: str) -> None:
    folder = tmp_path / f"model{text.replace('/', '')}"
    config = json.dumps({"model_type": text, "architectures": [text]}).encode()
    one_tensor(folder / "a", config_json=config)
    one_tensor(folder / "b", config_json=b"{")
    (folder / "a" / f"file{text}".replace("/", "")).write_bytes(b"")
    shown = [run_rv("inspect", folder / "a"), run_rv("inspect", folder / "b"), run_rv("inspect", folder / "gone")]
    assert [done.status for done in shown] == [0, 2, 2]
    out = folder / "out"
    shown.append(run_rv("extract", "--donor", folder / "a", "--reference", folder / "b", "--out", out))
    for done in shown:
        assert_harmless(done.stdout + done.stderr)
        assert "\nrv: all is well" not in done.stdout + done.stderr


def test_half_a_pair_in_a_config_is_shown_escaped(tmp_path: Path) -> None:
    one_tensor(tmp_path / "a", config_json=b'{"model_type": "\\ud800"}')
    done = run_rv("inspect", tmp_path / "a")
    assert (done.status, done.stderr) == (0, "")
    assert "(\\ud800)" in done.stdout


def test_a_json_document_holds_names_as_they_are_and_no_control_character(tmp_path: Path) -> None:
    name = "layer.\x1b[31m\u202e"
    write_checkpoint(tmp_path / "a", {name: Raw("F32", (1,), bytes(4))})
    done = run_rv("inspect", tmp_path / "a", "--json")
    assert_harmless(done.stdout)
    assert list(json.loads(done.stdout)["tensors"]) == [name]


# Secrets

KEY = "SECRET"
URIS = {
    f"s3://AKIA:{KEY}@bucket/model": "s3://***@bucket/model",
    f"https://user:{KEY}@host:8080/x": "https://***@host:8080/x",
    f"https://{KEY}@host/x": "https://***@host/x",
    f"https://host/x?X-Amz-Credential={KEY}%2F1&X-Amz-Date=1&X-Amz-Signature={KEY}": (
        "https://host/x?X-Amz-Credential=***&X-Amz-Date=***&X-Amz-Signature=***"
    ),
    f"https://host/x?v=2&sig={KEY}&y=1": "https://host/x?v=2&sig=***&y=1",
    f"gs://bucket/x?access_token={KEY}#part": "gs://bucket/x?access_token=***#part",
    f"hf://org/model?token={KEY}": "hf://org/model?token=***",
    f"ray://user:{KEY}@head:10001": "ray://***@head:10001",
}


@pytest.mark.parametrize("uri", URIS)
def test_the_secrets_of_a_uri_are_taken_out(uri: str) -> None:
    assert redacted(f"at {uri}, {uri}: see") == f"at {URIS[uri]}, {URIS[uri]}: see"
    assert one_line(uri) == printable(uri) == URIS[uri]
    quoted = json.dumps({"uri": f'{uri}"', "next": 1})
    assert KEY not in redacted(quoted)
    assert json.loads(redacted(quoted))["next"] == 1


@pytest.mark.parametrize("text", ["/models/a@b/c", "s3://bucket/a@b", "see https://host/x?page=2", "a?token"])
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["", "json"])
@pytest.mark.parametrize("uri", URIS)
def test_no_command_repeats_a_secret(tmp_path: Path, uri: str, more: tuple[str, ...]) -> None:
    models = make_models(tmp_path)
    commands: list[list[str | Path]] = [
        ["inspect", uri, *more],
        ["extract", "--donor", uri, "--reference", models / "reference", "--out", models / "out", *more],
        transfer(models, models / "out", "--out", uri, *more),
    ]
    before = tree(tmp_path)
    for command in commands:
        done = run_rv(*command)
        assert done.status == 2
        assert URIS[uri] in done.stderr
        assert KEY not in done.stdout + done.stderr
    assert tree(tmp_path) == before


def test_a_file_uri_with_a_host_is_refused_without_its_secret(tmp_path: Path) -> None:
    done = run_rv("inspect", f"file://user:{KEY}@host{tmp_path}")
    assert done.status == 2
    assert "names another machine; write file:///path" in done.stderr
    assert KEY not in done.stderr
    one_tensor(tmp_path / "a")
    assert run_rv("inspect", f"file://localhost{tmp_path / 'a'}").status == 0


def test_what_is_in_the_environment_reaches_no_file_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, KEY)
    models = make_models(tmp_path)
    done = run_rv(*transfer(models, models / "out", "--json"))
    assert done.status == 0
    assert KEY not in done.stdout + done.stderr
    assert not [path for path in (models / "out").rglob("*") if KEY.encode() in path.read_bytes()]
