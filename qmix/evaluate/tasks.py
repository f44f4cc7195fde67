"""`qmix eval --tasks`: the lm-eval harness (the extra `eval`) drives a model through an adapter.

The harness makes the prompts and counts; the model gives log-likelihoods and greedy answers. Texts begin with the BOS
token if the tokenizer sets one. Contexts that are too long lose their beginning, and qmix says so.

All tasks are prepared, and what they ask for is checked, before the model is loaded: an option that qmix does not know
is refused before hours of another task. The harness then has its data in memory, so the budget counts them as taken.
Tasks run one after another, and the results of each are given at once: a later failure drops no figure.

This is the only file of qmix that imports lm_eval, and it is imported only for `--tasks`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qmix.config import SamplingParams, strings
from qmix.engine import Engine, Session
from qmix.errors import QmixError, UsageError
from qmix.evaluate.score import continuations
from qmix.generate import generate
from qmix.offload.needs import choose_context
from qmix.store import Store
from qmix.tokenizer import Tokenizer
from qmix.tokenizer import load as load_tokenizer

ANSWER = 256  # tokens that a task gets which does not say how many it wants, as in the harness's own models
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
FEWSHOT_SEED = 1234  # as the harness has it by default
SEED = 1234  # of sampled answers, as the harness seeds torch
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # ((context, continuation) or None, their ids)


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A store as the harness sees one. load: brings the model up, at the first request; close it afterwards."""

    def __init__(self, tokenizer: Tokenizer, load: Callable[[], Engine], say: Callable[[str], None]):
        super().__init__()
        self._tokens = tokenizer
        self._load = load
        self._say = say
        self._opened = ExitStack()
        self._session: Session | None = None
        self.engine: Engine | None = None
        self._cut = 0

    def close(self) -> None:
        self._session = self.engine = None
        self._opened.close()

    @property
    def eot_token_id(self) -> int:
        return int(self._tokens.eos_ids[0])

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        return self.eot_token_id if self._tokens.bos_id is None else self._tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._tokens.encode(string, bos=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False,
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding gives it). Requests that read the same ids and
        differ only in the last one, as answers A to D do, share a pass."""
        session = self._ready()
        groups: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            check_continuation(len(continuation), session.context)
            read = self._fitted([*context, *continuation[:-1]], session.context)
            groups.setdefault((tuple(read), len(continuation)), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for (ids, count), numbers in tqdm(groups.items(), desc="loglikelihood", disable=disable_tqdm):
            session.trim(0)
            targets = torch.tensor([requests[number][2] for number in numbers]).T
            likely, greedy = continuations(session.read(ids, len(ids) - count), targets)
            for column, number in enumerate(numbers):
                found[number] = float(likely[column]), bool(greedy[column])
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        self._said_cut()
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token predicted once, from as much context as fits its window."""
        context, found = self._ready().context, []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(self.tok_encode(text, False), self.prefix_token_id, context, 1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(likely for likely, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to the first stop string, which is not part of them."""
        session, found = self._ready(), []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, wishes = request.args
            params = sampling(wishes)
            check_answer(params, session.context)
            session.trim(0)
            ids = self._fitted(self.tok_encode(context), session.context - params.max_tokens)
            tokens = generate(session, ids, params, self._tokens, continuing=True)
            found.append("".join(token.text for token in tokens))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        self._said_cut()
        return found

    def _ready(self) -> Session:
        if self._session is None:
            self.engine = self._opened.enter_context(self._load())
            self._session = self.engine.session()
        return self._session

    def _fitted(self, ids: list[int], room: int) -> list[int]:
        """The last `room` of them."""
        self._cut += len(ids) > room
        return ids[-room:]

    def _said_cut(self) -> None:
        if self._cut:
            self._say(f"{self._cut} prompts were longer than the context, and their beginnings were cut off; "
                      "raise -c/--ctx-size")
        self._cut = 0


def sampling(wishes: Mapping[str, Any]) -> SamplingParams:
    """How a task wants its answers: until, a length, and the sampling where it says do_sample. UsageError for a wish
    that qmix does not know: the figures would not be those of the task."""
    known = {"until", "do_sample", *LENGTHS, *SAMPLING}
    if unknown := sorted(set(wishes) - known):
        raise UsageError(f"generation_kwargs: {unknown[0]}: qmix knows {', '.join(sorted(known))}",
                         "take it out of the task, with a copy of it in --include-path")
    until = wishes.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    length = next((int(wishes[name]) for name in LENGTHS if name in wishes), ANSWER)
    if not wishes.get("do_sample"):
        return SamplingParams(temperature=0, max_tokens=length, stop=stops)
    return SamplingParams(max_tokens=length, stop=stops, seed=SEED, temperature=float(wishes.get("temperature", 1.0)),
                          top_p=float(wishes.get("top_p", 1.0)), top_k=int(wishes.get("top_k", 0)),
                          min_p=float(wishes.get("min_p", 0.0)))


class Prepared:
    """Tasks whose data and requests are in memory, and which ask for nothing that qmix cannot do."""

    def __init__(self, items: Sequence[tuple[str, list[Any]]], manager: TaskManager, tokenizer: Tokenizer,
                 limit: int | None):
        self._items, self._manager, self._tokenizer, self._limit = items, manager, tokenizer, limit

    def run(self, load: Callable[[], Engine], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """A row for each metric of each task and group, as soon as it is known: task, version, filter, shots,
        samples, metric, value, stderr or None. QmixError names the task that failed."""
        model = HarnessModel(self._tokenizer, load, say)
        try:
            for name, parts in self._items:
                try:
                    with redirect_stdout(sys.stderr):  # stdout is for the result
                        found = simple_evaluate(model, tasks=list(parts), task_manager=self._manager,
                                                limit=self._limit, log_samples=False)
                except QmixError as error:
                    error.message = f"task {name}: {error.message}"
                    raise
                yield from rows(found)
        finally:
            model.close()


def prepare(names: Sequence[str], folder: Path, context: int, include: Path | None = None,
            limit: int | None = None) -> Prepared:
    """names: of tasks, groups and tags, or one of them as a plain string; context: tokens, 0 = as engine.load takes
    it; include: a folder with more tasks; limit: samples of each, None = all.

    UsageError for a task that there is not, where a task's data cannot be had, and where one asks for what qmix
    cannot do.
    """
    names = strings("tasks", names)
    if include is not None and not include.is_dir():
        raise UsageError(f"--include-path {include}: no such folder")
    with Store.open(folder) as store:
        tokenizer = load_tokenizer(store.path, store.model.vocab)
        context = choose_context(store.model, context)
    try:
        with redirect_stdout(sys.stderr):
            manager = TaskManager(include_path=None if include is None else str(include))
            if unknown := [name for name in names if name not in manager.all_tasks]:
                raise UsageError(f"--tasks {unknown[0]}: the lm-eval harness has no such task",
                                 "lm-eval ls tasks lists them; your own are found with --include-path")
            items, seen = [], dict[str, str]()
            for name in dict.fromkeys(names):
                loaded = manager.load([name])
                for one, task in loaded["tasks"].items():
                    if one in seen:
                        raise UsageError(f"--tasks: {one} is part of {seen[one]} and of {name}", "name one of them")
                    seen[one] = name
                    _check(one, task, tokenizer, context, limit)
                items.append((name, [loaded["groups"][name]] if name in loaded["groups"] else
                              list(loaded["tasks"].values())))
    except QmixError:
        raise
    except Exception as error:  # whatever datasets, yaml or a task's own code raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--tasks {','.join(names)}: the lm-eval harness cannot prepare them: {reason}",
                         "tasks fetch their data from the Hugging Face hub, unless it is in its cache") from None
    return Prepared(items, manager, tokenizer, limit)


def _check(name: str, task: Any, tokenizer: Tokenizer, context: int, limit: int | None) -> None:
    """Build the requests of a task, as the harness will once more, and look at what they ask for."""
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task {name}: needs images or sound, and qmix reads only text")
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"task {name}: runs code that the model writes, which qmix does not support")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    checked = set()
    for request in task.instances:
        if request.request_type not in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            raise UsageError(f"task {name}: needs {request.request_type}, which qmix does not support")
        if request.request_type == "loglikelihood_rolling" or repr(request.args[1]) in checked:
            continue
        wish = request.args[1]
        checked.add(repr(wish))
        try:
            if request.request_type == "generate_until":
                check_answer(sampling(wish), context)
            else:
                check_continuation(len(tokenizer.encode(wish, bos=False)), context)
        except QmixError as error:
            raise UsageError(f"task {name}: {error.message}", error.cure) from None


def check_answer(params: SamplingParams, context: int) -> None:
    """UsageError where the longest answer leaves no room for a prompt."""
    if params.max_tokens >= context:
        raise UsageError(f"an answer of {params.max_tokens} tokens does not fit a context of {context}",
                         "raise -c/--ctx-size")


def check_continuation(tokens: int, context: int) -> None:
    """UsageError where a continuation cannot be scored."""
    if not 0 < tokens <= context:
        raise UsageError(f"a continuation of {tokens} tokens: want 1 to {context}, the context", "raise -c/--ctx-size")


def rows(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The harness's results, {task: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": ...}}, flat."""
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            yield {"task": task, "version": found["versions"].get(task), "filter": chosen,
                   "shots": found["n-shot"].get(task), "samples": found["n-samples"].get(task, {}).get("effective"),
                   "metric": metric, "value": value, "stderr": error if isinstance(error, float) else None}
