"""Small tokenizers for tests, trained here and now, and folders that hold them."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

TEXT = (
    "The fox carried a lantern through the dark forest, and the owl asked where it was going.",
    "\"Home,\" said the fox, \"before the rain comes.\" Then the rain came.",
    "Mixture-of-Experts models route every token to two of eight experts: 12, 34 and 56 are numbers.",
    "Is the user there? The assistant is. A system of <tags> and [brackets] (and more) | here.",
)
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
DEMO_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@cache
def spm_model(vocab_size: int = 420, control: tuple[str, ...] = ROLES, defined: tuple[str, ...] = (),
              byte_fallback: bool = True, collapse: bool = False, model_type: str = "bpe",
              dummy_prefix: bool = True) -> bytes:
    """A sentencepiece model: <unk> 0, <s> 1, </s> 2, then control and user-defined symbols, bytes, pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT * 20), model_writer=model, model_type=model_type, vocab_size=vocab_size,
        byte_fallback=byte_fallback, character_coverage=1.0, control_symbols=list(control),
        user_defined_symbols=list(defined), normalization_rule_name="identity", num_threads=1,
        remove_extra_whitespaces=collapse, add_dummy_prefix=dummy_prefix, hard_vocab_limit=False,
        minloglevel=2)
    return model.getvalue()


def write_folder(path: Path, model: bytes | None = None, json_text: str | None = None,
                 model_config: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder with tokenizer.model or tokenizer.json, tokenizer_config.json (config) and config.json."""
    path.mkdir(parents=True, exist_ok=True)
    if model is not None:
        (path / "tokenizer.model").write_bytes(model)
    if json_text is not None:
        (path / "tokenizer.json").write_text(json_text)
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"eos_token_id": 2, **(model_config or {})}))
    return path


def demo_folder(path: Path) -> Path:
    """A tokenizer of the bundled demo's kind: control symbols for the roles, and its template."""
    return write_folder(path, spm_model(), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                        additional_special_tokens=list(ROLES), chat_template=DEMO_TEMPLATE)


@cache
def byte_level_json() -> str:
    """A GPT-2 style tokenizer.json: byte-level BPE with ChatML markers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                  for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer.to_str()


@cache
def spelled_json() -> str:
    """A Llama style tokenizer.json: sentencepiece's spelling with byte fallback."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    trained = Tokenizer(models.BPE())
    spell = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained.normalizer = spell
    trained.train_from_iterator(TEXT * 20, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    state = json.loads(trained.to_str())["model"]
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *state["vocab"]]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges,
                                     unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = spell
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return tokenizer.to_str()
