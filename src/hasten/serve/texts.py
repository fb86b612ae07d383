"""Texts: tokenizing and chat templates in the server's process, beside its event loop and in a bounded number of threads."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hasten.base.errors import UserError
from hasten.checkpoint import load
from hasten.engine import SamplingParams
from hasten.engine.chat import render_chat
from hasten.engine.prepare import Preparer
from hasten.serve.errors import ApiError
from hasten.serve.tokens import TokenTexts

THREADS = 2
MOST = 256
"""Tasks that wait for a thread; who brings more is refused."""
Result = TypeVar("Result")


class Texts:
    """What the model named ``model`` reads and writes, prompt and output within ``context`` tokens (its own if None) and ``slots``
    outputs at a time. Raises a UserError at once for a model that is none."""

    def __init__(self, model: str, *, context: int | None, slots: int) -> None:
        self._name, self._slots = model, slots
        first = load(model)
        self.context = first.spec.context if context is None else context
        self.vocab = first.spec.vocab
        self.has_text = first.tokenizer is not None
        self.template = None if first.tokenizer is None else first.tokenizer.chat_template
        self.tokens = TokenTexts(first.tokenizer)
        self._own = threading.local()  # a tokenizer serves one thread at a time
        self._pool = ThreadPoolExecutor(THREADS, "texts")
        self._tasks = 0

    def warm(self) -> None:
        """Read the tokenizer in every thread, so that no request waits for that."""
        together = threading.Barrier(THREADS)

        def one() -> None:
            together.wait(60)
            if self._preparer().model.tokenizer is not None:
                self._preparer().model.text_tokenizer().encode("x")

        for task in [self._pool.submit(one) for _ in range(THREADS)]:
            task.result()
        self.tokens.text(0)

    async def prompts(self, prompts: Sequence[str | list[int]], params: SamplingParams, name: str = "prompt") -> list[list[int]]:
        """Token ids of each prompt, begun as the model's tokenizer begins a text. Raises UserError for what the model does not take."""

        def made(preparer: Preparer) -> list[list[int]]:
            preparer.check_params(params)
            many = len(prompts) > 1
            return [preparer.prompt_ids(prompt, f"{name}[{i}]" if many else name) for i, prompt in enumerate(prompts)]

        return await self._run(made)

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None, add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:  # fmt: skip
        """Token ids of a conversation. Raises UserError as `prompts` does, and where the model's template refuses the messages."""

        def made(preparer: Preparer) -> list[int]:
            tokenizer = preparer.model.text_tokenizer()
            text = render_chat(
                tokenizer.chat_template,
                messages,
                add_generation_prompt=add_generation_prompt,
                special_tokens=tokenizer.special_tokens,
                tools=tools,
            )
            ids = tokenizer.encode(text, add_special_tokens=False) if tokenizer.chat_template is not None else preparer.encode(text)
            if params is not None:
                preparer.check_params(params)
                preparer.prompt_ids(ids, "messages")
            return ids

        return await self._run(made)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return await self._run(lambda preparer: preparer.model.text_tokenizer().encode(text, add_special_tokens))

    async def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids. Raises UserError for ids that the model does not have."""
        if ids and max(ids) >= self.vocab:
            raise UserError(f"tokens holds {max(ids)}: this model's token ids go from 0 to {self.vocab - 1}")
        return await self._run(lambda preparer: preparer.model.text_tokenizer().decode(ids, skip_special_tokens))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def aside(self, task: Callable[[], Result]) -> Result:
        """What ``task`` gives, made in one of the threads. Raises ApiError 429 where too many wait for that."""
        if self._tasks >= MOST:
            raise ApiError(429, f"{MOST} texts wait to be read; try again in 1 s", code="overloaded", retry_s=1)
        self._tasks += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, task)
        finally:
            self._tasks -= 1

    async def _run(self, task: Callable[[Preparer], Result]) -> Result:
        return await self.aside(lambda: task(self._preparer()))

    def _preparer(self) -> Preparer:
        """The calling thread's."""
        preparer: Preparer | None = getattr(self._own, "preparer", None)
        if preparer is None:
            preparer = self._own.preparer = Preparer(load(self._name), context=self.context, slots=self._slots)
        return preparer
