"""Hidden states on their way from a pass to the multi-token-prediction head."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from qmix.config import Step
from qmix.engine.session import Session
from qmix.forward.run_eager import Collect
from qmix.forward.runner import Runner
from qmix.speculation import MtpPace


def collector(model: Runner, pace: MtpPace | None, sessions: Sequence[Session], tokens: Sequence[Sequence[int]],
              step: Step) -> Collect | None:
    """What takes a pass's hidden states for the multi-token-prediction head, as long as that drafts: of a session
    by itself. A prompt is read by the head at once, decoded tokens when it drafts next."""
    head, session = model.mtp, sessions[0]
    state, before = session.mtp, session.length
    if head is None or state is None or pace is None or not pace.on or len(sessions) > 1:
        return None

    def keep(first: int, residual: Tensor, seconds: float) -> None:
        state.add(before + first, model.hidden(residual), True)

    if step.phase == "decode":
        return keep
    ids = [*session.ids, *tokens[0]]

    def read(first: int, residual: Tensor, seconds: float) -> None:
        start = time.perf_counter()
        state.add(before + first, model.hidden(residual), False)
        if following := ids[state.first + 1:before + first + len(residual) + 1]:
            head.fill(state, following, step)
        pace.spend(seconds + time.perf_counter() - start)

    return read
