"""`hasten chat MODEL`: talk to a model in the terminal."""

import sys
from typing import Annotated

import typer

from hasten.base.errors import UserError
from hasten.cli import options
from hasten.cli.terminal import fail, notify, write


def chat(
    model: options.ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_tokens: options.MaxTokens = 512,
    temperature: options.Temperature = 0.7,
    top_k: options.TopK = 0,
    top_p: options.TopP = 0.95,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    backend: options.BackendOption = "auto",
    weights: options.WeightsOption = None,
    activations: options.ActivationsOption = None,
) -> None:
    """Chat in the terminal. /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."""
    from hasten.engine import LLM, SamplingParams
    from hasten.engine.chat import render_chat
    from hasten.program import Formats

    llm = LLM(model, backend=backend, formats=Formats(weights, activations))
    notify(llm.notice)
    tokenizer = llm.model.text_tokenizer()
    template = tokenizer.chat_template
    if template is None:
        fail(f"{model} has no chat template, so a plain one is used; a model not made to chat will ramble")
    params = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        seed=seed, stop=("\nuser:", "\nsystem:") if template is None else (),
    )  # fmt: skip
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            said = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            write("\n")
            return
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not {error.encoding} text (byte {error.start}); convert it") from None
        if said.strip() == "/exit":
            return
        if said.strip() == "/clear":
            messages = list(opening)
            continue
        if not said.strip():
            continue
        messages.append({"role": "user", "content": said})
        try:
            text = render_chat(template, messages, add_generation_prompt=True, special_tokens=tokenizer.special_tokens)
            answer = ""
            for chunk in llm.stream([tokenizer.encode(text, add_special_tokens=False)], params):
                write(chunk.text)
                answer += chunk.text
        except KeyboardInterrupt:
            answer += " …"
        except UserError as error:
            fail(f"{error} (/clear begins anew)")
            messages.pop()
            continue
        write("\n")
        messages.append({"role": "assistant", "content": answer})
