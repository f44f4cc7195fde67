"""Every launch of decoding and prompts compiles to machine code for cards that are not here, with Triton's own
assembler and its run-time specialization, and fits the card. benchmarks/launches.py does the work, in a process without
Triton's interpreter. `make test` compiles for each kind of card once; `make test-models` compiles for the others what
differs there in the assembler alone, and the operations of all models;
`python benchmarks/launches.py` compiles all models and numbers of tokens for all cards, in several minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cuda import in_another_process, needs_triton
from warm_python import WarmPython

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# One process, so that torch and Triton are imported once and models share what they launch alike. (card; model, tokens
# of decoding, of prompts, format, group, block). Other models and dtypes where they are cheap; other formats
# beside int4 of the same model, with which they share all kernels but those that read codes. All numbers of tokens on
# one card, whose sums must have one order; elsewhere the least and the most, which takes the most registers. No number
# of a prompt twice on a card where experts are computed many at a launch: launches are counted by it.
ALL, PROMPTS, ENDS = [1, 2, 4, 8], [12, 40, 200, 511, 512], [12, 512]
# 8.0 and 8.9 have the configurations and tensor cores of 8.6, which has the least memory of the three: Triton compiles
# the same for them, and what their assemblers make of it `make test-models` sees.
WANTED = [
    ([7, 5], ["mixtral", [1], [40]], ["mixtral", [1], [40], "int3", 64, 32]),
    ([8, 6], ["mixtral", ALL, PROMPTS], ["mixtral", [], [250], "int3"],  # which takes the most registers
     ["demo", [1], [40]], ["demo", [1], [40], "int3", 32, 32], ["demo", [1], [40], "mxfp4", 32, 64],
     ["smallest", [1], [9]]),
    ([9, 0], ["mixtral", [1, 8], ENDS], ["mixtral", [1], [40], "int2", 128, 64],
     ["mixtral", [1, 8], [200], "mxfp4", 32, 64], ["mixtral", [1, 8], [20], "q5_k"]),
    ([12, 0], ["mixtral", [1], ENDS]),
]
COUNTED = [[8, 6], [9, 0]]
# What Mixtral does not launch (launch_ops.py): (numbers of tokens, of how many models).
OPS = {(7, 5): ([1], 1), (8, 6): ([1, 8], 3), (9, 0): ([8], 1)}
OTHERS = [
    ([8, 0], ["mixtral", [1], ENDS], ["mixtral", [], [200], "int3"]),
    ([8, 9], ["mixtral", [1], ENDS]),
    ([8, 6], ["mixtral", [1], [40]]),
]
ALL_OPS = {(8, 6): ([1, 8], 6)}
CODE = f"""
import json, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
wanted, ops = json.loads(sys.argv[1])
import torch
import launches
from dry_launches import recording
from launch_ops import launch_ops
from qmix.kernels.cuda_ops import TritonOps

torch.set_num_threads(1)
known = launches.models()
for card, *runs in wanted:
    card = tuple(card)
    with recording(card) as found, torch.inference_mode():
        for model, *rest in runs:
            launches.launch(known[model], card, found, *rest)
        counts, of = ops.get("%d.%d" % card, ((), 0))
        for count in counts:
            launch_ops(TritonOps(), found, count, launches.half_of(card), of)
        if card == (8, 6):
            launches.launch(known["demo"], card, found, (), (40,), "int4", 64, 64, torch.float32)
    for one in found:
        counted = list(card) in {COUNTED!r} and one.module == "cuda_jit" and one.constants.get("M") in (1, 8)
        print(json.dumps(dict(card=card, kernel=one.kernel, module=one.module, labels=one.labels, shared=one.shared,
            constants={{name: str(value) for name, value in one.constants.items()}}, registers=one.registers,
            wrong=list(launches.wrong(one, card)), per_weight=one.per_weight if counted else None)), flush=True)
    print(json.dumps(dict(card=card, kernel="", wrong=list(launches.wrong_together(found)))), flush=True)
