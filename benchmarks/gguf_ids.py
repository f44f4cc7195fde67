"""Whether texts get the ids in qmix that llama.cpp gives them, by the vocabulary of GGUF files.

    python benchmarks/gguf_ids.py MODEL.gguf ... --peer-python PEER/bin/python --text TEXT ...
    python benchmarks/gguf_ids.py --peer-python PEER/bin/python --text TEXT ...

PEER: an environment with llama-cpp-python. Of a model only its header is read by qmix, its vocabulary by llama.cpp.
Without a model, byte-level vocabularies are trained on the texts, one for every tokenizer.ggml.pre that qmix reads, and
one of Gemma 4's kind. Their merges pay no heed to where texts are cut, so that a cut in another place gives other ids.

Three differences are known. llama.cpp has no NFC, which Qwen's and OLMo's tokenizers begin with: it is given these
texts in NFC. It cuts gpt-4o's and Tekken's words at combining marks, where the models' own tokenizers do not, and takes
letters of title case and those beyond U+FFFF for small ones. And of Gemma 4 it takes for a control token what spells
one, which is text in qmix. Texts that differ for the latter two are counted apart.

The corpus: pieces of each TEXT, sentences in many scripts, code, odd spaces, numbers, what spells a control token, and
characters of all of these in random order (seeded). A row a file: how many texts and ids agreed; behind it the first
texts that did not. Exit code 1 where one differs for no known reason.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from peers_report import table

from qmix.gguf.bpe import CUTS
from qmix.gguf.header import open_header
from qmix.gguf.tokenizer import tokenizer_files
from qmix.tokenizer import load

# Run by the peer's interpreter: [[file, [text, ...]], ...] as JSON, to [[[id, ...] of a text, ...] of a file, ...].
PEER = """
import json, sys
import llama_cpp
found = []
for file, texts in json.load(sys.stdin):
    llama = llama_cpp.Llama(file, vocab_only=True, verbose=False)
    found.append([llama.tokenize(text.encode(), add_bos=True, special=False) for text in texts])
