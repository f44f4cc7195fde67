"""`qmix plan`, `stats`, `replay`, `doctor` and the paging flags of `generate`, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import write_tiny_checkpoint
from test_cli import Done, qmix
from tokenizer_files import DEMO_TEMPLATE, spm_model

from qmix.commands.loading import known_speeds
from qmix.commands.plan import report as planning
from qmix.device import StandIn
from qmix.engine import Placement
from qmix.errors import UsageError
from qmix.offload.forecast import Speeds

MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planning")
    source = write_tiny_checkpoint(folder / "tiny", vocab_size=512, num_local_experts=8)
    (source / "tokenizer.model").write_bytes(spm_model())
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>",
                                                              "chat_template": DEMO_TEMPLATE}))
    done = qmix("quantize", source, folder / "store", "--threads", 1, "--block", 64)
    assert done.returncode == 0, done.stderr
    return folder / "store"


def good(done: Done) -> Done:
    assert done.returncode == 0, done.stderr
    return done


def bad(done: Done, code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr
    assert not done.stdout


def test_plan_of_a_described_machine_from_a_config_alone(config_file: Path) -> None:
    done = good(qmix("plan", config_file, "--vram", "24G", "--ram", "32G", "--pcie", 25, "--disk", 3, "--json"))
    found = json.loads(done.stdout)
    assert found["records"] == 256 and found["record_bytes"] == 99_090_432
    assert found["on_disk_bytes"] == 0 and found["in_memory"] == 256
    by = {(row["memory"], row["holds"]): row["bytes"] for row in found["memory"]}
    assert sum(n for (memory, _), n in by.items() if memory == "VRAM") == 24 * 2**30
    assert sum(n for (memory, _), n in by.items() if memory == "RAM") == 32 * 2**30
    assert by["RAM", "expert slots"] == 256 * 99_090_432 and found["plan"][-1].endswith("all of them in RAM")
    assert found["limited_by"] == "RAM"
    assert "assumed, neither measured nor given: ram 40 GB/s, vram 900 GB/s" in done.stderr


def test_plan_says_what_the_disk_costs(config_file: Path) -> None:
    found = json.loads(good(qmix("plan", config_file, "--ram", "16G", "--disk", 2.5, "--ram-speed", 40, "--device",
                                 "cpu", "--json")).stdout)
    assert found["limited_by"] == "disk"
    missed = 64 * 99_090_432 * (1 - found["in_memory"] / 256)
    assert found["disk_bytes_per_token"] == pytest.approx(missed, rel=1e-6)
    least, most = found["tokens_per_second"]
    assert most == pytest.approx(2.5e9 / missed, abs=0.01) and least < most
    text = good(qmix("plan", config_file, "--ram", "16G", "--device", "cpu")).stdout
    assert "expert slots" in text and "forecast:" in text


def test_plan_of_a_store_and_of_this_machine(store: Path) -> None:
    found = json.loads(good(qmix("plan", store, "--json")).stdout)
    assert found["on_disk_bytes"] == 0
    assert found["hit_rate"] == 1


def test_plan_that_cannot_fit_is_exit_3_with_the_shortfall(config_file: Path) -> None:
    bad(qmix("plan", config_file, "--ram", "2G", "--device", "cpu"), 3, "short of", "dense", "KV cache")
    bad(qmix("plan", config_file, "--ram", "32G", "--vram", "2G"), 3, "of VRAM", "short of")


@pytest.mark.parametrize(("args", "words"), [
    (("--ram", "lots"), ("--ram 'lots': not a size",)),
    (("--vram", "0"), ("--vram",)),
    (("--ram", "8G", "--margin", "1G"), ("--margin",)),
    (("--pcie", "25", "--device", "cpu"), ("--pcie 25: only has an effect with a GPU", "--vram")),
    (("--device", "tpu"), ("--device tpu",)),
    (("--device", "cpu", "--vram", "24G"), ("--device cpu: --vram describes a GPU",)),
    (("--ctx-size", "99999999"), ("--ctx-size 99999999",)),
    (("--format", "int5"), ("int5",)),
    (("--kv-cache", "int5"), ("--kv-cache int5: want bf16 or int8",)),
])
def test_plan_names_the_flag_that_is_wrong(config_file: Path, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    bad(qmix("plan", config_file, *args), 2, *words)


def test_plan_for_the_gpu_of_this_machine(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine would take: what is free but for a margin, some of it taken already."""
    said: list[str] = []
    closed: list[bool] = []
    model = planning.find_model(config_file, None, None, said.append)
    card = StandIn(nbytes=24 * 2**30)
    monkeypatch.setattr(card, "taken", lambda: 2**29)
    monkeypatch.setattr(card, "close", lambda close=card.close: (closed.append(True), close()))
    monkeypatch.setattr(Placement, "open", lambda self, record, say: card if record == 99_090_432 else None)
    monkeypatch.setattr(Placement, "pin_budget", lambda self: 2**40)
    machine = planning.find_gpu(model, planning.Machine(ram=32 * 2**30), "auto", said.append)
    assert (machine.vram, machine.vram_taken) == (24 * 2**30, 2**29) and closed == [True]
    assert len(said) == 1 and "24.0 GiB of its memory" in said[0] and "--device cpu" in said[0]
    found = planning.describe(model, 0, machine, None, said.append)
    by = {(row["memory"], row["holds"]): row["bytes"] for row in found["memory"]}
    assert sum(n for (memory, _), n in by.items() if memory == "VRAM") == 24 * 2**30
    assert by["VRAM", "program"] == 2**29 and found["limited_by"] == "RAM"
    assert by["RAM", "expert slots"] == 256 * 99_090_432
    monkeypatch.setattr(Placement, "pin_budget", lambda self: 12 * 2**30)  # as WSL's would be
    machine = planning.find_gpu(model, planning.Machine(ram=32 * 2**30), "auto", said.append)
    rows = planning.describe(model, 0, machine, None, said.append)["memory"]
    assert next(row["bytes"] for row in rows if (row["memory"], row["holds"]) == ("RAM", "expert slots")) < 12 * 2**30


