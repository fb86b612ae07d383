"""`hasten chat MODEL`: talk to a model in the terminal."""

import dataclasses
import sys
from typing import Annotated

import typer

from hasten.base.errors import UserError
from hasten.cli import options
from hasten.cli.terminal import fail, write

DRAWING, PLACING = options.Drawing(max_tokens=512, temperature=0.7, top_p=0.95), options.Placing()


@options.spread
def chat(
    model: options.ModelArgument,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    drawing: options.Drawing = DRAWING,
    placing: options.Placing = PLACING,
) -> None:
    """Chat in the terminal. /clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."""
    from hasten.engine.chat import render_chat

    params, llm = drawing.params(), placing.open(model, 1)
    llm.engine(llm.preparer.contexts[0])  # what cannot be opened is said before anybody has typed
    tokenizer = llm.model.text_tokenizer()
    template = tokenizer.chat_template
    if template is None:
        fail(f"{model} has no chat template, so a plain one is used; a model not made to chat will ramble")
        params = dataclasses.replace(params, stop=(*params.stop, "\nuser:", "\nsystem:"))
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
                if chunk.error is not None:
                    raise UserError(chunk.error)
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
