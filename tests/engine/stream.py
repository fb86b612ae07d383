"""A session that does its work later, as a device does: in order, and only when somebody waits for it. It computes on another session, and
draws by itself, with the native sampler's rows."""

import collections
import functools

import numpy as np

from hasten import _native
from hasten.engine.sampling import Purpose
from hasten.program import Batch


class Stream:
    """Work in the order in which it was asked for."""

    def __init__(self):
        self.waiting, self.asked, self.done = collections.deque(), 0, 0

    def later(self, work):
        """Its number, to be waited for."""
        self.waiting.append(work)
        self.asked += 1
        return self.asked

    def wait(self, number):
        while self.done < number:
            self.waiting.popleft()()
            self.done += 1


class LaterSession:
    """``events`` says in which order steps were begun ("run") and their tokens waited for ("known"), each with the number of the step."""

    def __init__(self, session):
        self.program, self.page, self.pages, self.threads = session.program, session.page, session.pages, session.threads
        self.session, self.stream, self.drawer = session, Stream(), LaterDrawer(self)
        self.steps, self.events, self.fetched = 0, [], []

    def carry_out(self, moves):
        self.stream.later(functools.partial(self.session.carry_out, list(moves)))

    def run(self, batch, pages):
        assert batch.tokens.min(initial=0) >= -1 - len(self.drawer.named), "a token that nobody draws"
        self.steps += 1
        self.events.append(("run", self.steps))
        logits = LaterLogits(self, (len(batch.rows), self.program.values["logits"].features[-1]))
        pages = [[list(table) for table in lists] for lists in pages]  # as they are now

        def work():
            drawn, tokens = self.drawer.drawn, batch.tokens.copy()
            due = tokens < 0
            tokens[due] = np.maximum(drawn[-2 - tokens[due]], 0)
            logits.values = self.session.run(Batch(tokens, batch.positions, batch.offsets, batch.rows), pages).numpy()

        logits.number = self.stream.later(work)
        return logits

    @property
    def overlapped(self):
        """How many steps were begun before the tokens of the one before were known."""
        known = {step: at for at, (what, step) in enumerate(self.events) if what == "known"}
        begun = {step: at for at, (what, step) in enumerate(self.events) if what == "run"}
        return sum(step + 1 in begun and begun[step + 1] < at for step, at in known.items())


class LaterLogits:
    """Gone with the session's next step."""

    def __init__(self, session, shape):
        self.session, self.shape, self.step, self.values, self.number = session, shape, session.steps, None, 0

    def numpy(self, rows=None):
        self.check()
        self.session.fetched.append(self.shape[0] if rows is None else len(rows))
        self.session.stream.wait(self.number)
        return self.values if rows is None else self.values[list(rows)]

    def check(self):
        assert self.session.steps == self.step, "logits of a step that others came after"


class LaterDrawer:
    """Leaves rows that ask for log-probabilities. What an output has drawn it knows by itself."""

    def __init__(self, session):
        self.session, self.native = session, _native.Sampler(None)
        self.rows = {}  # by key: the native row, and the place of the token that it waits for
        self.named = ()
        self.drawn = np.zeros(0, np.int32)
        self.draws = 0

    def draw(self, logits, rows, wanted):
        if not isinstance(logits, LaterLogits):
            return LaterDrawn(self.session, dict.fromkeys(range(len(rows)), "on the host"), None, 0)
        logits.check()
        left = {place: "log-probabilities" for place, each in enumerate(wanted) if each.logprobs is not None}
        assert len({each.key for each in wanted}) == len(wanted)
        made = {each.key: self._row(each) for place, each in enumerate(wanted) if place not in left}
        self.rows, self.named = made, range(len(wanted))
        self.draws += len(made)
        found = {}

        def work():
            tokens = np.full(len(wanted), -1, np.int32)
            for place, (each, row) in enumerate(zip(wanted, rows)):
                if place in left:
                    continue
                its, one = made[each.key][0], np.full(1, -1, np.int32)
                masks = None if each.mask is None else each.mask[None]
                try:
                    self.native.sample(
                        logits.values[[row]], [its], np.array([each.position]), one, masks=masks, purpose=Purpose.TOKEN
                    )  # fmt: skip
                    its.append(int(one[0]))
                except ValueError:
                    pass
                tokens[place] = one[0]
            self.drawn = found["tokens"] = tokens

        return LaterDrawn(self.session, left, found, self.session.stream.later(work))

    def _row(self, each):
        row, position = self.rows.get(each.key, (None, -1))
        if position != each.position:
            assert len(each.prompt) + len(each.output) == each.position, "an output that is not known, and was not drawn here"
            row = _native.SamplingRow(
                temperature=each.temperature, top_k=each.top_k, top_p=each.top_p, min_p=each.min_p, seed=each.seed, choice=each.choice,
                repetition_penalty=each.repetition_penalty, presence_penalty=each.presence_penalty,
                frequency_penalty=each.frequency_penalty, prompt=np.asarray(each.prompt, np.int64), logprobs=-1, logit_bias=list(each.bias),
            )  # fmt: skip
            for token in each.output:
                row.append(token)
        return row, each.position + 1


class LaterDrawn:
    def __init__(self, session, left, found, number):
        self.session, self.left, self._found, self._number, self._step = session, left, found, number, session.steps

    def tokens(self):
        if self._found is None:
            return [-1] * len(self.left)
        self.session.events.append(("known", self._step))
        self.session.stream.wait(self._number)
        return self._found["tokens"].tolist()