def test_a_plan_leaves_the_gpu_alone(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU is described, and where there is none."""
    said: list[str] = []
    model = planning.find_model(config_file, None, None, said.append)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    mine, other = planning.Machine(ram=2**35), planning.Machine(vram=2**34)
    assert planning.find_gpu(model, mine, "auto", said.append) is mine
    with pytest.raises(UsageError, match="torch sees no NVIDIA GPU"):
        planning.find_gpu(model, mine, "cuda", said.append)
    monkeypatch.setattr(Placement, "open", None)  # calling it would fail
    assert planning.find_gpu(model, other, "auto", said.append) is other
    assert not said


def test_plan_with_an_int8_kv_cache(config_file: Path) -> None:
    sizes = {}
    for kv in ("bf16", "int8"):
        found = json.loads(good(qmix("plan", config_file, "--ram", "32G", "--device", "cpu", "--kv-cache", kv,
                                     "--json")).stdout)
        assert found["kv_cache"] == kv
        sizes[kv] = next(row["bytes"] for row in found["memory"] if row["holds"] == "KV cache") / found["context"]
    assert sizes == {"bf16": 128 * 1024, "int8": 66 * 1024}


def test_generate_with_an_int8_kv_cache(store: Path) -> None:
    done = good(qmix("generate", store, "-p", "the fox", "--raw", "-n", 3, "--kv-cache", "int8"))
    assert "int8 KV cache" in done.stderr and done.stdout
    bad(qmix("generate", store, "-p", "x", "--kv-cache", "q8_0"), 2, "--kv-cache q8_0")


def test_plan_of_something_else(tmp_path: Path, store: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    bad(qmix("plan", tmp_path), 4, "config.json")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | {"num_local_experts": 0}))
    bad(qmix("plan", tmp_path), 4, "num_local_experts")
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | {"num_hidden_layers": 10**9}))
    bad(qmix("plan", tmp_path), 4, "num_hidden_layers")
    bad(qmix("plan", store, "--format", "int4"), 2, "is quantized already")
    bad(qmix("plan", tmp_path / "nothing"), 2, "no such folder")


def test_measured_speeds_are_used_and_nonsense_is_ignored(tmp_path: Path) -> None:
    from datetime import date

    from qmix.hardware import bandwidth

    file = tmp_path / "hardware.json"
    said: list[str] = []
    assert known_speeds(file, said.append) is None
    bandwidth.save(bandwidth.Bandwidths(30.0, 2.5, 4 * 2**20, 4, True, None, None, str(date(2026, 1, 1))), file)
    assert known_speeds(file, said.append) == Speeds(30.0, 2.5)
    bandwidth.save(bandwidth.Bandwidths(30.0, 2.5, 4 * 2**20, 4, True, 25.0, 6.0, str(date(2026, 1, 1)), 900.0), file)
    assert known_speeds(file, said.append) == Speeds(30.0, 2.5, 25.0, 900.0)
    assert not said
    file.write_text("{}")
    assert known_speeds(file, said.append) is None
    assert len(said) == 1


def test_plan_says_which_keys_of_the_config_are_read_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL | {"auto_map": {"AutoModelForCausalLM": "modeling_x.Own"}, "eos_token_id": -1}))
    said: list[str] = []
    planning.find_model(path, None, None, said.append)
    assert [line.split(": ")[:2] for line in said] == [["note", str(path)]] * 2
    assert "auto_map" in said[0] and "eos_token_id -1" in said[1]


def test_generate_within_a_budget_pages_and_says_so(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qmix.hardware.resident_bytes", lambda: 0)
    whole = json.loads(good(qmix("generate", store, "-p", "fox", "-n", 8, "--temp", 0, "--json")).stdout)
    assert whole["tiers"] == {"ram": 100.0}
    done = good(qmix("generate", store, "-p", "fox", "-n", 8, "--temp", 0, "--json", "--ram", "262640K", "-c", 64,
                     "--verify", "always", "--cache-policy", "lru", "--prefetch", "both"))
    paged = json.loads(done.stdout)
    assert paged["token_ids"] == whole["token_ids"]
    assert 0 < paged["offload"]["slots"] < 24, "the budget of this test is off"
    assert set(paged["tiers"]) == {"ram", "disk"} and sum(paged["tiers"].values()) == pytest.approx(100)
    assert paged["offload"]["decode"]["misses"] > 0
    assert paged["offload"]["policy"] == "lru" and paged["offload"]["prefetch"] == "both"
    lines = done.stderr.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("RAM "))  # after what is said of the kernels
    assert lines[first + 1].startswith("experts: ") and "read from disk" in lines[first + 1]


@pytest.mark.parametrize(("args", "code", "words"), [
    (("--ram", "1M"), 3, ("short of",)),
    (("--ram", "900000G"), 3, ("is available",)),
    (("--ram", "8X"), 2, ("--ram '8X'",)),
    (("--margin", "-1"), 2, ("--margin",)),
    (("--cache-policy", "fifo"), 2, ("--cache-policy fifo", "lfu")),
    (("--prefetch", "psychic"), 2, ("--prefetch psychic",)),
    (("--prefetch", "ahead", "--no-prefetch"), 2, ("--no-prefetch",)),
    (("--verify", "sometimes"), 2, ("--verify sometimes",)),
    (("--trace", "/nowhere/at/all"), 1, ("/nowhere/at/all",)),
])
def test_paging_flags_that_make_no_sense(store: Path, args: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    done = qmix("generate", store, "-p", "fox", "-n", 2, *args)
    assert done.returncode in (code, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not done.stdout


def test_a_run_is_traced_replayed_and_remembered(store: Path, tmp_path: Path) -> None:
    for name in ("train", "test"):
        good(qmix("generate", store, "-p", "the fox", "-n", 12, "--temp", 0, "--trace", tmp_path / name))
    bad(qmix("generate", store, "-p", "x", "-n", 2, "--trace", tmp_path / "test"), 2, "test")
    done = good(qmix("replay", tmp_path / "test", "--train", tmp_path / "train", "--slots", "6,12", "--model", store,
                     "--cache-policy", "lru,lfu:16,static", "-o", "json"))
    found = json.loads(done.stdout)
    assert {row["policy"] for row in found["policies"]} >= {"lru", "lfu:16", "static", "belady"}
    best = {row["slots"]: row["hit %"] for row in found["policies"] if row["policy"] == "belady"}
    assert all(row["hit %"] <= best[row["slots"]] + 1e-9 for row in found["policies"])
    assert any(row["source"] == "ahead" for row in found["predictions"]), "a trace of a resident run has no guesses"
    assert good(qmix("replay", tmp_path / "test", "-o", "md")).stdout.startswith("| slots |")
    bad(qmix("replay", tmp_path / "test", "--slots", "many"), 2, "--slots many")
    bad(qmix("replay", tmp_path / "test", "-o", "xml"), 2, "-o xml")
    bad(qmix("replay", store / "config.json"), 2, "config.json")
    good(qmix("quantize", store.parent / "tiny", tmp_path / "other", "--threads", 1, "--method", "rtn"))
    bad(qmix("replay", tmp_path / "test", "--model", tmp_path / "other"), 2, "recorded with another store")

    shown = json.loads(good(qmix("stats", store, "--json")).stdout)
    assert shown["decode"]["tokens"] == 2 * 11
    assert shown["prefill"]["tokens"] > 0
    good(qmix("stats", store, "--reset"))
    assert json.loads(good(qmix("stats", store, "--json")).stdout)["decode"]["tokens"] == 0


def test_stats_of_a_text(store: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    found = json.loads(good(qmix("stats", store, "-f", text, "--ctx-size", 64, "--json")).stdout)
    (about,) = found["texts"]
    assert about["tokens"] > 100 and [row["layer"] for row in about["by_layer"]] == [0, 1, 2]
    assert json.loads(good(qmix("stats", store, "--json")).stdout)["prefill"]["tokens"] == 0, "a text is not a run"
    bad(qmix("stats", store, "-f", tmp_path / "none"), 2, "none")
    bad(qmix("stats", store, "-f", text, "--reset"), 2, "--reset")
    bad(qmix("stats", store, "--ram", "1G"), 2, "--ram: without -f")
    good(qmix("stats", store, QMIX_STATS_RAM="1G"))


def test_doctor_reports(store: Path) -> None:
    found = json.loads(good(qmix("doctor", store, "--json")).stdout)
    assert {"machine", "libraries", "kernels", "disk", "problems"} <= set(found)
