"""The files of a checkpoint besides config.json and the weights: one list for the code that reads and the code that
copies them.

`qmix.tokenizer` reads a model's tokenizer, chat template and end tokens from these files, in a checkpoint and in a
store alike; `qmix quantize` copies exactly these. They are what transformers 5 reads for a tokenizer, a chat template
and a generation config. A file that is read but not copied would change the answers of the store without a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

SENTENCEPIECE = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE_JINJA = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"
GENERATION_CONFIG = "generation_config.json"
FILES = (SENTENCEPIECE, TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, "vocab.json", "merges.txt",
         TEMPLATE_JINJA, TEMPLATE_JSON, GENERATION_CONFIG)
TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
TEMPLATE_NAME = re.compile(rf"{TEMPLATES}/[A-Za-z0-9_-][\w.-]{{0,200}}\.jinja", re.ASCII)


def present(folder: Path) -> Iterator[str]:
    """Names, relative to the folder, of those files that it holds, in a fixed order."""
    yield from (name for name in FILES if (folder / name).is_file())
    for path in sorted((folder / TEMPLATES).glob("*.jinja")):
        if path.is_file() and TEMPLATE_NAME.fullmatch(name := f"{TEMPLATES}/{path.name}"):
            yield name


def leads_away(path: Path) -> Path | None:
    """Where a link leads that a stranger may have set: to a file of another name outside its folder, which a store
    would copy and publish (chat_template.jinja -> ../../.ssh/id_rsa). None for a file, and for links that people and
    the hub's cache set: within the folder, to a file of the same name, or to a blob of models--ORG--NAME."""
    target = path.resolve()
    top = path.parent.parent if path.parent.name == TEMPLATES else path.parent
    blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not path.is_symlink() or target.name == path.name or blob or target.is_relative_to(top.resolve()):
        return None
    return target