"""
pytestmark = [needs_triton, pytest.mark.timeout(1800)]


def compiled(python: WarmPython, wanted: list[Any], ops: dict[tuple[int, int], Any]) -> list[dict[str, Any]]:
    """A line for each kernel, and one for each card."""
    given = json.dumps([wanted, {f"{major}.{minor}": what for (major, minor), what in ops.items()}])
    done = in_another_process(python, CODE, given)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def launched(warm_python: WarmPython) -> list[dict[str, Any]]:
    return compiled(warm_python, WANTED, OPS)


def test_everything_compiles_and_fits(launched: list[dict[str, Any]]) -> None:
    assert_right(launched, WANTED, OPS)


@pytest.mark.models
def test_everything_compiles_and_fits_on_other_cards_and_for_all_models(warm_python: WarmPython) -> None:
    found = compiled(warm_python, OTHERS, ALL_OPS)
    assert_right(found, OTHERS, ALL_OPS)
    for card in ([8, 0], [8, 9]):
        kernels = {line["kernel"] for line in found if line["card"] == card
                   and any("prompt" in label for label in line.get("labels", ()))}
        assert kernels == {"matmul", "attend_many", "sort", "gate_up", "down", "combine"}


def assert_right(launched: list[dict[str, Any]], asked: list[Any], ops: dict[tuple[int, int], Any]) -> None:
    assert not [line for line in launched if line["wrong"]]
    for card, *runs in asked:
        labels = {label for line in launched if line["card"] == card and line["kernel"] for label in line["labels"]}
        wanted = {f"{model}, decode {count}" for model, tokens, *_ in runs for count in tokens}
        wanted |= {f"ops, decode {count}" for count in ops.get(tuple(card), ((), 0))[0]}
        # A prompt of which torch does everything launches nothing of ours.
        assert wanted <= labels


def test_what_prompts_launch(launched: list[dict[str, Any]]) -> None:
    """On 7.5 Triton has no tensor cores: its products are left to torch. On Hopper attention is."""
    found = {tuple(card): {line["kernel"] for line in launched if line["card"] == card and any(
        "prompt" in label for label in line.get("labels", ()))} for card, *_ in WANTED}
    assert found[7, 5] == {"decode"}
    experts = {"sort", "gate_up", "down", "combine"}
    assert found[9, 0] == {"matmul"} | experts
    assert found[12, 0] == {"matmul", "attend_many"} | experts
    assert found[8, 6] == {"matmul", "attend_many", "decode"} | experts  # what is in fp32 is torch's too


def test_the_experts_of_a_layer_take_four_launches(launched: list[dict[str, Any]]) -> None:
    """However many they are; with the room of Mixtral's 512 tokens."""
    for line in launched:
        if line["kernel"] in ("sort", "gate_up", "down", "combine"):
            counts = {count for label, count in line["labels"].items() if label.startswith("mixtral, prompt")}
            assert counts <= {1}, line


def test_no_other_operation_is_compiled_anew_for_a_number_of_tokens(launched: list[dict[str, Any]]) -> None:
    """Beside products of the experts and what finds them, the kernels of eight tokens are those of one."""
    own = [line for line in launched if line["card"] == [8, 6] and line["kernel"] not in ("", "gemv", "finish", "jobs")]
    several = [line for line in own if "ops, decode 1" in line.get("labels", ())]
    assert {line["kernel"] for line in several} >= {"logits", "choose", "head_norm", "combined", "norm", "attend",
                                                    "merge", "rope_cos_sin"}
    assert all("ops, decode 8" in line["labels"] for line in several)


def test_the_gemv_takes_few_instructions_a_weight(launched: list[dict[str, Any]]) -> None:
    """One token: a mask and a product, and what loading takes. Eight: a product each beside that."""
    for tokens, most in (("1", 3), ("8", 12.5)):
        counted = [line["per_weight"] for line in launched if line.get("per_weight")
                   and any(label.startswith("mixtral") for label in line["labels"])  # small ones idle half of a warp
                   and line["constants"]["M"] == tokens and line["constants"]["BITS"] == "4"
                   and line["constants"]["E2M1"] == "False"]  # whose codes take a shift more, and their signs
        assert len(counted) >= len(COUNTED) and max(counted) < most, counted


def test_a_number_of_tokens_compiles_nothing_anew(launched: list[dict[str, Any]]) -> None:
    """Of prompts; decoding has a variant for each power of two."""
    own = [line for line in launched if line["card"] == [8, 6]
           and line["kernel"] in ("matmul", "attend_many", "gate_up", "down")]
    assert any({"mixtral, prompt 511", "mixtral, prompt 512"} <= set(line["labels"]) for line in own)