json.dump(found, sys.stdout)
"""
SCRIPTS = (
    "Les \u00e9l\u00e8ves \u2014 \u00e7a va\u00a0? Na\u00efve fa\u00e7ade, Stra\u00dfe, \u0130stanbul, \u01c5ungla.",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0415\u0449\u0451 42 \u0441\u043b\u043e\u0432\u0430.",
    "\u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba\u03ac \u03ba\u03b1\u03b9 \u1f00\u03c1\u03c7\u03b1\u1fd6\u03b1.",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u4eca\u5929\u662f2026\u5e7411\u670828\u65e5\u3002",
    "\u3053\u3093\u306b\u3061\u306f\u3001\u30ab\u30bf\u30ab\u30ca\u30fc\uff01\u3000\u6f22\u5b57\u3068\u304b\u306a",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4. \u1112\u1161\u11ab",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645\u060c \u0661\u0662\u0663 \u0645\u064f",
    "\u05e9\u05c1\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05dc\u05dd 3",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969 \u0915\u094d\u0937",
    "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0bae\u0bca\u0bb4\u0bbf", "Ti\u1ebfng Vi\u1ec7t, e\u0301 vs \u00e9, A\u030a\u0323",
    "\U0001F98A\u200d\U0001F525 \U0001F1E9\U0001F1EA \u2764\ufe0f\U0001F44D\U0001F3FD",
    "\U00010348 \U0001D54F\u00b2 \u2155 \u216B")
CODE = (
    "def f(x):\n\tif x  >  1:\n        return {'a': [x, 2]}  # comment\n\n\n",
    "for (int i = 0; i < 10; ++i) {\r\n\t\tx[i] += 0x1F; // done/\r\n}\r\n",
    "<div class=\"a-b_c\">&nbsp;</div>\n<!-- x -->", "SELECT * FROM t WHERE a<>'it''s' AND b>=1e-6;",
    "CamelCaseWord ABCdef XMLHttpRequest snake_case kebab-case a/b//c \\n C:\\x", "https://example.org/a?b=1&c=%20#d")
SPACES = (
    "", " ", "  ", "\n", "\n\n\n", "\t \t", " \n \n  \n", "  two  spaces ", "end   ", "\n\n \t x\r\n",
    "a\r\n\r\n\r\nb", "a\rb",
    "\u00a0\u2003wide\u3000spaces\u200b\u2028line\u0085next", "x \u00a0 y",
    "a\u000b\u000cb", "\ufeffbom", "tab\t\ttab\n\t\n")
REST = (
    "don't WE'LL I'm x's 'tis 'S it\u2019s I'D they'Re", "1234567 3.14 1,234.5e-6 \u00bd \u00b2 12\u0663\u0664 0001",
    "<s> </s> <unk> [INST] <|im_end|> <|endoftext|> <0x41> <think> <bos> <start_of_turn> \u2581under\u2581 _",
    "!!! ... ?! --- ***bold*** $$ \u20ac5 \u2026 \u201cquoted\u201d \u00abx\u00bb #hash @at /path",
    "a" * 60, "!" * 40, "=" * 33 + "\n" + "-" * 70)
SPECIAL = ("<unk>", "<s>", "</s>")
SHOWN = ("<think>", "[INST]")
CASED = ("gpt-4o", "tekken")


def corpus(files: Sequence[Path], pieces: int, mixed: int) -> list[str]:
    """`pieces` of each file, of up to 400 characters from any place on, and `mixed` texts of random characters."""
    chosen = random.Random(7)
    found = [*SCRIPTS, *CODE, *SPACES, *REST]
    letters = sorted({*"".join(found)})
    found += ["".join(chosen.choices(letters, k=chosen.randint(1, 60))) for _ in range(mixed)]
    words = [part for text in (*SCRIPTS, *CODE, *REST[:4]) for part in text.split(" ")]
    found += [chosen.choice((" ", "  ", "\n", "")).join(chosen.choices(words, k=12)) for _ in range(mixed)]
    for file in files:
        text = file.read_text(errors="replace")
        starts = (chosen.randrange(max(1, len(text))) for _ in range(pieces))
        found += [text[at:at + chosen.randint(1, 400)] for at in starts]
    return found


def trained(texts: Iterable[str], size: int, of_bytes: bool) -> tuple[list[str], list[list[str]]]:
    """(tokens, merges) of a BPE whose tokens may hold anything, also what is cut elsewhere: texts are cut for training
    into pieces of random length. of_bytes: byte-level; else of characters, with U+2581 for a space, and line breaks
    apart, as Gemma's vocabulary has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    chosen, pieces = random.Random(11), []
    for text in texts:
        for run in [text] if of_bytes else re.findall(r"\n+|[^\n]+", text.replace(" ", "\u2581")):
            at = 0
            while at < len(run):
                end = at + chosen.randint(2, 14)
                pieces.append(run[at:end])
                at = end
    bpe = Tokenizer(models.BPE())
    alphabet: list[str] = []
    if of_bytes:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(pieces, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


def write(path: Path, pre: str | None, tokens: list[str], merges: list[list[str]]) -> Path:
    """A GGUF file with a vocabulary alone; pre: None for Gemma 4's kind."""
    import gguf

    writer, types = gguf.GGUFWriter(path, "llama"), gguf.TokenType
    known = [*SPECIAL, *SHOWN, *(() if pre is not None else (f"<0x{byte:02X}>" for byte in range(256)))]
    texts = [*known, *(token for token in tokens if token not in known)]
    kinds = [types.UNKNOWN if text == "<unk>" and pre is None else types.CONTROL if text in SPECIAL else
             types.USER_DEFINED if text in SHOWN else types.BYTE if text in known else types.NORMAL for text in texts]
    writer.add_tokenizer_model("gpt2" if pre is not None else "gemma4")
    writer.add_tokenizer_pre("gemma4" if pre is None else pre)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    if pre is None:
        writer.add_token_scores([0.0] * len(texts))
        writer.add_add_space_prefix(False)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def of_qmix(file: Path, texts: Sequence[str], folder: Path) -> list[list[int]]:
    metadata = open_header(file).metadata
    place, rows = folder / f"{file.name}.tokenizer", len(metadata["tokenizer.ggml.tokens"])
    for name, data in {"config.json": json.dumps({"vocab_size": rows}).encode(), **tokenizer_files(metadata)}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    tokenizer = load(place, rows)
    return [tokenizer.encode(text) for text in texts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--peer-python", required=True, help="interpreter with llama-cpp-python")
    parser.add_argument("--text", nargs="*", type=Path, default=[])
    parser.add_argument("--pieces", type=int, default=400, help="of each text (default 400)")
    parser.add_argument("--mixed", type=int, default=400, help="texts of random characters, and as many of words (400)")
    parser.add_argument("--vocabulary", type=int, default=6000, help="tokens of a trained one (default 6000)")
    args = parser.parse_args()
    texts = corpus(args.text, args.pieces, args.mixed)
    with tempfile.TemporaryDirectory(prefix="qmix-ids-") as name:
        folder, files = Path(name), list(args.files)
        if not files:
            of_bytes, of_characters = (trained(texts, args.vocabulary, kind) for kind in (True, False))
            files = [write(folder / f"{pre}.gguf", pre, *of_bytes) for pre in CUTS]
            files.append(write(folder / "gemma4.gguf", None, *of_characters))
        cuts = [str(open_header(file).metadata.get("tokenizer.ggml.pre")) for file in files]
        asked = json.dumps([[str(file), [unicodedata.normalize("NFC", text) for text in texts] if nfc(cut) else texts]
                            for file, cut in zip(files, cuts, strict=True)])
        ran = subprocess.run([args.peer_python, "-c", PEER], input=asked, stdout=subprocess.PIPE, text=True, check=True)
        return report(files, cuts, texts, json.loads(ran.stdout), [of_qmix(file, texts, folder) for file in files])


def nfc(cut: str) -> bool:
    return cut in CUTS and CUTS[cut].nfc


def is_known(cut: str, text: str) -> bool:
    """Whether a text may differ for a known reason: it spells a control token, or has characters that llama.cpp cuts
    otherwise."""
    if cut == "gemma4":
        return any(special in text for special in (*SPECIAL, *SHOWN))
    return cut in CASED and any(unicodedata.category(letter)[0] == "M" or unicodedata.category(letter) == "Lt" or (
        letter.isalpha() and letter > "\uffff") for letter in text)


def report(files: Sequence[Path], cuts: Sequence[str], texts: Sequence[str], theirs: Any, ours: Any) -> int:
    """Print the table; 1 where a text differs for no reason that is known."""
    rows, differ = [], []
    for file, cut, their, our in zip(files, cuts, theirs, ours, strict=True):
        wrong = [at for at, (one, two) in enumerate(zip(their, our, strict=True)) if one != two]
        known = [at for at in wrong if is_known(cut, texts[at])]
        ids = sum(map(len, their))
        rows.append([file.name, str(len(texts) - len(wrong)), str(len(texts)),
                     str(ids - sum(len(their[i]) for i in wrong)), str(ids), str(len(known))])
        differ += [(file.name, texts[at], their[at], our[at]) for at in wrong if at not in known][:5]
    print(table(["file", "texts that agree", "of", "ids in them", "of", "differ for a known reason"], rows))
    for name, text, their, our in differ:
        print(f"{name}: {text!r}\n  llama.cpp {their}\n  qmix      {our}")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
