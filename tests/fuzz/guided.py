"""Coverage-guided fuzzing of the parsers that touch no weights, by hand: atheris, which is no dependency of the suite.

    python -m venv /tmp/fz && /tmp/fz/bin/pip install atheris -e '.[dev]'
    /tmp/fz/bin/python tests/fuzz/guided.py gguf --seconds 300          # one of TARGETS

A target gives each input to a parser; what it raises must be a QmixError with a documented exit code, in one short
line. Each other outcome is written to OUT with its input, once for each place in the code, and the search goes on. An
input that takes 20 seconds of CPU or 3 GiB ends the process; it lies in OUT/running.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["qmix", "jinja2"]):
    from qmix.checkpoint import Checkpoint  # noqa: F401  (imports what the parsers import)
    from qmix.errors import QmixError
    from qmix.gguf.header import open_header
    from qmix.gguf.model import gguf_config
    from qmix.gguf.tokenizer import tokenizer_files
    from qmix.models.registry import ARCHITECTURES, read_model
    from qmix.spec.json import from_json, to_json
    from qmix.store.manifest import Manifest
    from qmix.tensorfile import read_header
    from qmix.tokenizer import Message, load
    from qmix.tokenizer.sandbox import Template

import mutate  # noqa: E402
from batch import CODES, SHOWN  # noqa: E402

MEMORY, SECONDS = 3072, 20  # MiB, and seconds of CPU, of one input
Target = tuple[Callable[[bytes], object], list[bytes], bool]  # what takes an input, the first inputs, whether JSON


class File:
    """A file in memory, whose content is replaced for each input."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("fuzz")
        self.path = Path(f"/proc/self/fd/{self._fd}")

    def write(self, data: bytes) -> Path:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)
        return self.path


def gguf() -> Target:
    import gguf_files

    file = File()

    def once(data: bytes) -> None:
        found = open_header(file.write(data)).file
        assert all(found.data_start <= e.offset and e.offset + e.nbytes <= found.size for e in found.entries.values())

    return once, [b"".join(gguf_files.parts())], False


def safetensors() -> Target:
    """An input is the JSON of a header; its length stands in front, and as many bytes behind it as it describes."""
    file = File()

    def once(data: bytes) -> None:
        body = 0
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            body = max(entry["data_offsets"][1] for entry in json.loads(data).values())
        body = body if type(body) is int and 0 <= body < 2**20 else 0
        found = read_header(file.write(struct.pack("<Q", len(data)) + data + bytes(body)))
        assert all(found.data_start <= e.offset and e.offset + e.nbytes <= found.size for e in found.entries.values())

    entries = {f"t{i}": {"dtype": kind, "shape": [2, 4], "data_offsets": [i * 32, i * 32 + 32]}
               for i, kind in enumerate(("F32", "I32", "U32"))}
    return once, [json.dumps(entries).encode(), json.dumps({**entries, "__metadata__": {"a": "b"}}).encode()], True


def config() -> Target:
    def once(data: bytes) -> None:
        model = read_model(parsed(data))
        assert from_json(json.loads(json.dumps(to_json(model)))) == model

    return once, [json.dumps(dict(file.TINY)).encode() for file in ARCHITECTURES.values()], True


def gguf_metadata() -> Target:
    """Metadata of a GGUF file, as JSON: to a config, a model and the files of a tokenizer."""
    import gguf_models
    from architectures import random_model

    firsts = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, raw in gguf_models.CONFIGS.items():
            path = gguf_models.write(Path(folder) / "m.gguf", random_model(raw), kind)
            header = open_header(path)
            shapes = {name: entry.shape for name, entry in header.file.entries.items()}
            firsts.append(json.dumps({"m": dict(header.metadata), "s": shapes}).encode())

    def once(data: bytes) -> None:
        both = parsed(data)
        metadata, shapes = (both.get(key) if isinstance(both.get(key), dict) else {} for key in "ms")
        shapes = {name: tuple(shape) for name, shape in shapes.items()
                  if isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)}
        # As the header's reader gives them: numbers, bools, texts and tuples of these.
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in metadata.items()
                  if not isinstance(value, dict | None) and not (
                      isinstance(value, list) and len({type(item) for item in value}) > 1)
                  and not (isinstance(value, list) and value and isinstance(value[0], list | dict | None))}
        try:
            read_model(gguf_config(values, shapes))
        finally:
            tokenizer_files(values)

    return once, firsts, True


def manifest() -> Target:
    from helpers import write_tiny_checkpoint
    from odd_stores import ODD, QUANTS, quantize

    file, firsts = File(), []
    with tempfile.TemporaryDirectory() as folder:
        source = write_tiny_checkpoint(Path(folder) / "c", **{**ODD, "num_hidden_layers": 1})
        for name in ("int4", "nf4", "keep"):
            if name in QUANTS:
                firsts.append((quantize(source, Path(folder) / name, QUANTS[name]) / "qmix.json").read_bytes())

    def once(data: bytes) -> None:
        Manifest.read(file.write(data))

    return once, firsts, True


