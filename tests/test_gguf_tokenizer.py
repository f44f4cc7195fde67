"""Tokenizers out of GGUF files give the ids of the tokenizer that the file was made from; the command, end to end."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizer_families as families
from tokenizer_files import CHATML, DEMO_TEMPLATE, ROLES, spm_model, write_folder
from tokenizer_gemma import gemma
from tokenizer_glm import glm
from tokenizer_harmony import harmony
from tokenizer_qwen3 import olmoe, qwen3

from qmix.errors import ConfigError
from qmix.gguf.bpe import CUTS
from qmix.gguf.tokenizer import tokenizer_files
from qmix.tokenizer import Message, Tokenizer, load

TEXTS = (
    *families.WIDE, "", " ", "\n\n \t x\r\n", "  two  spaces ", "don't WE'LL I'm x's", "e\u0301 vs \u00e9, A\u030a",
    "\u3053\u3093\u306b\u3061\u306f \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22 \u05e9\u05dc\u05d5\u05dd",
    "\U0001F98A\u200d\U0001F525\U0001F1E9\U0001F1EA",
    "for (int i = 0; i < 10; ++i) {\n\t\tx[i] += 0x1F; // done/\n}\n", "CamelCaseWord ABCdef 12345 1,234.5e-6 a/b//c",
    "\u2581under <0x41> <s> </s> <|im_end|> <think>", "\u00a0\u2003wide\u3000spaces\u200b",
    "\u0915\u094d\u0937 \u0645\u064f")


def texts() -> tuple[str, ...]:
    """Those above, and characters of them in other orders."""
    chosen, letters = random.Random(5), sorted({*"".join(TEXTS)})
    return (*TEXTS, *("".join(chosen.choices(letters, k=40)) for _ in range(40)))


def of_json(folder: Path, pre: str, template: str | None = None) -> dict[str, Any]:
    """The metadata that llama.cpp's converter makes of a folder with a tokenizer.json."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    rows = json.loads((folder / "config.json").read_text()).get("vocab_size")
    by_id = {i: (text, 1) for text, i in raw["model"]["vocab"].items()}
    by_id |= {token["id"]: (token["content"], 3 if token["special"] else 4) for token in raw["added_tokens"]}
    tokens = [by_id.get(i, (f"[PAD{i}]", 5)) for i in range(rows or max(by_id) + 1)]
    found = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
             "tokenizer.ggml.tokens": tuple(text for text, _ in tokens),
             "tokenizer.ggml.token_type": tuple(kind for _, kind in tokens),
             "tokenizer.ggml.merges": tuple(m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"])}
    for role in ("bos", "eos"):
        text = config.get(f"{role}_token")
        if text is not None:
            found[f"tokenizer.ggml.{role}_token_id"] = found["tokenizer.ggml.tokens"].index(text)
    jinja = folder / "chat_template.jinja"
    template = template or (jinja.read_text() if jinja.exists() else config.get("chat_template"))
    return found if template is None else {**found, "tokenizer.chat_template": template}


def of_spm(data: bytes, **keys: Any) -> dict[str, Any]:
    """The same, of a tokenizer.model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=data)
    ids = range(model.vocab_size())
    kinds = tuple(2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids)
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tuple(map(model.id_to_piece, ids)),
            "tokenizer.ggml.scores": tuple(map(model.get_score, ids)), "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
            **{f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}}


def loaded(folder: Path, metadata: Mapping[str, Any], kind: str = "llama") -> Tokenizer:
    folder.mkdir()
    rows = len(metadata["tokenizer.ggml.tokens"])
    (folder / "config.json").write_text(json.dumps({"model_type": kind, "vocab_size": rows}))
    for name, data in tokenizer_files(metadata).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return load(folder, rows)


def llama3(path: Path) -> Path:
    folder = families.folder(path, "llama3")
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["single_word"]]  # no GGUF file has these
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    return folder


BPES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "qwen3_moe": (qwen3, "qwen2"), "olmoe": (olmoe, "olmo"), "glm4_moe": (glm, "glm4"), "gpt_oss": (harmony, "gpt-4o"),
    "llama": (llama3, "llama-bpe")}


@pytest.mark.parametrize("kind", BPES)
def test_bpe_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    make, pre = BPES[kind]
    folder = make(tmp_path / "original")
    ours = loaded(tmp_path / "ours", of_json(folder, pre), kind)
    original = load(folder, ours.vocab_size if kind == "llama" else None)
    assert (ours.bos_id, ours.template_name, ours.has_template) == (original.bos_id, original.template_name, True)
    for text in texts():
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    chat = [Message("user", "Why <|im_end|> is it blue?"), Message("assistant", "It is."), Message("user", " So? ")]
    assert ours.encode_chat(chat) == original.encode_chat(chat)
    assert {*ours.eos_ids} <= {*original.eos_ids}


def of_gemma(folder: Path) -> dict[str, Any]:
    """As of_json; tokens of channels and tools, which llama.cpp shows, are user-defined, and no name says how texts are
    cut."""
    found = of_json(folder, "")
    shown = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>",
             '<|"|>')
    kinds = zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True)
    found["tokenizer.ggml.token_type"] = tuple(
        4 if text in shown else 2 if text == "<unk>" else 6 if text.startswith("<0x") else kind for text, kind in kinds)
    del found["tokenizer.ggml.pre"]
    return {**found, "tokenizer.ggml.model": "gemma4", "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.unknown_token_id": 3}


def test_gemma_gives_the_same_ids(tmp_path: Path) -> None:
    folder = gemma(tmp_path / "original")
    ours, original = loaded(tmp_path / "ours", of_gemma(folder), "gemma4_text"), load(folder)
    assert ours.bos_id == original.bos_id and ours.template_name == original.template_name
    for text in (*texts(), "<|channel>thought\nhm<channel|>", "<unk><mask>\n\n\n\n \n"):
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    chat = [Message("user", "Why <turn|> is it blue?"), Message("assistant", "It is."), Message("user", " So? ")]
    assert ours.encode_chat(chat) == original.encode_chat(chat)
    assert {*ours.eos_ids} <= {*original.eos_ids} and len(ours.eos_ids) > 1
    assert ours.headers == original.headers and len(ours.headers) > 1  # the format of Gemma's answers


def test_a_text_that_gemma_has_twice(tmp_path: Path) -> None:
    """The last id is what a text becomes, as in llama.cpp."""
    found = of_gemma(gemma(tmp_path / "original"))
    first = found["tokenizer.ggml.tokens"].index("a")
    ours = loaded(tmp_path / "ours", {**found, "tokenizer.ggml.tokens": (*found["tokenizer.ggml.tokens"], "a"),
                                      "tokenizer.ggml.token_type": (*found["tokenizer.ggml.token_type"], 1)})
    last = len(found["tokenizer.ggml.tokens"])
    assert last in ours.encode("x a") and first not in ours.encode("x a") and ours.decode(ours.encode("x a")) == "x a"
    assert ours.decode([first]) == ""


@pytest.mark.parametrize("spaces", [True, False])
def test_sentencepiece_gives_the_same_ids(tmp_path: Path, spaces: bool) -> None:
    data = spm_model(dummy_prefix=spaces)
    folder = write_folder(tmp_path / "original", data, bos_token="<s>", eos_token="</s>", chat_template=DEMO_TEMPLATE,
                          add_prefix_space=spaces)
    ours = loaded(tmp_path / "ours", of_spm(data, ggml__add_space_prefix=spaces, chat_template=DEMO_TEMPLATE))
    original = load(folder)
    assert ours.eos_ids == original.eos_ids and ours.template_name == original.template_name
    for text in texts():
        assert ours.encode(text) == original.encode(text), text
        assert ours.decode(ours.encode(text)) == original.decode(original.encode(text))
    chat = [Message("user", f"Why {ROLES[1]}?"), Message("assistant", "So."), Message("user", "Hm")]
    assert ours.encode_chat(chat) == original.encode_chat(chat)


def test_bos_only_where_the_file_wants_it(tmp_path: Path) -> None:
    data = spm_model()
    for i, (flag, want) in enumerate(((True, [1]), (False, []), (None, [1]))):
        keys = {} if flag is None else {"ggml__add_bos_token": flag}
        assert loaded(tmp_path / f"{i}", of_spm(data, **keys)).encode("") == want
    made = of_json(llama3(tmp_path / "llama3"), "llama-bpe")
    assert len(loaded(tmp_path / "with", made).encode("")) == 1
    assert loaded(tmp_path / "without", {**made, "tokenizer.ggml.add_bos_token": False}).encode("") == []


def test_named_templates(tmp_path: Path) -> None:
    files = tokenizer_files(of_spm(spm_model(), chat_template=CHATML, chat_template__tool_use="{{ tools }}"))
    assert files["chat_template.jinja"].decode() == CHATML
    assert files["additional_chat_templates/tool_use.jinja"] == b"{{ tools }}"
    with pytest.raises(ConfigError, match="a plain name"):
        tokenizer_files({**of_spm(spm_model()), "tokenizer.chat_template.../../x": "a"})


def test_without_a_tokenizer() -> None:
    assert tokenizer_files({"general.architecture": "llama"}) == {}
    assert tokenizer_files({"general.architecture": "llama", "tokenizer.ggml.model": "none"}) == {}


SPM: dict[str, Any] = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ("<unk>", "a"),
                       "tokenizer.ggml.scores": (0.0, -1.0), "tokenizer.ggml.token_type": (2, 1)}
BPE: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
                       "tokenizer.ggml.tokens": ("a", "b", "ab"), "tokenizer.ggml.merges": ("a b",)}


@pytest.mark.parametrize("base, changed, said", [
    (SPM, {"model": "bert"}, "tokenizer.ggml.model: got 'bert'"),
    (SPM, {"scores": (0.0,)}, "tokenizer.ggml.scores: got 1"),
    (SPM, {"scores": (0.0, float("nan"))}, "tokenizer.ggml.scores: got"),
    (SPM, {"scores": (0.0, -1e39)}, "tokenizer.ggml.scores: got -1e\\+39, want numbers that fp32 has"),
    (SPM, {"token_type": (2,)}, "tokenizer.ggml.token_type: got 1"),
    (SPM, {"token_type": (2, 9)}, r"tokenizer.ggml.token_type: got \[9\]"),
    (SPM, {"token_type": (1, 1)}, "tokenizer.ggml.token_type: got 0 unknown tokens"),
    (SPM, {"tokens": ("a", "a")}, "tokenizer.ggml.tokens: 'a': is there twice"),
    (SPM, {"tokens": 7}, "tokenizer.ggml.tokens: got 7, want a list"),
    (SPM, {"bos_token_id": 2}, "tokenizer.ggml.bos_token_id: got 2"),
    (SPM, {"add_bos_token": 1}, "tokenizer.ggml.add_bos_token: got 1"),
    (BPE, {"pre": "made-up"}, "tokenizer.ggml.pre: got 'made-up', want 'gpt-2'"), (BPE, {"pre": None}, "got None"),
    (BPE, {"merges": ("ab",)}, "tokenizer.ggml.merges: got 'ab', want two tokens"),
    (BPE, {"merges": ("a c",)}, "tokenizer.ggml.merges: 'a c': of a token that is not there"),
])
def test_refused_by_name(base: dict[str, Any], changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        tokenizer_files({**base, **{f"tokenizer.ggml.{key}": value for key, value in changed.items()}})
    assert "\n" not in caught.value.message


def test_every_pattern_is_one_that_the_library_takes() -> None:
    from tokenizers import Regex

    for cut in CUTS.values():
        Regex(cut.pattern or "x")


def test_quantize_and_answer(tmp_path: Path) -> None:
    """The command, from the file to an answer; then a file whose tokenizer is larger than the model."""
    pytest.importorskip("gguf")
    from architectures import random_model
    from gguf_models import CONFIGS, write
    from test_cli import qmix

    def keys(metadata: dict[str, Any]) -> Callable[[Any], None]:
        import gguf

        def add(writer: Any) -> None:
            for key, value in metadata.items():
                writer.kv_data[0].pop(key, None)
                kind = gguf.GGUFValueType.ARRAY if isinstance(value, tuple) else gguf.GGUFValueType.get_type(value)
                writer.add_key_value(key, [*value] if isinstance(value, tuple) else value, kind)
        return add

    model, data = random_model(CONFIGS["mixtral"]), spm_model()
    made = of_spm(data, chat_template=DEMO_TEMPLATE)
    path = write(tmp_path / "m.gguf", model, "mixtral", lambda name: "Q8_0", keys=keys(made))
    done = qmix("quantize", path, tmp_path / "st")
    assert done.returncode == 0, done.stderr
    assert "the weights are quantized already" not in done.stderr and "q8_0" in done.stderr, "they are carried"
    assert (tmp_path / "st" / "chat_template.jinja").read_text() == DEMO_TEMPLATE
    assert load(tmp_path / "st").encode("The fox") == load(write_folder(tmp_path / "o", data)).encode("The fox")
    answer = qmix("generate", tmp_path / "st", "-p", "The fox", "-n", 4, "--temp", 0)
    assert answer.returncode == 0, answer.stderr
    assert qmix("plan", path, "--ram", "8G").returncode == 0
    many = {**made, "tokenizer.ggml.tokens": made["tokenizer.ggml.tokens"] + tuple(f"x{i}" for i in range(200)),
            "tokenizer.ggml.scores": made["tokenizer.ggml.scores"] + (-1.0,) * 200,
            "tokenizer.ggml.token_type": made["tokenizer.ggml.token_type"] + (1,) * 200}
    wrong = qmix("quantize", write(tmp_path / "w.gguf", model, "mixtral", keys=keys(many)), tmp_path / "no")
    assert wrong.returncode == 4 and "w.gguf" in wrong.stderr and "620 ids" in wrong.stderr
    assert "qmix-gguf-" not in wrong.stderr and not (tmp_path / "no").exists()