def tokenizer_json() -> Target:
    """The whole of a tokenizer.json: loaded, a chat encoded and decoded."""
    from tokenizer_files import CHATML, byte_level_json, spelled_json, write_folder

    folder = Path(tempfile.mkdtemp(prefix="qmix-guided-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path = write_folder(folder / "t", json_text=byte_level_json(), chat_template=CHATML)
    firsts = [text.encode() for text in (byte_level_json(), spelled_json())]

    def once(data: bytes) -> None:
        (path / "tokenizer.json").write_bytes(data)
        tokenizer = load(path)
        tokenizer.decode(tokenizer.encode_chat([Message("user", "A fox, <s> 12 \U0001F98A")]))
        tokenizer.encode("The owl.\n")

    return once, firsts, True


def tokenizer_config() -> Target:
    """tokenizer_config.json beside a good tokenizer.json, its templates included."""
    from tokenizer_files import CHATML, byte_level_json, write_folder

    folder = Path(tempfile.mkdtemp(prefix="qmix-guided-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    path = write_folder(folder / "t", json_text=byte_level_json(), chat_template=CHATML)
    first = (path / "tokenizer_config.json").read_bytes()

    def once(data: bytes) -> None:
        (path / "tokenizer_config.json").write_bytes(data)
        load(path).encode_chat([Message("user", "A fox, <s> 12")])

    return once, [first], True


def template() -> Target:
    messages: list[Any] = [{"role": "user", "content": "a <b> \u00e9" * 9}, {"role": "assistant", "content": "yes"}]

    def once(data: bytes) -> None:
        Template(data.decode("utf-8", "replace"), Path("t.jinja")).render(messages, {"bos_token": "<s>"}, prompt=True)

    return once, [mutate.template(random.Random(seed)).encode() for seed in range(40)], False


TARGETS = {target.__name__: target for target in (gguf, safetensors, config, gguf_metadata, manifest, tokenizer_json,
                                                  tokenizer_config, template)}


def parsed(data: bytes) -> dict[str, Any]:
    """An object, {} for anything else: config.json that is none is refused elsewhere."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def mutator(is_json: bool) -> Callable[[bytes, int, int], bytes]:
    """libFuzzer's own mutations; half of the time those of mutate.py, which keep JSON and programs whole."""
    def change(data: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if dice.random() < 0.5:
            return bytes(atheris.Mutate(data, most))
        if not is_json:
            return mutate.mutate_bytes(data, dice)[:most]
        try:
            return mutate.as_json(mutate.mutate_json(json.loads(data), dice), dice)[:most]
        except (ValueError, RecursionError, OverflowError):
            return bytes(atheris.Mutate(data, most))

    return change


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300, help="of CPU")
    parser.add_argument("--out", type=Path, help="for inputs that were found, and the corpus (default: a new folder)")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix=f"qmix-{given.target}-"))
    corpus = out / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    once, firsts, is_json = TARGETS[given.target]()
    for i, first in enumerate(firsts):
        (corpus / f"first-{i}").write_bytes(first)
    outcomes: Counter[str] = Counter()
    seen: set[str] = set()

    def one(data: bytes) -> None:
        try:
            once(data)
            outcomes["read"] += 1
            return
        except QmixError as error:
            outcomes[f"exit-{error.exit_code}"] += 1
            if error.exit_code in CODES and "\n" not in error.message and len(error.message) <= SHOWN:
                return
            where = f"a message of {len(error.message)} characters, exit code {error.exit_code}"
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{type(error).__name__} at {frames[-1].filename}:{frames[-1].lineno}"
        outcomes["FOUND"] += 1
        if where not in seen:
            seen.add(where)
            (out / f"found-{len(seen)}").write_bytes(data)
            (out / f"found-{len(seen)}.txt").write_text(f"{where}\n{traceback.format_exc()}", errors="replace")
            print(f"found: {where}\n{traceback.format_exc()[-1500:]}", file=sys.stderr, flush=True)

    began = time.process_time()

    def count(data: bytes) -> None:
        (out / "running").write_bytes(data)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        one(data)
        done = time.process_time() - began > given.seconds
        if done or sum(outcomes.values()) % 1000 == 0:
            (out / "outcomes.json").write_text(json.dumps(outcomes))
        if done:
            print(f"{given.target}: {sum(outcomes.values())} inputs: {dict(outcomes)}", flush=True)
            os._exit(0)

    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    atheris.Setup([sys.argv[0], str(corpus), "-timeout=86400", f"-rss_limit_mb={MEMORY}", f"-artifact_prefix={out}/",
                   "-max_len=65536"], count, custom_mutator=mutator(is_json))
    print(f"{given.target}: corpus and findings in {out}", file=sys.stderr)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
